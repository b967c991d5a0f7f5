"""Planner of packed rows: for each step, which sample of which domain stands in which row.

A plan is a pure function of (seed, mixture log, limits) and of the state {step, carry, count},
which is all that a checkpoint needs. Shapes: S steps, B rows per step, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymix.errors import CorpusError
from raymix.sampling.allocate import Allocator
from raymix.sampling.mixture_log import MixtureLog
from raymix.sampling.order import step_order
from raymix.sampling.planner_state import batch_hash, dump_state, load_state
from raymix.sampling.shares import Ints, fixed_point


@dataclass(frozen=True, slots=True)
class PlanChunk:
    """The plan of consecutive steps."""

    first_step: int
    domain_SB: NDArray[np.int32]
    """Domain of each row."""
    index_SB: Ints
    """How many samples of its domain came before: the n of `DomainOrder.locate`."""
    version_S: Ints
    """Version of the log entry each step follows."""
    counts_SD: Ints
    """Rows of each domain per step."""
    start: Allocator
    """The state before the first step; to be copied, not used."""

    @property
    def n_steps(self) -> int:
        """Return S."""
        return len(self.version_S)

    def batch_hash(self, step: int) -> str:
        """Return the hash of the global batch of `step`."""
        at = step - self.first_step
        return batch_hash(self.domain_SB[at], self.index_SB[at])


class PackedPlanner:
    """Plans steps in order, never past a step whose shares the log may still change.

    Args of the constructor:
        n_domains: D.
        rows_per_step: B, over all workers.
        seed: Keys the order of the rows inside a step.
        log: Read, never written; may grow between calls.
        limit_D: Most rows of each domain over the run, shape (D,).
    """

    def __init__(
        self,
        *,
        n_domains: int,
        rows_per_step: int,
        seed: int,
        log: MixtureLog,
        limit_D: Ints | None = None,
    ) -> None:
        self.step = 0
        self.log = log
        self._rows = rows_per_step
        self._seed = seed
        self._allocator = Allocator(n_domains, limit_D, names=log.domains)
        # The newest entry's shares as integers, so that each entry is converted once.
        self._shares: tuple[tuple[float, ...], Ints] | None = None

    @property
    def count_D(self) -> Ints:
        """Return the rows of each domain in all steps before `step`, shape (D,)."""
        return self._allocator.count_D

    @property
    def carry_D(self) -> Ints:
        """Return rows requested minus rows planned, shape (D,), in units of 2**-40 rows."""
        return self._allocator.carry_D

    def plan(self, n_steps: int) -> PlanChunk:
        """Return the plan of the next `n_steps` steps and advance beyond them.

        Fewer steps come back when the limits leave no rows for more; the next call then raises.

        Raises:
            CorpusError: If the limits leave too few rows for even one step.
        """
        start = self._allocator.copy()
        first_step = self.step
        counts_SD, version_S = self._advance(n_steps)
        domain_SB, index_SB = self._rows_of(first_step, start.count_D, counts_SD)
        return PlanChunk(first_step, domain_SB, index_SB, version_S, counts_SD, start)

    def skip(self, n_steps: int) -> int:
        """Advance beyond the next `n_steps` steps and return how many there were.

        Raises:
            CorpusError: If the limits leave too few rows for even one step.
        """
        return len(self._advance(n_steps)[1])

    def rewind(self, chunk: PlanChunk, step: int) -> None:
        """Go back to `step` inside a chunk planned before, to plan on from there.

        Raises:
            ValueError: If `step` is not in the chunk or right after it.
        """
        if not 0 <= step - chunk.first_step <= chunk.n_steps:
            raise ValueError(f"step {step} is not in the chunk that starts at {chunk.first_step}")
        # Replayed from the start of the chunk: an allocator has no inverse.
        self._allocator = chunk.start.copy()
        self.step = chunk.first_step
        if step > self.step:
            self._advance(step - self.step)

    def state_dict(self) -> dict[str, Any]:
        """Return {step, carry, count} in JSON types: everything that resuming needs."""
        return dump_state(self.step, self._allocator.carry_D, self._allocator.count_D)

    def state_at(self, chunk: PlanChunk, step: int) -> dict[str, Any]:
        """Return what `state_dict` was before `step` of a chunk; the planner stays where it is."""
        here, allocator = self.step, self._allocator
        self.rewind(chunk, step)
        state = self.state_dict()
        self.step, self._allocator = here, allocator
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: If it belongs to another number of domains.
        """
        self.step, carry_D, count_D = load_state(state, self._allocator.count_D.size)
        self._allocator.carry_D, self._allocator.count_D = carry_D, count_D

    def _advance(self, n_steps: int) -> tuple[Ints, Ints]:
        parts: list[Ints] = []
        versions: list[Ints] = []
        end = self.step + n_steps
        while self.step < end:
            entry = self.log.at(self.step)
            until = self.log.until(self.step)
            n_requested = (end if until is None else min(end, until)) - self.step
            q_D = self._fixed(entry.weights)
            try:
                part = self._allocator.allocate_steps(
                    q_D, self._rows, n_requested, first_step=self.step
                )
            except CorpusError:
                # What was planned so far is still to be read; the next call raises.
                if parts:
                    break
                raise
            parts.append(part)
            versions.append(np.full(len(part), entry.version, dtype=np.int64))
            self.step += len(part)
            if len(part) < n_requested:
                break
        if not parts:
            return np.zeros((0, self.count_D.size), np.int64), np.zeros(0, np.int64)
        return np.concatenate(parts), np.concatenate(versions)

    def _fixed(self, weights: tuple[float, ...]) -> Ints:
        # Identity, not equality: comparing 10,000 floats per step would cost more than converting.
        if self._shares is None or self._shares[0] is not weights:
            self._shares = weights, fixed_point(weights)
        return self._shares[1]

    def _rows_of(
        self, first_step: int, count_D: Ints, counts_SD: Ints
    ) -> tuple[NDArray[np.int32], Ints]:
        """Return domain and index of each row, the rows of each step in keyed order."""
        n_steps = len(counts_SD)
        step_used, used = np.nonzero(counts_SD)
        rows = counts_SD[step_used, used]
        first_SD = np.cumsum(counts_SD, axis=0) - counts_SD + count_D
        first_row = np.cumsum(rows) - rows
        domain = np.repeat(used.astype(np.int32), rows)
        index = np.repeat(first_SD[step_used, used] - first_row, rows)
        # Samples of a domain are numbered through the whole run, across steps.
        index += np.arange(index.size)
        order_SB = step_order(self._seed, first_step, n_steps, self._rows)
        order_SB += self._rows * np.arange(n_steps)[:, None]
        return domain[order_SB], index[order_SB]
