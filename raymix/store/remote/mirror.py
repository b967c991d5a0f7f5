"""Mirror of a directory behind a URL: files are sent and fetched when they change.

Object stores replace objects as a whole, so a file that grows is sent again as a whole. `pause`
grows with the bytes moved, so that large files take no more than a megabyte per second.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs

from raymix.store.remote import files
from raymix.store.remote.errors import translate_storage_errors, with_retries

MIN_PAUSE_S = 5.0
"""Minimum seconds between two synchronizations."""

_BYTES_PER_S = 1e6
_CHUNK_BYTES = 8 << 20

_SEND_LOCK = threading.Lock()

_Stamp = tuple[int, int]


class Mirror:
    """The directory `url` and its copy at `here`.

    Each file has one writer, which sends it; everybody else fetches it.
    """

    def __init__(self, url: str, here: Path) -> None:
        """Start with nothing sent or fetched."""
        self._url, self._here = url, here
        self._fetched: dict[str, _Stamp] = {}
        self._sent: dict[str, _Stamp] = {}
        self._last_bytes = 0

    @property
    def pause(self) -> float:
        """Return the seconds to wait before sending and fetching again."""
        return max(MIN_PAUSE_S, self._last_bytes / _BYTES_PER_S)

    def fetch(self, *names: str) -> bool:
        """Update the copies of `names`: download changed ones, delete those that are gone.

        Returns whether any of them exists.

        Raises:
            StorageError: If the store cannot be used.
        """
        self._moved(sum(with_retries(partial(self._fetch, name)) for name in names))
        return any(name in self._fetched for name in names)

    def send(self, *names: str) -> None:
        """Upload the files `names`, or all files in directories of that name.

        Files that have not changed since they were sent, or do not exist, are skipped.

        Raises:
            StorageError: If the store cannot be used.
        """
        paths = [file for name in names for file in self._files(name)]
        # One at a time: of two uploads of one file, the older could finish last.
        with _SEND_LOCK:
            self._moved(sum(with_retries(partial(self._send, name)) for name in paths))

    def _moved(self, size: int) -> None:
        # A round without changes keeps the pause of the last one that moved bytes.
        self._last_bytes = size or self._last_bytes

    def _fetch(self, name: str) -> int:
        url, here = files.join(self._url, name), self._here / name
        filesystem, path = files.locate(url)
        with translate_storage_errors(url):
            info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            here.unlink(missing_ok=True)
            self._fetched.pop(name, None)
            return 0
        stamp = (info.size, info.mtime_ns or 0)
        # Size and time stand for the content: reading it would be the download to be saved.
        if self._fetched.get(name) == stamp and here.exists():
            return 0
        here.parent.mkdir(parents=True, exist_ok=True)
        # With the process id: ranks on one machine may fetch the same file.
        temporary = here.with_name(f".{here.name}.{os.getpid()}.fetched")
        try:
            download(url, temporary)
        except FileNotFoundError:  # deleted after the listing: the next fetch sees it
            return 0
        if info.mtime_ns:  # `raymix watch` shows when a file was written
            os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
        # Readers of the copy see the old file or the new one, never half of it.
        os.replace(temporary, here)
        self._fetched[name] = stamp
        return info.size

    def _send(self, name: str) -> int:
        info = (self._here / name).stat()
        stamp = (info.st_size, info.st_mtime_ns)
        if self._sent.get(name) == stamp:
            return 0
        url = files.join(self._url, name)
        with (self._here / name).open("rb") as source, files.AtomicFile(url) as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
        self._sent[name] = stamp
        return info.st_size

    def _files(self, name: str) -> Iterator[str]:
        here = self._here / name
        if here.is_dir():
            for inner in sorted(here.iterdir()):
                yield from self._files(f"{name}/{inner.name}")
        elif here.exists():
            yield name


def download(url: str, here: Path) -> None:
    """Copy the file at `url` to `here`.

    Raises:
        FileNotFoundError: If there is none.
        StorageError: If the store cannot be used.
    """
    filesystem, path = files.locate(url)
    with (
        translate_storage_errors(url),
        filesystem.open_input_stream(path, compression=None) as source,
        here.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def upload(here: Path, url: str) -> None:
    """Copy the file `here` to `url`; it may appear there in part if this fails.

    Raises:
        StorageError: If the store cannot be used.
    """
    filesystem, path = files.locate(url)
    with (
        here.open("rb") as source,
        translate_storage_errors(url),
        filesystem.open_output_stream(path, compression=None) as target,
    ):
        shutil.copyfileobj(source, target, _CHUNK_BYTES)
