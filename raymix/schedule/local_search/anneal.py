"""Small batches again, all at once: many chains of simulated annealing side by side.

Moves in one micro-batch and trades between two leave plans in which several sequences would have
to change places together. A chain changes one place, or swaps two, and at times accepts a
slower plan; the fastest plan that any chain met is returned. Chains differ by their start and by
what they draw, all from one seed, so equal batches have equal plans.

Legend: K sequences, longest first; P chains; Q micro-batches of all groups; T slots, N ranks of a
group, W widths; see `seating`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymix.schedule.cost.model import CostModel, shards
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import Draft
from raymix.schedule.layout import Floats, Ints, Layout

_CHAINS = 64
# Steps of a chain per sequence, and at most.
_EACH, _STEPS = 40, 250
# How much slower a change may be, as a part of the time, at the first step and at the last.
_HOT, _COLD = 0.1, 0.002
# Ranks that do not wait for the slowest still count for this part: else most changes would seem
# to change nothing.
_MEAN = 0.3
_SWAPS, _SLOWEST = 0.4, 0.7


@dataclass(frozen=True, slots=True)
class SlotCosts:
    """The places of a batch's sequences and what they cost there."""

    length_K: Ints
    layout: Layout
    cost: CostModel
    micro: int
    """Micro-batches of a group, at most."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of micro-batches and of slots, Q and T."""
        return self.layout.groups * self.micro, self.layout.slots.width_T.size

    def place(self, placed: Placement) -> Ints:
        """Return the places of a placement, (K,): numbers of slots, micro-batch by micro-batch."""
        layout, slots = self.layout, self.layout.slots
        group_K, rank_K = np.divmod(placed.first_K, layout.context)
        # Slots of one width follow each other in the order of their first ranks.
        slot_K = np.searchsorted(slots.width_T, placed.width_K) + rank_K // placed.width_K
        return (group_K * self.micro + placed.micro_K) * slots.width_T.size + slot_K

    def placement(self, place_K: Ints) -> Placement:
        """Return the placement that places stand for, without empty micro-batches between."""
        draft = Draft(place_K.size, self.layout)
        q_K, slot_K = np.divmod(place_K, self.shape[1])
        used = np.unique(q_K)
        for group in range(self.layout.groups):
            for micro, q in enumerate(used[used // self.micro == group].tolist()):
                ids = np.flatnonzero(q_K == q)
                draft.seat(ids, group, micro, slot_K[ids])
        return draft.done()


@dataclass(frozen=True, slots=True)
class _Judge:
    """Times of many placements of one batch."""

    board: SlotCosts
    attention_KT: Floats
    share_KT: Ints
    latency_T: Floats
    token_T: Floats

    @classmethod
    def of(cls, board: SlotCosts) -> _Judge:
        slots, cost = board.layout.slots, board.cost
        links = [cost.link(width) for width in slots.width_T.tolist()]
        return cls(
            board,
            cost.attention(board.length_K[:, None], slots.width_T),
            shards(board.length_K[:, None], slots.width_T),
            np.array([link.latency_s for link in links]),
            np.array([link.token_s for link in links]),
        )

    def seconds(self, place_PK: Ints) -> tuple[Floats, Floats]:
        """Return the times of every rank, (P, Q, N), and which placements fit, inf if not, (P,)."""
        board, cost = self.board, self.board.cost
        n_q, n_slots = board.shape
        n_chains, n_k = place_PK.shape
        covers_TN, n_ranks = board.layout.slots.covers_TN, board.layout.context
        cells = n_chains * n_q * n_slots
        cell = (place_PK + np.arange(n_chains)[:, None] * (n_q * n_slots)).ravel()
        flat = (place_PK % n_slots + np.arange(n_k) * n_slots).ravel()

        def sums(value: Floats | Ints) -> Floats:
            found: Floats = np.bincount(cell, value, cells).astype(np.float64)
            return found.reshape(n_chains, n_q, n_slots)

        attention = sums(self.attention_KT.ravel()[flat])
        tokens = sums(self.share_KT.ravel()[flat]) @ covers_TN
        volume = sums(np.tile(board.length_K, n_chains))
        travel = volume * self.token_T + (volume > 0) * self.latency_T
        gather = travel[..., n_ranks:] @ covers_TN[n_ranks:]
        shared = attention[..., n_ranks:] @ covers_TN[n_ranks:]
        busy = np.maximum(gather, attention[..., :n_ranks]) + shared + cost.linear(tokens)
        full_P = (tokens > cost.memory_tokens).any(axis=(1, 2))
        return busy, np.where(full_P, np.inf, 0.0)


def anneal(board: SlotCosts, starts: Sequence[Placement], seed: int = 0) -> Placement:
    """Return the fastest placement met, or the fastest of the starts.

    Args:
        board: The batch.
        starts: Placements of no more than `board.micro` micro-batches; chains begin at them by
            turns.
        seed: Of what the chains draw.
    """
    rng = np.random.default_rng(seed)
    judge = _Judge.of(board)
    begin = np.array([board.place(start) for start in starts])
    place_PK = begin[np.arange(_CHAINS) % len(starts)]
    busy_PQN, lost_P = judge.seconds(place_PK)
    true_P, felt_P = _times(board, busy_PQN, lost_P)
    best_P, found_PK = true_P.copy(), place_PK.copy()
    steps = min(_STEPS, _EACH * board.length_K.size)
    heat = np.geomspace(_HOT, _COLD, steps) * float(true_P.min())
    for warm in heat.tolist():
        tried_PK = _changed(board, place_PK, busy_PQN, rng)
        busy, lost_P = judge.seconds(tried_PK)
        true, felt = _times(board, busy, lost_P)
        accepted = felt - felt_P < warm * rng.exponential(size=_CHAINS)
        place_PK[accepted], busy_PQN[accepted] = tried_PK[accepted], busy[accepted]
        felt_P[accepted] = felt[accepted]
        better = true < best_P
        best_P[better], found_PK[better] = true[better], tried_PK[better]
    return board.placement(found_PK[int(best_P.argmin())])


def _times(board: SlotCosts, busy_PQN: Floats, lost_P: Floats) -> tuple[Floats, Floats]:
    """Return the time of every placement, and that time with all ranks counting a little."""
    by_group = (busy_PQN.shape[0], board.layout.groups, board.micro)
    slowest = busy_PQN.max(axis=2).reshape(by_group).sum(axis=2)
    mean = busy_PQN.mean(axis=(1, 2)) * board.micro
    true_P = slowest.max(axis=1) + lost_P
    return true_P, true_P + _MEAN * (slowest.mean(axis=1) + mean)


def _changed(board: SlotCosts, place_PK: Ints, busy_PQN: Floats, rng: np.random.Generator) -> Ints:
    """Return the placements with one sequence moved, or two swapped, in each."""
    n_chains, n_k = place_PK.shape
    n_q, n_slots = board.shape
    slots, rows = board.layout.slots, np.arange(n_chains)
    q_PK, slot_PK = np.divmod(place_PK, n_slots)
    # Mostly one that the slowest rank of the slowest group works on.
    by_group = busy_PQN.max(axis=2).reshape(n_chains, -1, board.micro)
    group_P = by_group.sum(axis=2).argmax(axis=1)
    micro_P = (by_group[rows, group_P] * rng.random((n_chains, board.micro))).argmax(axis=1)
    slow_P = group_P * board.micro + micro_P
    rank_P = busy_PQN[rows, slow_P].argmax(axis=1)
    on_PK = (q_PK == slow_P[:, None]) & (slots.covers_TN[slot_PK, rank_P[:, None]] > 0)
    on_PK &= (rng.random(n_chains) < _SLOWEST)[:, None]
    k_P = (rng.random((n_chains, n_k)) + on_PK).argmax(axis=1)
    other_P = rng.integers(n_k, size=n_chains)
    swap_P = rng.random(n_chains) < _SWAPS
    # All widths are as likely, however many slots have them.
    level_P = rng.integers(len(board.layout.widths), size=n_chains)
    width_P = np.array(board.layout.widths)[level_P]
    turn_P = (rng.random(n_chains) * (board.layout.context // width_P)).astype(np.int64)
    slot_P = np.searchsorted(slots.width_T, width_P) + turn_P
    fresh_P = rng.integers(n_q, size=n_chains) * n_slots + slot_P
    changed = place_PK.copy()
    changed[rows, k_P] = np.where(swap_P, place_PK[rows, other_P], fresh_P)
    at = rows[swap_P]
    changed[at, other_P[at]] = place_PK[at, k_P[at]]
    return changed
