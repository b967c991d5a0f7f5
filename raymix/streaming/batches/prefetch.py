"""Says beforehand which blocks the next steps will need, as far as they fit the budget.

How far a domain is looked ahead is in proportion to its weight: a domain of weight 0.5 has its
next blocks fetched, one of 0.001 the block of its next sample or two. So rare domains neither
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
"""(domain, group_N, place in group_N) -> blocks and, of each, the number of its sample."""

_MOST_SAMPLES = 1 << 16
_MOST_STEPS = 1 << 14
# Shares may grow by this factor before what was looked up no longer serves.
_GROWTH = 1.5
# Ranks drift apart and bundles hold blocks used already: part of the budget is left to that.
_FILL = 0.75
# A domain may run ahead of its share by a sample, or catch up on one.
_SPARE = 2


class BlockPrefetcher:
    """Keeps a source informed of what comes next, and a table free of what does not."""

    def __init__(
        self,
        source: BlockSource,
        table: BlockTable,
        ahead: UpcomingSamples,
        *,
        total_blocks: int,
        block_bytes: int,
        blocks_of: BlocksOf,
    ) -> None:
        """Start without knowledge; `look` does the work.

        Args:
            source: Gets the blocks.
            table: Holds them.
            ahead: Locates samples.
            total_blocks: Blocks of all domains.
            block_bytes: Bytes of a whole block.
            blocks_of: Tells which blocks samples lie in.
        """
        self.reach = _MOST_STEPS
        self._source = source
        self._table = table
        self._ahead = ahead
        self._blocks_of = blocks_of
        self._total = total_blocks
        self._room = max(1, source.budget_bytes // max(1, block_bytes))
        self._all = False
        self._again = 0
        self._seen_D: Floats | None = None

    def look(self, step: int, count_D: Ints, rate_D: Floats, owed_D: Floats) -> None:
        """Tell the source what the steps from `step` on need, if that is due.

        Args:
            step: The next step to be planned.
            count_D: Samples of each domain before it, shape (D,).
            rate_D: Samples of each domain per step, about, shape (D,).
            owed_D: By how many samples each domain is behind its share, shape (D,).
        """
        self._table.take_in(self._source.arrived())
        if self._all or not self._due(step, rate_D):
            return
        samples = max(1.0, float(rate_D.sum()))
        reach = int(min(max(2 * self.reach, 2), _MOST_STEPS, max(1, _MOST_SAMPLES // samples)))
        while True:
            numbers, steps = self._needs(step, count_D, rate_D, owed_D, reach)
            if len(numbers) <= _FILL * self._room or reach == 1:
                break
            reach //= 2
        self.reach, self._seen_D = reach, rate_D
        self._again = step + max(1, reach // 2)
        if self._total <= self._room:
            self._all = True
            rest = np.setdiff1d(np.arange(self._total), numbers)
            numbers = np.concatenate([numbers, rest])
            steps = np.concatenate([steps, np.full(rest.size, np.inf)])
        else:
            numbers, steps = numbers[: self._room], steps[: self._room]
            self._table.keep(numbers)
        missing = numbers[~self._table.holds(numbers)]
        self._source.want(step, numbers.tolist(), steps.tolist(), missing.tolist())

    def _due(self, step: int, rate_D: Floats) -> bool:
        if self._seen_D is None or step >= self._again:
            return True
        return bool((rate_D > _GROWTH * self._seen_D).any())

    def _needs(
        self, step: int, count_D: Ints, rate_D: Floats, owed_D: Floats, reach: int
    ) -> tuple[Ints, Floats]:
        """Return the blocks needed within `reach` steps and when, the first needed first."""
        used = np.flatnonzero(rate_D)
        rows = np.ceil(rate_D[used] * reach).astype(np.int64) + _SPARE
        before = count_D[used]
        spans = dict(
            zip(
                used.tolist(),
                zip(before.tolist(), (before + rows).tolist(), strict=True),
                strict=True,
            )
        )
        numbers: list[Ints] = []
        steps: list[Floats] = []
        for domain, located in zip(spans, self._ahead.locate(spans), strict=True):
            number_N, sample_N = self._blocks_of(domain, *located)
            first, at = np.unique(number_N, return_index=True)
            numbers.append(first)
            # A row is due when half of it is owed, about.
            due = np.maximum(sample_N[at] + 0.5 - owed_D[domain], 0)
            steps.append(step + due / rate_D[domain])
        all_numbers, all_steps = np.concatenate(numbers), np.concatenate(steps)
        order = np.argsort(all_steps, kind="stable")
        return all_numbers[order], all_steps[order]
