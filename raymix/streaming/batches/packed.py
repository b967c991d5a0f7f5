"""Packed mode: rows of equal length, cut from the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from raymix.recipe.training import PackedData
from raymix.sampling import SHARE_BITS, CorpusOrder, MixtureLog, PackedPlanner
from raymix.store import Corpus
from raymix.streaming.batches.builder import RankInfo
from raymix.streaming.batches.packed_rows import PackedChunk, locate_rows, rank_rows
from raymix.streaming.batches.prefetch import BlockPrefetcher, Floats
from raymix.streaming.batches.table import BlockTable
from raymix.streaming.batches.upcoming_samples import UpcomingSamples
from raymix.streaming.blocks.geometry import BlockNumbers, Ints, epoch_limits, row_geometry
from raymix.streaming.blocks.sources import BlockSource

# Rows planned at once, over all ranks: more save little.
_MOST_ROWS = 1 << 14


class PackedBatchBuilder:
    """Rows of `sequence_length` tokens."""

    def __init__(
        self,
        corpus: Corpus,
        data: PackedData,
        place: RankInfo,
        *,
        log: MixtureLog,
        source: BlockSource,
    ) -> None:
        """Start at step 0; `load` goes elsewhere."""
        geometries = row_geometry(corpus, data.sequence_length)
        numbers = BlockNumbers(corpus)
        order = CorpusOrder(geometries, seed=place.seed, window=data.shuffle_blocks)
        self._log = log
        self._rows = data.rows_per_step
        self._row_tokens = data.sequence_length
        self._columns = rank_rows(self._rows, place.rank, place.world_size)
        self._first_block_D = numbers.first_D[:-1]
        plan = partial(
            PackedPlanner,
            n_domains=len(geometries),
            rows_per_step=self._rows,
            seed=place.seed,
            log=log,
            limit_D=epoch_limits(geometries, data.max_epochs),
        )
        self._planner = plan()
        # States of steps already planned are worked out apart, while planning goes on.
        self._again = plan()
        self._ahead = UpcomingSamples(order)
        self._table = BlockTable(source, numbers.total)
        self._lookahead = BlockPrefetcher(
            source,
            self._table,
            self._ahead,
            total_blocks=numbers.total,
            block_bytes=corpus.manifest.block_tokens * corpus.dtype.itemsize,
            blocks_of=self._blocks_of,
        )
        self._most_steps = max(1, _MOST_ROWS // self._rows)
        self._shares: tuple[int, Floats] = (-1, np.zeros(0))

    def load(self, state: Mapping[str, Any]) -> int:
        """Continue from a state and return its step."""
        self._planner.load_state_dict(state)
        return self._planner.step

    def state_dict(self) -> dict[str, Any]:
        """Return the planner's state before the next step to be planned."""
        return self._planner.state_dict()

    def plan(self, n_steps: int) -> PackedChunk:
        """Return the next steps, at least one and at most `n_steps`.

        Raises:
            CorpusError: If a block is corrupt, or limits leave no rows.
        """
        planner = self._planner
        rate_D = self._shares_of(planner.step) * self._rows
        owed_D = planner.carry_D / float(1 << SHARE_BITS)
        self._lookahead.look(planner.step, planner.count_D, rate_D, owed_D)
        plan = planner.plan(max(1, min(n_steps, self._most_steps, self._lookahead.reach)))
        found, slot_SB = locate_rows(
            plan,
            self._ahead,
            self._table,
            first_block_D=self._first_block_D,
            row_tokens=self._row_tokens,
        )
        at_S = np.unique(plan.version_S, return_index=True)[1]
        steps = (plan.first_step + at_S).tolist()
        shares = {self._log.at(step).version: self._shares_of(step) for step in steps}
        return PackedChunk(plan, slot_SB, self._columns, found, shares, self._again)

    def _shares_of(self, step: int) -> Floats:
        entry = self._log.at(step)
        if self._shares[0] != entry.version:
            shares_D = np.array(entry.weights)
            shares_D.setflags(write=False)
            self._shares = entry.version, shares_D
        return self._shares[1]

    def _blocks_of(self, domain: int, group_N: Ints, unit_N: Ints) -> tuple[Ints, Ints]:
        return group_N + self._first_block_D[domain], np.arange(len(group_N))
