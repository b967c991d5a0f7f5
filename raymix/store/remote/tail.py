"""The lines that are added to a file while it is being written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class LineTail:
    """The whole lines of a file that are new since the last look.

    A file that is put in its place, or cut short, is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        """Begin before the first line of the file at `path`, which need not be there yet."""
        self._path = path
        self._inode, self._offset, self._changed = -1, 0, time.time()

    def age(self) -> float:
        """Return the seconds since the file was written to last."""
        return max(0.0, time.time() - self._changed)

    def read(self) -> tuple[Iterator[bytes], bool]:
        """Return the new lines, and whether they are those of another file than before.

        Lines are read as they are asked for; what is not asked for is new at the next look, too.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return iter(()), False
        facts, known = os.fstat(file.fileno()), self._inode
        afresh = facts.st_ino != known or facts.st_size < self._offset
        if afresh:
            self._inode, self._offset = facts.st_ino, 0
        self._changed = facts.st_mtime
        return self._lines(file), afresh and known != -1

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield line[:-1]
