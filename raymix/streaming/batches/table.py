"""Table of the blocks in a rank's memory, looked up for arrays of samples.

Letters: G blocks of all domains, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from raymix.streaming.blocks.block_batch import BlockBatch
from raymix.streaming.blocks.sources import BlockSource

Ints = npt.NDArray[np.int64]
_ABSENT = -1


class BlockTable:
    """Block batches by global block number; fetches missing blocks, evicts those not needed."""

    def __init__(self, source: BlockSource, total: int) -> None:
        """Start empty, for blocks numbered below `total`."""
        self._source = source
        # Arrays over all blocks and not a dict: thousands of samples are looked up in one call.
        self._batch_G = np.full(total, _ABSENT, dtype=np.int32)
        self._first_G = np.zeros(total, dtype=np.int64)
        self._batches: dict[int, BlockBatch] = {}
        self._next_key = 0

    def __len__(self) -> int:
        """Return the number of batches in memory."""
        return len(self._batches)

    def find(self, number_N: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return each block's batch key and first token in that batch, shapes (N,).

        Missing blocks are fetched.

        Raises:
            CorpusError: If a block is corrupt; it names the file and the block.
        """
        key_N = self._batch_G[number_N]
        if key_N.size and key_N.min() == _ABSENT:
            # First what was prefetched: it may have arrived by now, and costs no waiting.
            self.register(self._source.poll())
            missing = np.unique(number_N[self._batch_G[number_N] == _ABSENT])
            if missing.size:
                self.register(self._source.fetch(missing.tolist()))
            key_N = self._batch_G[number_N]
        return key_N, self._first_G[number_N]

    def batch(self, key: int) -> BlockBatch:
        """Return the batch of a key that `find` returned."""
        return self._batches[key]

    def contains(self, numbers: Ints) -> npt.NDArray[np.bool_]:
        """Return whether each block is in memory."""
        return self._batch_G[numbers] != _ABSENT

    def register(self, batches: Iterable[BlockBatch]) -> None:
        """Register fetched blocks; blocks that were present are found in the new batches."""
        for batch in batches:
            self._batches[self._next_key] = batch
            self._batch_G[batch.numbers] = self._next_key
            self._first_G[batch.numbers] = batch.first_K
            self._next_key += 1

    def retain(self, numbers: Ints) -> None:
        """Evict the batches that contain none of these blocks."""
        needed = set(self._batch_G[numbers].tolist())
        for key in [key for key in self._batches if key not in needed]:
            batch = self._batches.pop(key)
            blocks = np.array(batch.numbers)
            # A block that was fetched again is in a newer batch, which may stay.
            blocks = blocks[self._batch_G[blocks] == key]
            self._batch_G[blocks] = _ABSENT
