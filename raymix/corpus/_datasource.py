"""Jobs as a Ray Data dataset: one read task per job, one row per result.

An own datasource, because the cut of the work is ours: deterministic parts, no listing actors, no
footer readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from raymix.corpus.runner import run_job

_ROW_BYTES = 10_000


class _Jobs(Datasource):
    """A dataset whose n-th block is the outcome of the n-th job."""

    def __init__(self, function: Callable[[Any], Any], jobs: Sequence[object]) -> None:
        super().__init__()
        self._function = function
        self._jobs = jobs

    def get_name(self) -> str:
        return self._function.__name__

    def estimate_inmemory_data_size(self) -> int:
        return len(self._jobs) * _ROW_BYTES

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=1, size_bytes=_ROW_BYTES, exec_stats=None)
        return [
            ReadTask(partial(_read, self._function, index, job), metadata)
            for index, job in enumerate(self._jobs)
        ]


def _read(function: Callable[[Any], Any], index: int, job: object) -> Iterable[pa.Table]:
    yield run_job(function, index, job)


def job_dataset(
    function: Callable[[Any], Any], jobs: Sequence[object], *, concurrency: int
) -> Dataset:
    """Return the dataset of the outcomes; reading it runs the jobs, `concurrency` at a time."""
    return ray.data.read_datasource(
        _Jobs(function, jobs),
        num_cpus=1,
        concurrency=min(concurrency, len(jobs)),
        override_num_blocks=len(jobs),
    )
