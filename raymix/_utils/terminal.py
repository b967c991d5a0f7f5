"""The end of a terminal: SIGHUP, after which every write to it raises."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType


def terminal_descriptors() -> list[int]:
    """Return which of stdout and stderr are terminals; of one that is gone nobody can tell."""
    return [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def detach(descriptors: Sequence[int]) -> None:
    """Point these descriptors at the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)


def hangup_is_ctrl_c() -> None:
    """Make the end of the terminal interrupt this process as Ctrl-C does.

    By default it would die at once, and leave processes of a private cluster behind. Nothing
    changes where the signal is ignored, as under nohup.
    """
    terminals = terminal_descriptors()

    def interrupt(number: int, frame: FrameType | None) -> None:
        detach(terminals)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, interrupt)
