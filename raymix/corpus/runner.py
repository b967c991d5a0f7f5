"""Runners: many independent jobs, in this process or as tasks of a Ray Data execution.

Both yield each result with the index of its job as soon as it is there, in any order. Jobs write
files and return a few numbers, so no token passes through the driver.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

from raymix._utils.cluster_nodes import wait_for_nodes
from raymix._utils.private_cluster import start_private
from raymix.corpus.tokenizers.tokenizer import rust_threads
from raymix.errors import ClusterError, RaymixError

Job = TypeVar("Job")
Result = TypeVar("Result")

_MAX_THREADS = 8
# Enough tasks per CPU that the last ones end together, few enough that starting them costs little.
_TASKS_PER_CPU = 64
# Tasks return a few numbers, so the object store can be near Ray's minimum.
_PRIVATE_STORE_BYTES = 150_000_000
_QUIET_LOGGERS = ("ray", "ray.data")


class Runner(Protocol):
    """Runs a function over jobs, whose sizes (of any unit) say how long each is likely to take."""

    description: str

    def run(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], sizes: Sequence[int]
    ) -> Iterator[tuple[int, Result]]:
        """Yield the index and the result of each job, in the order of completion.

        Raises:
            RaymixError: The first that a job raised; jobs under way are given up.
        """
        ...


class InProcess:
    """Runs jobs in this process, a thread for each core: most of the time is spent in Rust."""

    description = "in this process"

    def run(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], sizes: Sequence[int]
    ) -> Iterator[tuple[int, Result]]:
        """Yield the index and the result of each job, in the order of completion."""
        pending = iter(enumerate(jobs))
        running: dict[Future[Result], int] = {}
        threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        # Threads suffice: the tokenizer library, Arrow and NumPy let go of the interpreter lock.
        with rust_threads(False), ThreadPoolExecutor(threads) as pool:
            try:
                while True:
                    while len(running) < threads and (entry := next(pending, None)) is not None:
                        running[pool.submit(function, entry[1])] = entry[0]
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
            finally:
                # After an error the rest is not begun; what has begun finishes and leaves markers.
                for future in running:
                    future.cancel()


class OnRay:
    """Runs jobs as the read tasks of a Ray Data dataset, one CPU each.

    A task costs some tens of milliseconds, so small jobs are bundled; how does not matter to
    what they write.
    """

    def __init__(self, parallelism: int | None) -> None:
        """Run at most `parallelism` jobs at a time, or as many as the cluster has CPUs."""
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 0))
        if not cpus:
            raise ClusterError.at(
                "cluster",
                ray.cluster_resources(),
                "the Ray cluster has no CPU to prepare the corpus with",
            )
        self._concurrency = parallelism or cpus
        self.description = f"Ray, {min(self._concurrency, cpus)} tasks at a time"

    def run(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], sizes: Sequence[int]
    ) -> Iterator[tuple[int, Result]]:
        """Yield the index and the result of each job, in the order of completion."""
        if not jobs:
            return
        from raymix.corpus.job_dataset import job_dataset

        with _quiet_ray_data():
            # In consecutive bundles, so that neighboring parts of a file are read by one task.
            bundles = bundled(sizes, self._concurrency * _TASKS_PER_CPU)
            dataset = job_dataset(
                function,
                [[(index, jobs[index]) for index in bundle] for bundle in bundles],
                concurrency=self._concurrency,
            )
            for row in dataset.iter_rows():
                # Pickled by the task, since Arrow has no type for a result or an exception.
                outcome = pickle.loads(row["outcome"])
                if isinstance(outcome, RaymixError):
                    raise outcome
                yield row["job"], outcome


def bundled(sizes: Sequence[int], max_bundles: int) -> list[list[int]]:
    """Return the indices of jobs in consecutive bundles of about equal size, `wanted` or fewer."""
    # One unit per job stands for its fixed cost: empty jobs must not all end up in one bundle.
    target = (sum(sizes) + len(sizes)) / max_bundles
    bundles: list[list[int]] = []
    remaining = 0.0
    for index, size in enumerate(sizes):
        if remaining < size + 1:
            bundles.append([])
            remaining = max(target, size + 1)
        bundles[-1].append(index)
        remaining -= size + 1
    return bundles


@contextlib.contextmanager
def choose_runner(
    source_bytes: int,
    *,
    parallelism: int | None = None,
    address: str | None = None,
    wait_minutes: float = 0,
    say: Callable[[str], object] = print,
) -> Iterator[Runner]:
    """Yield the runner for `parallelism`: 0 is this process, None chooses by the size.

    A corpus of less than `SMALL_CORPUS` bytes is done in this process before a Ray cluster
    would be up; one that is running, or that `address` or RAY_ADDRESS names, is used. Without
    one, a private cluster is started and stopped again. `wait_minutes` limits the wait for a node
    with CPUs of a cluster that adds nodes on demand; `say` is called with lines about it.
    """
    import sys

    # Not `import ray`: that takes a second, and most corpora are prepared without it.
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    address = address or os.environ.get("RAY_ADDRESS")
    # Ray itself takes "local" to mean a cluster of one's own.
    address = None if address == "local" else address
    reachable = connected or address
    if parallelism == 0 or (parallelism is None and not reachable and source_bytes < SMALL_CORPUS):
        yield InProcess()
        return
    # A cluster that the caller connected to stays connected.
    with contextlib.nullcontext() if connected else _cluster(parallelism, address):
        # Of a cluster without CPUs, as a head often is, tasks would wait for ever.
        if reachable:
            wait_for_nodes(1, {"CPU": 1}, minutes=wait_minutes, say=say)
        yield OnRay(parallelism)


SMALL_CORPUS = 32 << 20
"""Bytes of text that one process tokenizes in about the time a Ray cluster takes to start."""


@contextlib.contextmanager
def _cluster(parallelism: int | None, address: str | None) -> Iterator[None]:
    import ray

    if not address:
        cpus = parallelism or len(os.sched_getaffinity(0))
        start_private(num_cpus=cpus, object_store_memory=_PRIVATE_STORE_BYTES)
    else:
        _join(address)
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ClusterError.at(
            "cluster.address",
            address,
            "no Ray cluster answers there",
            fix="start it, or leave the address out",
        ) from error


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    from ray.data import DataContext

    # Ray Data draws its own bars and logs its plan, in the middle of ours.
    context = DataContext.get_current()
    saved = (context.enable_progress_bars, context.print_on_execution_start)
    levels = {name: logging.getLogger(name).level for name in _QUIET_LOGGERS}
    context.enable_progress_bars = context.print_on_execution_start = False
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = saved
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def in_order(results: Iterable[tuple[int, Result]], count: int) -> list[Result]:
    """Return the results by the index of their jobs."""
    # Results come in the order of completion; the manifest needs the order of the jobs.
    by_index = dict(results)
    return [by_index[index] for index in range(count)]
