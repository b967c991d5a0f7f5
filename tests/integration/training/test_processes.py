"""What a training process is set up with: memory that is freed is kept for the next step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from raymix.training.launch.cluster import worker_environment

# A "step" in a thread, as the loop runs in one: takes 32 MB, writes to it, frees it.
STEPS = """
import resource, sys, threading
import numpy as np
from raymix.training.launch.cluster import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
def steps():
    for step in range(12):
        np.empty(1 << 25, np.uint8).fill(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
thread = threading.Thread(target=steps)
thread.start()
thread.join()
print(faults[-1] - faults[3])
"""


def page_faults(mode: str, **environment: str) -> int:
    """Return the page faults of the last 8 of 12 steps."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD"))}
    # Huge pages would make few faults of many.
    inherited["NUMPY_MADVISE_HUGEPAGE"] = "0"
    command = [sys.executable, "-c", STEPS, mode]
    return int(subprocess.check_output(command, env={**inherited, **environment}, text=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is about glibc's malloc")
def test_memory_that_a_step_frees_is_there_for_the_next_one() -> None:
    pages = 8 * (1 << 25) // os.sysconf("SC_PAGE_SIZE")
    assert page_faults("left") > pages / 2
    assert page_faults("kept") < pages / 100
    assert page_faults("left", **worker_environment(on_gpu=False)) < pages / 100


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert worker_environment(on_gpu=False)["MALLOC_ARENA_MAX"] == "4"
    assert "MALLOC_MMAP_THRESHOLD_" not in worker_environment(on_gpu=True)
