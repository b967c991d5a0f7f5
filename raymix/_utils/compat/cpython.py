"""Private API of CPython, read in 3.11 to 3.13."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End this process as the interpreter does at the end of a program, without finalizing it.

    For a fork, whose outer frames belong to the process that it was forked from, and for a program
    that leaves a daemon thread at work: the interpreter ends such a thread when it next asks for
    the GIL, and calls `abort` where frames of C++ are on its stack. `multiprocessing` ends its
    forks in the same way, with its own list of functions in place of `atexit`.
    """
    for step in (
        threading._shutdown,  # pyrefly: ignore [missing-attribute] - absent from the stubs
        atexit._run_exitfuncs,
        sys.stdout.flush,
        sys.stderr.flush,
    ):
        with suppress(BaseException):
            step()
    os._exit(code)
