"""Block sources: the interface through which a rank reads blocks, and a source without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from raymix.store import Corpus, Split
from raymix.streaming.blocks.block_batch import BlockBatch, make_block_batch
from raymix.streaming.blocks.geometry import BlockNumbers

# Mapped pages are reclaimed by the kernel, so this bounds the bookkeeping and not the memory.
_LOCAL_BUDGET_BYTES = 1 << 30


class BlockSource(Protocol):
    """Returns batches that contain given blocks, by global block number."""

    budget_bytes: int
    """Bytes of blocks that a rank may prefetch and reference."""

    def prefetch(
        self, step: int, numbers: Sequence[int], steps: Sequence[float], missing: Sequence[int]
    ) -> None:
        """Replace the list of blocks needed next; returns at once.

        Args:
            step: The step read next.
            numbers: Block numbers, the most urgent first.
            steps: Step at which each is needed, about.
            missing: Those of the blocks that the rank does not have; `poll` returns them.
        """
        ...

    def poll(self) -> list[BlockBatch]:
        """Return the prefetched blocks that arrived since the last call, without waiting."""
        ...

    def fetch(self, numbers: Sequence[int]) -> list[BlockBatch]:
        """Return batches that contain these blocks, waiting for them.

        Raises:
            CorpusError: If a block is corrupt; it names the file and the block.
            ClusterError: If they do not arrive within a time limit.
        """
        ...


class LocalSource:
    """Reads blocks in this process on demand; local files are memory-mapped."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        row_tokens: int = 1,
        split: Split = "train",
        budget_bytes: int = _LOCAL_BUDGET_BYTES,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._corpus = corpus
        self._split = split
        self._numbers = BlockNumbers(corpus, split)
        self._row_tokens = row_tokens

    def prefetch(
        self, step: int, numbers: Sequence[int], steps: Sequence[float], missing: Sequence[int]
    ) -> None:
        """Do nothing: `fetch` reads."""

    def poll(self) -> list[BlockBatch]:
        """Return nothing: `fetch` reads."""
        return []

    def fetch(self, numbers: Sequence[int]) -> list[BlockBatch]:
        """Return one batch per block.

        Raises:
            CorpusError: If a block is corrupt; it names the file and the block.
        """
        # A batch per block stays a view of the mapped file; joining blocks would copy them.
        batches = []
        for number in numbers:
            domain, index = self._numbers.locate(number)
            block = self._corpus.read_block(domain, self._split, index)
            batches.append(make_block_batch([number], [block], self._row_tokens))
        return batches
