"""Packed mode: batches of rows of equal length, cut from the blocks."""

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
from raymix.streaming.blocks.geometry import (
    BlockNumbers,
    Ints,
    ReadableShares,
    row_geometry,
    sample_limits,
)
from raymix.streaming.blocks.sources import BlockSource

# Rows planned at once, over all ranks: by then the fixed cost of the numpy calls is negligible.
_MAX_CHUNK_ROWS = 1 << 14
# Steps skipped at once: their counts by domain are held, 80 MB with ten thousand domains.
_MAX_SKIPPED_STEPS = 1 << 10


class PackedBatchBuilder:
    """Batches of rows of `sequence_length` tokens; see `BatchBuilder`."""

    def __init__(
        self,
        corpus: Corpus,
        data: PackedData,
        rank_info: RankInfo,
        *,
        log: MixtureLog,
        source: BlockSource,
    ) -> None:
        """Start at step 0; `load` continues elsewhere."""
        geometries = row_geometry(corpus, data.sequence_length, allow_empty=True)
        self._readable = ReadableShares(corpus, data)
        numbers = BlockNumbers(corpus)
        order = CorpusOrder(geometries, seed=rank_info.seed, window=data.shuffle_blocks)
        self._log = log
        self._rows_per_step = data.rows_per_step
        self._row_tokens = data.sequence_length
        self._columns = rank_rows(self._rows_per_step, rank_info.rank, rank_info.world_size)
        self._first_block_D = numbers.first_D[:-1]
        make_planner = partial(
            PackedPlanner,
            n_domains=len(geometries),
            rows_per_step=self._rows_per_step,
            seed=rank_info.seed,
            log=log,
            limit_D=sample_limits(corpus, data, geometries),
        )
        self._planner = make_planner()
        # A second planner recomputes the states of past steps (checkpoints need them), as the
        # stream's thread may be planning with the first at the same time.
        self._replay_planner = make_planner()
        self._upcoming = UpcomingSamples(order)
        self._table = BlockTable(source, numbers.total)
        self._prefetcher = BlockPrefetcher(
            source,
            self._table,
            self._upcoming,
            total_blocks=numbers.total,
            block_bytes=corpus.manifest.block_tokens * corpus.dtype.itemsize,
            blocks_of=self._blocks_of,
        )
        self._max_steps = max(1, _MAX_CHUNK_ROWS // self._rows_per_step)
        # Version of a log entry and its shares, the last ones used.
        self._cached_shares: tuple[int, Floats] = (-1, np.zeros(0))

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
        rate_D = self._shares(planner.step) * self._rows_per_step
        # The carry is in fixed point, units of 2**-SHARE_BITS rows.
        owed_D = planner.carry_D / float(1 << SHARE_BITS)
        self._prefetcher.update(planner.step, planner.count_D, rate_D, owed_D)
        # Not beyond the reach: the blocks of later steps may not have been requested.
        plan = planner.plan(max(1, min(n_steps, self._max_steps, self._prefetcher.reach)))
        locations, slot_SB = locate_rows(
            plan,
            self._upcoming,
            self._table,
            first_block_D=self._first_block_D,
            row_tokens=self._row_tokens,
        )
        version_first_S = np.unique(plan.version_S, return_index=True)[1]
        steps = (plan.first_step + version_first_S).tolist()
        shares = {self._log.at(step).version: self._shares(step) for step in steps}
        return PackedChunk(plan, slot_SB, self._columns, locations, shares, self._replay_planner)

    def skip(self, n_steps: int) -> int:
        """Advance by at most `n_steps` steps without reading; return by how many.

        Raises:
            CorpusError: If limits leave no rows.
        """
        return self._planner.skip(min(n_steps, _MAX_SKIPPED_STEPS))

    def _shares(self, step: int) -> Floats:
        entry = self._log.at(step)
        if self._cached_shares[0] != entry.version:
            self._readable.check(entry.weights)
            shares_D = np.array(entry.weights)
            # The batches of all steps under this entry share the array.
            shares_D.setflags(write=False)
            self._cached_shares = entry.version, shares_D
        return self._cached_shares[1]

    def _blocks_of(self, domain: int, group_N: Ints, unit_N: Ints) -> tuple[Ints, Ints]:
        # In packed mode a group is a block, and each sample lies in one.
        return group_N + self._first_block_D[domain], np.arange(len(group_N))
