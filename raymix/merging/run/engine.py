"""Carrying out a merge: plan, run the jobs somewhere, resume, finish; `merge` is all of it."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

import torch

from raymix._utils.compat import native
from raymix.errors import MergeError
from raymix.merging.checkpoints.output import OutputWorkspace
from raymix.merging.recipe import MergeFile, load_merge
from raymix.merging.run.finish import check_tokenizers, finish_files
from raymix.merging.run.jobs import HASH, Lines, job_bytes, run_job, scipy_limited
from raymix.merging.run.plan import Plan, plan_merge

On = Literal["local", "ray"]
Progress = Callable[[int, int, str], None]
"""Called with the jobs done, all jobs, and the name of the one just done."""


def merge(
    source: str | os.PathLike[str] | Mapping[str, Any] | MergeFile,
    out: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    on: On = "local",
    workers: int | None = None,
    device: str = "cpu",
    memory_bytes: int | None = None,
    progress: Progress | None = None,
    scratch: bool = False,
) -> dict[str, Any]:
    """Merge models as a file says and write the result to the new directory `out`.

    A run that was killed goes on where it stopped when it is called again with the same merge.
    The output's bytes do not depend on `on`, `workers` or interruptions.

    Args:
        source: A merge file (see `raymix.merging.recipe`), its content, or a MergeFile.
        out: A directory that is not there yet.
        overrides: Changes such as `parameters.drop=0.5`.
        on: `local`: this process; `ray`: a task per parameter on the Ray cluster, whose nodes
            all see the models and `out` under the same paths.
        workers: Parameters at a time; else one per core, or one on a GPU (`ray` uses them all).
        device: `cpu` or `cuda`.
        memory_bytes: Working memory of all workers that is not exceeded but by a parameter
            that alone needs more; else a quarter of what is free.
        progress: Told about each finished job.
        scratch: Write what `from_pretrained` needs and no more: inputs are not hashed, there is no
            report and no card. For a merge that is looked at and removed.

    Returns:
        `out, method, tensors, seconds, peak_bytes, resumed, notes`; `peak_bytes` is the most
        anonymous memory of this process, without the input files it maps; on Ray the most
        resident memory of a worker, with them.

    Raises:
        MergeError: If something is wrong with the inputs; nothing is left behind then.
    """
    start = time.monotonic()
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise MergeError.at(
            "device",
            device,
            "not a device of this machine",
            fix="Use cpu, or cuda where there is one",
        )
    workspace = OutputWorkspace(out)
    plan = plan_merge(load_merge(source, overrides), device=device)
    notes = check_tokenizers(plan)
    jobs = sorted(plan.choices, key=plan.job_bytes, reverse=True)
    if not scratch:
        jobs += [HASH + path for _, files in plan.sources() for path in files]
    with _peak() as peak, workspace.opened(plan.layout, plan.identity()):
        resumed = len(workspace.done)
        left = [job for job in jobs if job not in workspace.done]
        runner = _on_ray if on == "ray" else run_local
        results = runner(plan, left, str(workspace.path), workers, memory_bytes)
        with contextlib.closing(results):
            for job, line in results:
                workspace.note(job, line)
                peak.append(int(line.get("peak_bytes", 0)))
                if progress is not None:
                    progress(len(workspace.done), len(jobs), job)
        finish_files(plan, workspace.path, None if scratch else workspace.done, notes)
        workspace.finish()
    return {
        "out": str(workspace.out),
        "method": plan.file.merge_method,
        "tensors": len(plan.layout.places),
        "seconds": round(time.monotonic() - start, 3),
        "peak_bytes": max(peak),
        "resumed": resumed,
        "notes": notes,
    }


def run_local(
    plan: Plan, jobs: Sequence[str], folder: str, workers: int | None, memory_bytes: int | None
) -> Lines:
    """Yield finished jobs and their lines, from a pool of threads with one BLAS thread each.

    The kernels release Python's lock, so threads keep the cores busy; they share one torch and
    the mapped inputs, and nothing is copied between them.
    """
    count = workers or (1 if plan.device == "cuda" else _cores())
    budget = memory_bytes or _free_bytes() // 4
    waiting, running = deque(jobs), dict[Future[dict[str, Any]], tuple[str, int]]()
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        count, "raymix-merge", initializer=torch.set_num_threads, initargs=(1,)
    )
    limit = contextlib.ExitStack()
    try:
        limit.enter_context(scipy_limited(plan))
        while waiting or running:
            while len(running) < count:
                job = _next(waiting, plan, budget - sum(size for _, size in running.values()))
                if job is None and running:
                    break
                if job is None and not waiting:
                    break
                job = waiting.popleft() if job is None else job
                running[pool.submit(run_job, plan, job, folder)] = (job, job_bytes(plan, job))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, _ = running.pop(future)
                yield job, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        limit.close()
        torch.set_num_threads(before)


def _next(waiting: deque[str], plan: Plan, budget: int) -> str | None:
    """Take the first (largest) waiting job that fits the budget; None if none does."""
    for index, job in enumerate(waiting):
        if job_bytes(plan, job) <= budget:
            del waiting[index]
            return job
    return None


def _on_ray(
    plan: Plan, jobs: Sequence[str], folder: str, workers: int | None, memory_bytes: int | None
) -> Lines:
    from raymix.merging.run.fanout import run_on_ray  # the only way from here to Ray

    return run_on_ray(plan, jobs, folder, workers)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _free_bytes() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024


def return_freed_memory() -> None:
    """Have this process give large blocks back to the system as soon as they are freed.

    glibc keeps freed blocks of up to 32 MB in an arena per thread: some 35 MB per worker of
    matrices that are done. For a process that only merges; it cannot be undone. What the user set
    stays, and elsewhere than in glibc nothing happens.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        native.mallopt(native.M_MMAP_THRESHOLD, 1 << 20)


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process: what it holds besides mapped files."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """Yield a list whose largest entry is the most anonymous memory seen meanwhile."""
    seen, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen[0] = max(seen[0], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def shown_bytes(count: float) -> str:
    """Return a size for people."""
    if count < 1e3:
        return f"{count:.0f} B"
    power = min(4, int(math.log10(count) // 3))
    return f"{count / 10 ** (3 * power):.3g} {['', 'kB', 'MB', 'GB', 'TB'][power]}"
