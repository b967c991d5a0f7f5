"""The lines that are added to a file while it is being written."""

from __future__ import annotations

import os
import time
from pathlib import Path


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

    def read(self) -> tuple[list[bytes], bool]:
        """Return the new lines, and whether they are those of another file than before."""
        try:
            with self._path.open("rb") as file:
                facts, known = os.fstat(file.fileno()), self._inode
                afresh = facts.st_ino != known or facts.st_size < self._offset
                if afresh:
                    self._inode, self._offset = facts.st_ino, 0
                self._changed = facts.st_mtime
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return [], False
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        return data[:whole].splitlines(), afresh and known != -1
