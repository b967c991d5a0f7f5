"""Simulated annealing of a small batch: many chains side by side.

Moves in one micro-batch and exchanges between two cannot improve plans in which several sequences
would have to change slots together. A chain changes one slot, or swaps two, and sometimes accepts
a slower plan; the fastest plan of all chains is returned. Chains differ by their start and by
their random numbers, all from one seed, so equal batches have equal plans.

Legend: K sequences, longest first; P chains; Q micro-batches of all groups; T slots, N ranks of a
group; S starts. A cell is a slot of a micro-batch, number q * T + slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymix.schedule.cost.model import CostModel, shard_tokens
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import PlacementBuilder
from raymix.schedule.layout import Floats, Ints, Layout

_CHAINS = 64
_STEPS_PER_SEQUENCE, _MAX_STEPS = 40, 250
# Temperatures as fractions of the fastest start's time, at the first and at the last step.
_START_TEMPERATURE, _END_TEMPERATURE = 0.1, 0.002
# Weight of the ranks that are not the slowest: without it most changes leave the energy unchanged,
# and chains wander on plateaus.
_MEAN_WEIGHT = 0.3
_SWAP_PROBABILITY, _SLOWEST_PROBABILITY = 0.4, 0.7


@dataclass(frozen=True, slots=True)
class SlotEncoding:
    """Placements of one batch as arrays of cells, (K,), and back."""

    length_K: Ints
    layout: Layout
    cost: CostModel
    max_micro: int
    """Largest number of micro-batches of a group."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of micro-batches and of slots, Q and T."""
        return self.layout.groups * self.max_micro, self.layout.slots.width_T.size

    def encode(self, placement: Placement) -> Ints:
        """Return the cell of every sequence, (K,)."""
        layout, slots = self.layout, self.layout.slots
        group_K, rank_K = np.divmod(placement.first_K, layout.context)
        # Slots are sorted by width, and those of one width by first rank.
        slot_K = np.searchsorted(slots.width_T, placement.width_K) + rank_K // placement.width_K
        return (group_K * self.max_micro + placement.micro_K) * slots.width_T.size + slot_K

    def decode(self, cell_K: Ints) -> Placement:
        """Return the placement, without empty micro-batches in between."""
        builder = PlacementBuilder(cell_K.size, self.layout)
        q_K, slot_K = np.divmod(cell_K, self.shape[1])
        nonempty = np.unique(q_K)
        for group in range(self.layout.groups):
            of_group = nonempty[nonempty // self.max_micro == group]
            for micro, q in enumerate(of_group.tolist()):
                ids = np.flatnonzero(q_K == q)
                builder.place(ids, group, micro, slot_K[ids])
        return builder.build()


@dataclass(frozen=True, slots=True)
class _ChainTimer:
    """Times of the placements of all chains at once."""

    encoding: SlotEncoding
    attention_KT: Floats
    tokens_KT: Ints
    latency_T: Floats
    token_T: Floats

    @classmethod
    def of(cls, encoding: SlotEncoding) -> _ChainTimer:
        slots, cost = encoding.layout.slots, encoding.cost
        links = [cost.link(width) for width in slots.width_T.tolist()]
        return cls(
            encoding,
            cost.attention(encoding.length_K[:, None], slots.width_T),
            shard_tokens(encoding.length_K[:, None], slots.width_T),
            np.array([link.latency_s for link in links]),
            np.array([link.token_s for link in links]),
        )

    def seconds(self, cell_PK: Ints) -> tuple[Floats, Floats]:
        """Return the time of every rank, (P, Q, N), and inf for overfull chains, else 0, (P,)."""
        encoding, cost = self.encoding, self.encoding.cost
        n_q, n_slots = encoding.shape
        n_chains, n_sequences = cell_PK.shape
        covers_TN, n_ranks = encoding.layout.slots.covers_TN, encoding.layout.context
        n_cells = n_chains * n_q * n_slots
        cell = (cell_PK + np.arange(n_chains)[:, None] * (n_q * n_slots)).ravel()
        table_index = (cell_PK % n_slots + np.arange(n_sequences) * n_slots).ravel()

        def per_cell(value: Floats | Ints) -> Floats:
            sums: Floats = np.bincount(cell, value, n_cells).astype(np.float64)
            return sums.reshape(n_chains, n_q, n_slots)

        attention = per_cell(self.attention_KT.ravel()[table_index])
        tokens = per_cell(self.tokens_KT.ravel()[table_index]) @ covers_TN
        volume = per_cell(np.tile(encoding.length_K, n_chains))
        slot_gather = volume * self.token_T + (volume > 0) * self.latency_T
        # The first N slots are the single ranks.
        gather = slot_gather[..., n_ranks:] @ covers_TN[n_ranks:]
        sharded = attention[..., n_ranks:] @ covers_TN[n_ranks:]
        busy = np.maximum(gather, attention[..., :n_ranks]) + sharded + cost.linear(tokens)
        overfull_P = (tokens > cost.memory_tokens).any(axis=(1, 2))
        return busy, np.where(overfull_P, np.inf, 0.0)


def anneal(encoding: SlotEncoding, starts: Sequence[Placement], seed: int = 0) -> Placement:
    """Return the fastest placement of all chains, never slower than the fastest start.

    Args:
        encoding: The batch.
        starts: Placements of at most `encoding.max_micro` micro-batches per group; chain i begins
            at start i modulo S.
        seed: Seed of the random numbers.
    """
    rng = np.random.default_rng(seed)
    timer = _ChainTimer.of(encoding)
    start_SK = np.array([encoding.encode(start) for start in starts])
    cell_PK = start_SK[np.arange(_CHAINS) % len(starts)]
    busy_PQN, penalty_P = timer.seconds(cell_PK)
    second_P, energy_P = _energies(encoding, busy_PQN, penalty_P)
    # Chains move by energy; the best is remembered by seconds.
    best_second_P, best_cell_PK = second_P.copy(), cell_PK.copy()
    n_steps = min(_MAX_STEPS, _STEPS_PER_SEQUENCE * encoding.length_K.size)
    schedule = np.geomspace(_START_TEMPERATURE, _END_TEMPERATURE, n_steps) * float(second_P.min())
    for temperature in schedule.tolist():
        new_cell_PK = _propose(encoding, cell_PK, busy_PQN, rng)
        new_busy_PQN, penalty_P = timer.seconds(new_cell_PK)
        new_second_P, new_energy_P = _energies(encoding, new_busy_PQN, penalty_P)
        # Metropolis: accept with probability exp(-dE / t), that is dE < t times an exponential
        # random number. inf - energy is never below it, so overfull plans are rejected.
        accepted = new_energy_P - energy_P < temperature * rng.exponential(size=_CHAINS)
        cell_PK[accepted], busy_PQN[accepted] = new_cell_PK[accepted], new_busy_PQN[accepted]
        energy_P[accepted] = new_energy_P[accepted]
        better = new_second_P < best_second_P
        best_second_P[better], best_cell_PK[better] = new_second_P[better], new_cell_PK[better]
    return encoding.decode(best_cell_PK[int(best_second_P.argmin())])


def _energies(encoding: SlotEncoding, busy_PQN: Floats, penalty_P: Floats) -> tuple[Floats, Floats]:
    """Return the step time of every chain and its energy, which counts all ranks, (P,) each."""
    shape = (busy_PQN.shape[0], encoding.layout.groups, encoding.max_micro)
    group_s = busy_PQN.max(axis=2).reshape(shape).sum(axis=2)
    mean_s = busy_PQN.mean(axis=(1, 2)) * encoding.max_micro
    second_P = group_s.max(axis=1) + penalty_P
    return second_P, second_P + _MEAN_WEIGHT * (group_s.mean(axis=1) + mean_s)


def _propose(
    encoding: SlotEncoding, cell_PK: Ints, busy_PQN: Floats, rng: np.random.Generator
) -> Ints:
    """Return the cells of each chain with one sequence moved or two swapped, (P, K)."""
    n_chains, n_sequences = cell_PK.shape
    n_q, n_slots = encoding.shape
    slots, chains = encoding.layout.slots, np.arange(n_chains)
    q_PK, slot_PK = np.divmod(cell_PK, n_slots)
    # Prefer sequences on the slowest rank of the slowest group: others cannot shorten the step.
    second_PGM = busy_PQN.max(axis=2).reshape(n_chains, -1, encoding.max_micro)
    group_P = second_PGM.sum(axis=2).argmax(axis=1)
    # Any of its micro-batches, weighted by time: they add up in a group.
    weight_PM = second_PGM[chains, group_P] * rng.random((n_chains, encoding.max_micro))
    slowest_P = group_P * encoding.max_micro + weight_PM.argmax(axis=1)
    rank_P = busy_PQN[chains, slowest_P].argmax(axis=1)
    preferred_PK = (q_PK == slowest_P[:, None]) & (slots.covers_TN[slot_PK, rank_P[:, None]] > 0)
    preferred_PK &= (rng.random(n_chains) < _SLOWEST_PROBABILITY)[:, None]
    # argmax of uniform numbers is a uniform choice; + 1 puts the preferred before all others.
    k_P = (rng.random((n_chains, n_sequences)) + preferred_PK).argmax(axis=1)
    partner_P = rng.integers(n_sequences, size=n_chains)
    swap_P = rng.random(n_chains) < _SWAP_PROBABILITY
    # Uniform over widths first: over slots, single ranks would be chosen nearly always.
    level_P = rng.integers(len(encoding.layout.widths), size=n_chains)
    width_P = np.array(encoding.layout.widths)[level_P]
    index_P = (rng.random(n_chains) * (encoding.layout.context // width_P)).astype(np.int64)
    slot_P = np.searchsorted(slots.width_T, width_P) + index_P
    new_cell_P = rng.integers(n_q, size=n_chains) * n_slots + slot_P
    new_cell_PK = cell_PK.copy()
    new_cell_PK[chains, k_P] = np.where(swap_P, cell_PK[chains, partner_P], new_cell_P)
    swapped = chains[swap_P]
    new_cell_PK[swapped, partner_P[swapped]] = cell_PK[swapped, k_P[swapped]]
    return new_cell_PK
