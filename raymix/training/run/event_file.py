"""TensorBoard's event files, written by the caller's own thread.

The writers that come with TensorBoard's libraries leave it to a thread: where that meets a full
disk it dies, and whoever adds to its queue then waits for ever.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

_FLUSH_S = 30.0
# Generated code, whose names no type checker sees.
_messages: Any = event_pb2


class EventFileWriter:
    """Appends scalars to an event file of its own in a directory."""

    def __init__(self, directory: Path, *, start_step: int) -> None:
        """Open a file; what earlier ones hold of steps after `start_step` is void if that is not 0.

        Raises:
            OSError: If the disk is full.
        """
        os.makedirs(directory, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        if start_step:
            begun = _messages.SessionLog(status=_messages.SessionLog.START)
            event = _messages.Event(step=start_step + 1, session_log=begun)
            self._writer.write_event(event)
        self._flush()

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add one point.

        Raises:
            OSError: If the disk is full.
        """
        summary = scalar(name, value)
        event = _messages.Event(wall_time=time.time(), step=step, summary=summary)
        self._writer.write_event(event)
        if time.monotonic() >= self._due:
            self._flush()

    def close(self) -> None:
        """Write what is left and close the file.

        Raises:
            OSError: If the disk is full.
        """
        self._writer.close()

    def _flush(self) -> None:
        self._writer.flush()
        self._due = time.monotonic() + _FLUSH_S
