"""Reading the lines appended to a file while it is written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class LineTail:
    """The complete lines of a file that are new since the last read.

    A file that was replaced or truncated is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        """Start before the first line of the file at `path`, which need not exist yet."""
        self._path = path
        self._inode, self._offset, self._changed = -1, 0, time.time()

    def age(self) -> float:
        """Return the seconds since the last write to the file."""
        return max(0.0, time.time() - self._changed)

    def read(self) -> tuple[Iterator[bytes], bool]:
        """Return the new lines, and whether the file is another one than before.

        Lines are read lazily; those not consumed are new again at the next read.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return iter(()), False
        info, known = os.fstat(file.fileno()), self._inode
        # Compared by inode: a file that was replaced may be longer than the one before.
        restarted = info.st_ino != known or info.st_size < self._offset
        if restarted:
            self._inode, self._offset = info.st_ino, 0
        self._changed = info.st_mtime
        return self._lines(file), restarted and known != -1

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        with file:
            file.seek(self._offset)
            for line in file:
                # The writer is in the middle of this line.
                if not line.endswith(b"\n"):
                    return
                # After each line, not at the end: the caller may stop in between.
                self._offset += len(line)
                yield line[:-1]
