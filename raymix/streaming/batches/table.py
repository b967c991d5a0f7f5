"""The blocks a rank holds, looked up for whole arrays of samples at once.

Letters: G blocks of all domains, N samples, M of them on this rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from raymix.streaming.blocks.block_batch import BlockBatch
from raymix.streaming.blocks.sources import BlockSource

Ints = npt.NDArray[np.int64]
_NONE = -1


class BlockTable:
    """Slabs by global block number; fetches what is missing, drops what is not wanted."""

    def __init__(self, source: BlockSource, total: int) -> None:
        """Start empty, for blocks numbered below `total`."""
        self._source = source
        self._slab_G = np.full(total, _NONE, dtype=np.int32)
        self._first_G = np.zeros(total, dtype=np.int64)
        self._slabs: dict[int, BlockBatch] = {}
        self._next = 0

    def __len__(self) -> int:
        """Return how many slabs are held."""
        return len(self._slabs)

    def find(self, number_N: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return slab and first token in it of each block, shapes (N,), fetching if need be.

        Raises:
            CorpusError: If a block is corrupt; it names the file and the block.
        """
        slab_N = self._slab_G[number_N]
        if slab_N.size and slab_N.min() == _NONE:
            self.take_in(self._source.arrived())
            missing = np.unique(number_N[self._slab_G[number_N] == _NONE])
            if missing.size:
                self.take_in(self._source.fetch(missing.tolist()))
            slab_N = self._slab_G[number_N]
        return slab_N, self._first_G[number_N]

    def slab(self, key: int) -> BlockBatch:
        """Return a slab that `find` named."""
        return self._slabs[key]

    def holds(self, numbers: Ints) -> npt.NDArray[np.bool_]:
        """Return whether each block is at hand."""
        return self._slab_G[numbers] != _NONE

    def take_in(self, slabs: Iterable[BlockBatch]) -> None:
        """Hold slabs that have come; blocks held before are now found in the new ones."""
        for slab in slabs:
            self._slabs[self._next] = slab
            self._slab_G[slab.numbers] = self._next
            self._first_G[slab.numbers] = slab.first_K
            self._next += 1

    def keep(self, numbers: Ints) -> None:
        """Drop the slabs that hold none of these blocks."""
        kept = set(self._slab_G[numbers].tolist())
        for key in [key for key in self._slabs if key not in kept]:
            slab = self._slabs.pop(key)
            mine = np.array(slab.numbers)
            mine = mine[self._slab_G[mine] == key]
            self._slab_G[mine] = _NONE
