"""Private API of CPython, read in 3.11 to 3.13."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End this process as the interpreter does at the end of a program, without unwinding frames.

    For a fork: its outer frames belong to the process that it was forked from. `multiprocessing`
    ends its forks in the same way, with its own list of functions in place of `atexit`.
    """
    with suppress(BaseException):
        threading._shutdown()  # pyrefly: ignore [missing-attribute] - absent from the stubs
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
