"""The jobs of a merge, whoever runs them: one per parameter, and one per input file to hash."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from raymix.merging.methods.eigen import one_thread
from raymix.merging.run.plan import Plan
from raymix.merging.run.work import hash_file, merge_job

Lines = Generator[tuple[str, dict[str, Any]], None, None]
"""Finished jobs and what the journal keeps of them."""

HASH = "sha256:"
"""Prefix of the jobs that hash an input file."""
_HASH_BYTES = 1 << 20


def run_job(plan: Plan, job: str, folder: str) -> dict[str, Any]:
    """Return the journal's line of one job, done in this thread on one core."""
    if job.startswith(HASH):
        return {"sha256": hash_file(job.removeprefix(HASH))}
    return merge_job(plan, job, folder)


def job_bytes(plan: Plan, job: str) -> int:
    """Return the memory that a job takes, in bytes."""
    return _HASH_BYTES if job.startswith(HASH) else plan.job_bytes(job)


def scipy_limited(plan: Plan) -> contextlib.AbstractContextManager[None]:
    """Return what keeps scipy's BLAS to one thread, if there is a matrix to decompose with it."""
    methods = (choice.method for choice in plan.choices.values())
    decomposes = plan.device == "cpu" and any(method and method.matrix for method in methods)
    return one_thread() if decomposes else contextlib.nullcontext()
