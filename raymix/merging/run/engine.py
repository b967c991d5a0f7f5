"""Execution of a merge: `merge` plans, runs jobs on threads or Ray, resumes, and finishes files.

Jobs are independent and write disjoint byte ranges, so neither their order nor their number at a
time changes the output.
"""

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
from raymix.merging.checkpoints.models import with_local_models
from raymix.merging.checkpoints.output import OutputWorkspace
from raymix.merging.recipe import MergeFile, load_merge
from raymix.merging.run.finish import check_tokenizers, finish_files
from raymix.merging.run.plan import MergePlan, plan_merge
from raymix.merging.run.work import HASH_PREFIX, JobResults, job_bytes, limit_scipy_threads, run_job

Backend = Literal["local", "ray"]
Progress = Callable[[int, int, str], None]
"""Called with the number of finished jobs, of all jobs, and the name of the last finished one."""

_MEMORY_POLL_S = 0.02
# Blocks from 1 MiB on are mapped on their own, and unmapped when freed.
_MMAP_THRESHOLD_BYTES = 1 << 20


def merge(
    source: str | os.PathLike[str] | Mapping[str, Any] | MergeFile,
    out: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    on: Backend = "local",
    workers: int | None = None,
    device: str = "cpu",
    memory_bytes: int | None = None,
    progress: Progress | None = None,
    scratch: bool = False,
) -> dict[str, Any]:
    """Merge models by a merge file and write the result to the new directory `out`.

    A killed run resumes when it is called again with the same merge. The output's bytes do not
    depend on `on`, `workers` or interruptions.

    Args:
        source: A merge file (see `raymix.merging.recipe`), its content, or a MergeFile.
        out: A directory that does not exist, or is empty.
        overrides: Changes such as `parameters.drop=0.5`.
        on: `local`: this process; `ray`: a task per parameter on the Ray cluster, whose nodes
            all see the models and `out` under the same paths.
        workers: Parameters at a time; default: one per core, or one on a GPU (`ray`: all of them).
        device: `cpu` or `cuda`.
        memory_bytes: Limit of the working memory of all workers in bytes, exceeded only by a
            parameter that alone needs more; default: a quarter of the available memory.
        progress: Called after each finished job.
        scratch: Write only what `from_pretrained` needs: inputs are not hashed, no report, no model
            card. For a merge that is evaluated and deleted.

    Returns:
        `out, method, tensors, seconds, peak_bytes, resumed, notes`; `peak_bytes` is the peak
        anonymous memory of this process, without the mapped input files; on Ray the peak resident
        memory of a worker, with them.

    Raises:
        MergeError: If the inputs cannot be merged; the workspace is removed then.
    """
    start = time.monotonic()
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise MergeError.at(
            "device",
            device,
            "not a device of this machine",
            fix="Use cpu, or cuda on a machine with a GPU",
        )
    # All checks come before the first write: the workspace is created by `opened` below.
    workspace = OutputWorkspace(out)
    plan = plan_merge(with_local_models(load_merge(source, overrides)), device=device)
    notes = check_tokenizers(plan)
    # Largest first: a large job started last would leave the other workers idle.
    jobs = sorted(plan.choices, key=plan.job_bytes, reverse=True)
    if not scratch:
        jobs += [HASH_PREFIX + path for _, files in plan.sources() for path in files]
    with _track_peak_bytes() as peak, workspace.opened(plan.layout, plan.identity()):
        resumed = len(workspace.done)
        pending = [job for job in jobs if job not in workspace.done]
        runner = _run_on_ray if on == "ray" else run_local
        results = runner(plan, pending, str(workspace.path), workers, memory_bytes)
        # Closed before the workspace: the generator's end stops the workers, which write to it.
        with contextlib.closing(results):
            for job, line in results:
                workspace.record(job, line)
                peak.append(int(line.get("peak_bytes", 0)))
                if progress is not None:
                    progress(len(workspace.done), len(jobs), job)
        finish_files(plan, workspace.path, None if scratch else workspace.done, notes)
        workspace.finish()
    return {
        "out": str(workspace.out),
        "method": plan.file.merge_method,
        "tensors": len(plan.layout.locations),
        "seconds": round(time.monotonic() - start, 3),
        "peak_bytes": max(peak),
        "resumed": resumed,
        "notes": notes,
    }


