"""Block prefetching: upcoming blocks requested in the order of need, as far as the budget allows.

The lookahead of a domain is proportional to its share: of a domain with share 0.5 the next blocks
are prefetched, of one with 0.001 the block of its next sample or two. So rare domains neither
starve nor fill the store. Letters: D domains, N samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from raymix.streaming.batches.table import BlockTable
from raymix.streaming.batches.upcoming_samples import UpcomingSamples
from raymix.streaming.blocks.sources import BlockSource

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BlocksOf = Callable[[int, Ints, Ints], tuple[Ints, Ints]]
"""(domain, group_N, unit_N) -> block numbers and, for each, the index of its sample."""

# Bounds on the samples located per update, whatever the budget: locating costs time, too.
_MAX_SAMPLES = 1 << 16
_MAX_STEPS = 1 << 14
# Shares may grow by this factor before the lookahead is too short for them.
_MAX_SHARE_GROWTH = 1.5
# Ranks drift apart, and bundles contain blocks already read: the rest of the budget is for these.
_BUDGET_SHARE = 0.75
# By error diffusion a domain may run ahead of its share by a sample, or be one behind.
_SPARE_SAMPLES = 2


class BlockPrefetcher:
    """Prefetches upcoming blocks from a source, and evicts the others from a table.

    Attributes:
        reach: Steps for which blocks were requested at the last update.
    """

    def __init__(
        self,
        source: BlockSource,
        table: BlockTable,
        upcoming: UpcomingSamples,
        *,
        total_blocks: int,
        block_bytes: int,
        blocks_of: BlocksOf,
    ) -> None:
        """Start without requests; `update` makes them.

        Args:
            source: Reads the blocks.
            table: The blocks in memory.
            upcoming: Locates samples.
            total_blocks: Blocks of all domains.
            block_bytes: Bytes of a full block.
            blocks_of: Returns the blocks of samples.
        """
        self.reach = _MAX_STEPS
        self._source = source
        self._table = table
        self._upcoming = upcoming
        self._blocks_of = blocks_of
        self._total_blocks = total_blocks
        self._capacity = max(1, source.budget_bytes // max(1, block_bytes))
        self._all_requested = False
        self._next_update = 0
        self._rate_D: Floats | None = None

    def update(self, step: int, count_D: Ints, rate_D: Floats, owed_D: Floats) -> None:
        """Request the blocks of the steps from `step` on, if an update is due.

        Args:
            step: The next step to be planned.
            count_D: Samples of each domain before it, shape (D,).
            rate_D: Samples of each domain per step, about, shape (D,).
            owed_D: Samples by which each domain is behind its share, shape (D,).
        """
        self._table.register(self._source.poll())
        if self._all_requested or not self._is_due(step, rate_D):
            return
        samples = max(1.0, float(rate_D.sum()))
        # Doubled and then halved until it fits: the last reach is near the right one, as shares
        # change little between updates.
        reach = int(min(max(2 * self.reach, 2), _MAX_STEPS, max(1, _MAX_SAMPLES // samples)))
        while True:
            numbers, steps = self._needs(step, count_D, rate_D, owed_D, reach)
            if len(numbers) <= _BUDGET_SHARE * self._capacity or reach == 1:
                break
            reach //= 2
        self.reach, self._rate_D = reach, rate_D
        self._next_update = step + max(1, reach // 2)
        if self._total_blocks <= self._capacity:
            # The corpus fits: all of it, once, and nothing is evicted.
            self._all_requested = True
            rest = np.setdiff1d(np.arange(self._total_blocks), numbers)
            numbers = np.concatenate([numbers, rest])
            steps = np.concatenate([steps, np.full(rest.size, np.inf)])
        else:
            numbers, steps = numbers[: self._capacity], steps[: self._capacity]
            self._table.retain(numbers)
        missing = numbers[~self._table.contains(numbers)]
        self._source.prefetch(step, numbers.tolist(), steps.tolist(), missing.tolist())

    def _is_due(self, step: int, rate_D: Floats) -> bool:
        # At half the reach, so that blocks are under way while the other half is read.
        if self._rate_D is None or step >= self._next_update:
            return True
        return bool((rate_D > _MAX_SHARE_GROWTH * self._rate_D).any())

    def _needs(
        self, step: int, count_D: Ints, rate_D: Floats, owed_D: Floats, reach: int
    ) -> tuple[Ints, Floats]:
        """Return the blocks needed within `reach` steps and the steps, the most urgent first."""
        domains = np.flatnonzero(rate_D)
        samples = np.ceil(rate_D[domains] * reach).astype(np.int64) + _SPARE_SAMPLES
        first = count_D[domains]
        spans = dict(
            zip(
                domains.tolist(),
                zip(first.tolist(), (first + samples).tolist(), strict=True),
                strict=True,
            )
        )
        numbers: list[Ints] = []
        steps: list[Floats] = []
        for domain, located in zip(spans, self._upcoming.locate(spans), strict=True):
            number_N, sample_N = self._blocks_of(domain, *located)
            # np.unique returns first occurrences: the earliest sample of each block.
            block_numbers, at = np.unique(number_N, return_index=True)
            numbers.append(block_numbers)
            # Error diffusion rounds to nearest, about: sample n is read once the domain is owed
            # n + 1/2 samples.
            due = np.maximum(sample_N[at] + 0.5 - owed_D[domain], 0)
            steps.append(step + due / rate_D[domain])
        all_numbers, all_steps = np.concatenate(numbers), np.concatenate(steps)
        # Stable, so that all ranks send the same order: numpy's default sort orders equal steps
        # differently on CPUs with other vector instructions.
        order = np.argsort(all_steps, kind="stable")
        return all_numbers[order], all_steps[order]
