"""Supervision of a run from the main thread: progress, Ctrl-C and the end of a terminal.

The work runs in a background thread, because Python runs signal handlers in the main thread only.
The first Ctrl-C requests a checkpoint and a clean end, the second does not wait. A terminal that
goes away (SIGHUP) and a notice of preemption (SIGTERM) request a clean end too.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from raymix._utils.stages import stage
from raymix._utils.terminal import detach, terminal_descriptors
from raymix.training.run.progress import RunProgress
from raymix.training.run.rundir import RunDirectory
from raymix.training.run.stalls import StallReports

_POLL_S = 0.2


def watch(
    work: Callable[[], object],
    run: RunDirectory,
    progress: RunProgress,
    *,
    starting: str,
    check: Callable[[], None] = lambda: None,
    refresh: Callable[[], None] = lambda: None,
) -> None:
    """Run `work` in a background thread and show `progress` until it has ended.

    Args:
        work: The training.
        run: Its run directory, in which a stop is requested.
        progress: Shows the run's metrics.
        starting: Shown to the user until the first step.
        check: Called a few times a second; raises if the work cannot go on.
        refresh: Brings the metrics here where they are written elsewhere.

    Raises:
        BaseException: Whatever `work` raised, or `check`.
        KeyboardInterrupt: At the second Ctrl-C, or one before the first step.
    """
    with count_interrupts() as pressed:
        thread = BackgroundWork(work)
        start_s, stalls = time.monotonic(), StallReports(run.stalls)
        stop_requested, shown = False, 0
        while not thread.wait(_POLL_S):
            # First, as the metrics of the last stage may have come in the meantime.
            shown = _show_stages(run, shown)
            progress.poll()
            if (line := stalls.poll(progress.last_step or 0)) is not None:
                progress.say(line)
            check()
            progress.waiting(f"starting {starting} ({time.monotonic() - start_s:.0f} s)")
            if pressed() and progress.last_step is None:
                refresh()
                progress.poll()
            # Before the first step there is nothing to save.
            if pressed() > 1 or (pressed() and progress.last_step is None):
                raise KeyboardInterrupt
            if pressed() and not stop_requested:
                stop_requested = True
                # A file, because the workers may be on other machines; rank 0 polls for it.
                run.stop_request.touch()
                progress.say("Stopping with a checkpoint; Ctrl-C again stops at once.")
        _show_stages(run, shown)
    thread.end()


def _show_stages(run: RunDirectory, shown: int) -> int:
    """Print the stages of rank 0 beyond the first `shown`; return how many there are."""
    # A file, because rank 0 may be on another machine. A run at a URL has a directory on each, so
    # its worker's stages are not seen here.
    try:
        lines = run.stages.read_text("utf-8").splitlines()
    except OSError:
        return shown
    for line in lines[shown:]:
        stage(line)
    return len(lines)


class BackgroundWork:
    """A call in a background thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Start the thread."""
        self._error: BaseException | None = None
        self._call = call
        # A daemon: at the second Ctrl-C the process ends without waiting for it.
        self._thread = threading.Thread(target=self._run, name="raymix-work", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`, and return whether the call has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def end(self) -> None:
        """Wait until the call has ended, and raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - `end` raises it again
            self._error = error


@contextmanager
def count_interrupts() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the interrupts so far (SIGINT, SIGTERM, SIGHUP); none raises.

    SIGTERM and SIGHUP count only if they are the first: one closed terminal sends SIGHUP from the
    shell and again from the kernel, and schedulers send SIGTERM to a group and to its leader.
    The count stays 0 outside the main thread, where Python refuses to install signal handlers.
    """
    count = 0

    def increment(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count = count + 1 if number == signal.SIGINT else max(count, 1)
        if number == signal.SIGHUP:
            detach(terminals)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: count
        return
    terminals = terminal_descriptors()
    # nohup ignores the signal, as the user wants the work to go on.
    hangup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangup else [])]
    original = {number: signal.signal(number, increment) for number in numbers}
    try:
        yield lambda: count
    finally:
        for number, handler in original.items():
            signal.signal(number, handler)