def run_local(
    plan: MergePlan, jobs: Sequence[str], folder: str, workers: int | None, memory_bytes: int | None
) -> JobResults:
    """Yield finished jobs and journal lines, from a pool of threads with one BLAS thread each.

    torch's kernels release the GIL, so threads keep the cores busy; they share the imported
    libraries and the mapped inputs, and nothing is copied between them.
    """
    n_workers = workers or (1 if plan.device == "cuda" else _n_cores())
    budget = memory_bytes or _available_bytes() // 4
    waiting, running = deque(jobs), dict[Future[dict[str, Any]], tuple[str, int]]()
    n_torch_threads = torch.get_num_threads()
    # Set in the threads themselves: OpenMP's number of threads is a setting per thread.
    pool = ThreadPoolExecutor(
        n_workers, "raymix-merge", initializer=torch.set_num_threads, initargs=(1,)
    )
    blas_limit = contextlib.ExitStack()
    try:
        blas_limit.enter_context(limit_scipy_threads(plan))
        while waiting or running:
            while len(running) < n_workers:
                job = _pop_fitting(waiting, plan, budget - sum(n for _, n in running.values()))
                if job is None and (running or not waiting):
                    break
                # Nothing runs and nothing fits: the largest goes alone, or it would never go.
                job = waiting.popleft() if job is None else job
                running[pool.submit(run_job, plan, job, folder)] = (job, job_bytes(plan, job))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, _ = running.pop(future)
                yield job, future.result()
    finally:
        # The limits last until the pool's last job is done: sums depend on the number of threads.
        pool.shutdown(cancel_futures=True)
        blas_limit.close()
        torch.set_num_threads(n_torch_threads)


def _pop_fitting(waiting: deque[str], plan: MergePlan, budget: int) -> str | None:
    """Remove and return the first (largest) job within `budget` bytes; None if none fits."""
    for index, job in enumerate(waiting):
        if job_bytes(plan, job) <= budget:
            del waiting[index]
            return job
    return None


def _run_on_ray(
    plan: MergePlan, jobs: Sequence[str], folder: str, workers: int | None, memory_bytes: int | None
) -> JobResults:
    from raymix.merging.run.fanout import run_on_ray  # a local merge must not need Ray

    return run_on_ray(plan, jobs, folder, workers)


def _n_cores() -> int:
    # Not os.cpu_count: containers and taskset allow fewer cores than the machine has.
    return len(os.sched_getaffinity(0))


def _available_bytes() -> int:
    # MemAvailable, not MemFree: the page cache of the inputs gives way to working memory.
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024


def return_freed_memory() -> None:
    """Make this process return large blocks to the system as soon as they are freed.

    glibc raises its mmap threshold to the size of freed blocks, up to 32 MB, and keeps such blocks
    in an arena per thread: some 35 MB per worker of matrices no longer used. For a process that
    only merges; it cannot be undone. A threshold set by the user stays; without glibc this is a
    no-op.
    """
    # Setting the threshold also turns off glibc's dynamic adjustment of it.
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        native.mallopt(native.M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process in bytes: resident, without mapped files."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


@contextlib.contextmanager
def _track_peak_bytes() -> Iterator[list[int]]:
    """Yield a list whose maximum is the peak of this process' anonymous memory, in bytes."""
    peaks, stopped = [anonymous_bytes()], threading.Event()

    # Polled, because the kernel has a peak of resident memory only (VmHWM), mapped inputs included.
    def poll() -> None:
        while not stopped.wait(_MEMORY_POLL_S):
            peaks[0] = max(peaks[0], anonymous_bytes())

    poller = threading.Thread(target=poll, daemon=True)
    poller.start()
    try:
        yield peaks
    finally:
        stopped.set()
        poller.join()


def format_bytes(count: float) -> str:
    """Return a size with three significant digits and a decimal unit, e.g. `1.23 GB`."""
    if count < 1e3:
        return f"{count:.0f} B"
    power = min(4, int(math.log10(count) // 3))
    return f"{count / 10 ** (3 * power):.3g} {['', 'kB', 'MB', 'GB', 'TB'][power]}"
