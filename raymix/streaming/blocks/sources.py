"""Where a rank gets blocks from: `BlockSource`, and the one without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from raymix.store import Corpus, Split
from raymix.streaming.blocks.block_batch import BlockBatch, make_block_batch
from raymix.streaming.blocks.geometry import BlockNumbers

_LOCAL_BUDGET = 1 << 30


class BlockSource(Protocol):
    """Gives slabs that hold the blocks asked for, by global number."""

    budget_bytes: int
    """What a rank may ask for in advance, and hold."""

    def want(
        self, step: int, numbers: Sequence[int], steps: Sequence[float], missing: Sequence[int]
    ) -> None:
        """Say what is needed next, in place of what was said before; returns at once.

        Args:
            step: The step read next.
            numbers: Blocks, the most urgent first.
            steps: Step at which each is needed, about.
            missing: Those of the blocks that are not at hand; they come by `arrived`.
        """
        ...

    def arrived(self) -> list[BlockBatch]:
        """Return what has come of the wanted blocks since the last call, without waiting."""
        ...

    def fetch(self, numbers: Sequence[int]) -> list[BlockBatch]:
        """Return slabs that hold these blocks, waiting for them.

        Raises:
            CorpusError: If one is corrupt; it names the file and the block.
            ClusterError: If they do not come within a time limit.
        """
        ...


class LocalSource:
    """Reads blocks in this process, when they are asked for; local files are mapped."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        row_tokens: int = 1,
        split: Split = "train",
        budget_bytes: int = _LOCAL_BUDGET,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._corpus = corpus
        self._split = split
        self._numbers = BlockNumbers(corpus, split)
        self._row_tokens = row_tokens

    def want(
        self, step: int, numbers: Sequence[int], steps: Sequence[float], missing: Sequence[int]
    ) -> None:
        """Do nothing: reading takes place in `fetch`."""

    def arrived(self) -> list[BlockBatch]:
        """Return nothing: reading takes place in `fetch`."""
        return []

    def fetch(self, numbers: Sequence[int]) -> list[BlockBatch]:
        """Return one slab per block.

        Raises:
            CorpusError: If one is corrupt; it names the file and the block.
        """
        slabs = []
        for number in numbers:
            domain, block = self._numbers.find(number)
            read = self._corpus.read_block(domain, self._split, block)
            slabs.append(make_block_batch([number], [read], self._row_tokens))
        return slabs
