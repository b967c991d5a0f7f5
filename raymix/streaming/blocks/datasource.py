"""Ray Data source of block bundles, read in short executions.

One execution reads a list of bundles, one read task and one output object per bundle, and ends
when they are read: a long-lived execution under backpressure keeps a core busy polling.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from raymix._utils.compat.ray_data import block_references
from raymix.errors import RaymixError
from raymix.store import Block, Corpus, Split
from raymix.streaming.blocks.block_batch import make_block_batch, to_table
from raymix.streaming.blocks.geometry import BlockNumbers

if TYPE_CHECKING:
    from ray.data.context import DataContext


class BundleDatasource(Datasource):
    """Bundles of blocks of one split, one read task each."""

    def __init__(
        self, corpus: Corpus, split: Split, row_tokens: int, bundles: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        self._corpus = corpus
        self._split = split
        self._row_tokens = row_tokens
        self._bundles = bundles

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the number of read tasks is fixed, whatever the size."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Return one task per bundle, whatever `parallelism` is."""
        # Tasks carry the path and not the corpus: its index may be megabytes, per task.
        source = self._corpus.path, self._corpus.fingerprint, self._split, self._row_tokens
        return [
            ReadTask(
                partial(_read_bundle, *source, list(bundle)),
                BlockMetadata(
                    num_rows=len(bundle), size_bytes=None, exec_stats=None, input_files=None
                ),
            )
            for bundle in self._bundles
        ]


def quiet_data_context() -> None:
    """Configure Ray Data in this process: no output, one object per read task, in order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # `read_bundles` pairs bundles and references by position.
    context.execution_options.preserve_order = True
    # None: an output object is never split, so that a bundle is one reference.
    context.target_max_block_size = None
    # Ray warns of blocking calls in async actors; the plane makes them on a thread of its own.
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def read_bundles(
    corpus: Corpus,
    split: Split,
    row_tokens: int,
    bundles: Sequence[Sequence[int]],
    *,
    concurrency: int,
) -> Iterator[tuple[Sequence[int], Any]]:
    """Yield each bundle with the reference of its table, in order, as they are read.

    Args:
        corpus: The corpus.
        split: The split.
        row_tokens: Blocks are cut to whole rows of this many tokens.
        bundles: Global block numbers.
        concurrency: Concurrent tasks.
    """
    dataset = ray.data.read_datasource(
        BundleDatasource(corpus, split, row_tokens, bundles),
        # Trainers may hold all CPUs: a task that reserves any would wait forever.
        num_cpus=0,
        concurrency=min(concurrency, len(bundles)),
        override_num_blocks=len(bundles),
    )
    yield from zip(bundles, block_references(dataset), strict=True)


# Ray reuses worker processes: opening the corpus once per process and not per task saves reading
# its index. The fingerprint is part of the key, as a corpus may be prepared anew at the same path.
@lru_cache(maxsize=4)
def _open(path: str, fingerprint: str, split: Split) -> tuple[Corpus, BlockNumbers]:
    corpus = Corpus.open(path)
    return corpus, BlockNumbers(corpus, split)


def _read_bundle(
    path: str, fingerprint: str, split: Split, row_tokens: int, numbers: list[int]
) -> Iterable[pa.Table]:
    corpus, block_numbers = _open(path, fingerprint, split)
    blocks: list[Block] = []
    errors: list[str | None] = []
    empty = Block(np.empty(0, dtype=corpus.dtype), np.empty(0, dtype=np.uint32))
    for number in numbers:
        domain, index = block_numbers.locate(number)
        # A corrupt block must fail neither the others of its bundle, nor before a rank needs it:
        # its error travels in the table.
        try:
            blocks.append(corpus.read_block(domain, split, index))
            errors.append(None)
        except RaymixError as error:
            blocks.append(empty)
            errors.append(str(error))
    yield to_table(make_block_batch(numbers, blocks, row_tokens), errors)
