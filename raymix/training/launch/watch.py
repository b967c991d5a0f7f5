"""Watching a run from the main thread: progress, Ctrl-C, an orderly end.

The work runs in a thread of its own, so that this one can show progress and hear Ctrl-C. The
first Ctrl-C asks for a checkpoint and a clean end, the second does not wait.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from raymix.training.run.progress import RunProgress
from raymix.training.run.rundir import RunDirectory

_POLL_S = 0.2


def watch(
    work: Callable[[], object],
    run: RunDirectory,
    progress: RunProgress,
    *,
    starting: str,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Do `work`, which trains in `run`, showing `progress`; returns when it has ended.

    Args:
        work: What to do.
        run: Its run directory, where a request to stop is left for it.
        progress: Shows it.
        starting: What is being waited for before the first step.
        check: Called a few times a second; raises where the work cannot go on.

    Raises:
        BaseException: Whatever `work` raised, or `check`.
        KeyboardInterrupt: At the second Ctrl-C, or one before the first step.
    """
    with ctrl_c() as pressed:
        thread = Work(work)
        began = time.monotonic()
        asked = False
        while not thread.wait(_POLL_S):
            progress.poll()
            check()
            progress.waiting(f"starting {starting} ({time.monotonic() - began:.0f} s)")
            if pressed() > 1 or (pressed() and progress.last_step is None):
                raise KeyboardInterrupt
            if pressed() and not asked:
                asked = True
                run.stop_request.touch()
                progress.say("Stopping with a checkpoint; Ctrl-C again stops at once.")
    thread.end()


class Work:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Begin it."""
        self._error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, name="raymix-work", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Return whether the call has ended, waiting for it that long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def end(self) -> None:
        """Wait until it has ended, and raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - `end` raises it again
            self._error = error


@contextmanager
def ctrl_c() -> Iterator[Callable[[], int]]:
    """Yield a count of the interrupts (Ctrl-C or SIGTERM) so far; none is raised meanwhile.

    In another thread than the main one, interrupts are somebody else's and the count stays 0.
    """
    count = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1

    if threading.current_thread() is not threading.main_thread():
        yield lambda: count
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
