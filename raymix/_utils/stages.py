"""Lines on stderr for the stages of a start, which on a cluster takes a minute and more.

They are for logs of Slurm or CI. Nothing is printed until a command turns them on.
"""

from __future__ import annotations

import sys
import time

_start_s: float | None = None


def show_stages(*, show: bool) -> None:
    """Print stages from now on, with the seconds since this call; or no longer."""
    global _start_s
    _start_s = time.perf_counter() if show else None


def stage(text: str) -> None:
    """Print that a stage begins, if stages are shown."""
    if _start_s is not None:
        print(f"{time.perf_counter() - _start_s:6.1f} s  {text}", file=sys.stderr, flush=True)
