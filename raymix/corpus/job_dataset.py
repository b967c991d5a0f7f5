"""Jobs as a Ray Data dataset: one read task per bundle of jobs, one row per result.

An own datasource, because the cut of the work is ours: deterministic parts, no listing actors, no
footer readers.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from raymix.corpus.tokenizers.tokenizer import rust_threads
from raymix.errors import RaymixError

_ROW_BYTES = 10_000

Bundle = Sequence[tuple[int, object]]


class _Jobs(Datasource):
    """A dataset whose n-th read task runs the n-th bundle of jobs."""

    def __init__(self, function: Callable[[Any], Any], bundles: Sequence[Bundle]) -> None:
        super().__init__()
        self._function = function
        self._bundles = bundles

    def get_name(self) -> str:
        return self._function.__name__

    def estimate_inmemory_data_size(self) -> int:
        return sum(map(len, self._bundles)) * _ROW_BYTES

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(run_bundle, self._function, bundle),
                BlockMetadata(
                    num_rows=len(bundle), size_bytes=len(bundle) * _ROW_BYTES, exec_stats=None
                ),
            )
            for bundle in self._bundles
        ]


def job_dataset(
    function: Callable[[Any], Any], bundles: Sequence[Bundle], *, concurrency: int
) -> Dataset:
    """Return the dataset of the outcomes; reading it runs the bundles, `concurrency` at a time."""
    return ray.data.read_datasource(
        _Jobs(function, bundles),
        # Tokenizing uses one core per task: `rust_threads` is off inside.
        num_cpus=1,
        concurrency=min(concurrency, len(bundles)),
        # Ray Data would otherwise split or join tasks by their estimated size.
        override_num_blocks=len(bundles),
    )


def run_bundle(
    function: Callable[[Any], Any], bundle: Sequence[tuple[int, object]]
) -> Iterator[pa.Table]:
    """Yield the outcome of each job as a table of one row: its result or its RaymixError.

    An error that a user can act on is a result, so that Ray neither retries nor wraps it.
    """
    for index, job in bundle:
        try:
            with rust_threads(False):  # a task has one CPU, and there are as many as CPUs
                outcome = function(job)
        except RaymixError as error:
            outcome = error
        # A row per result, yielded at once: progress is seen before the bundle ends.
        pickled = pa.array([pickle.dumps(outcome)], pa.binary())
        yield pa.table({"job": [index], "outcome": pickled})
        # The run ends with this error; the rest of the bundle would be work for nothing.
        if isinstance(outcome, RaymixError):
            return
