"""A directory behind a URL and its copy on this machine: files are sent and fetched as they change.

Stores replace objects whole, so that is how files travel: one that grows is sent again. `pause`
tells how long to wait after that, so that a large file does not take more of the network than a
megabyte a second.
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

SHORTEST_S = 5.0
"""Seconds between two looks at files that change."""

_BYTES_PER_S = 1e6
_CHUNK = 8 << 20

_SENDING = threading.Lock()

_Stamp = tuple[int, int]


class Mirror:
    """The directory `url` and its copy at `here`; every method says in which direction.

    One side is the truth for each file: whoever writes it sends it, everybody else fetches it.
    """

    def __init__(self, url: str, here: Path) -> None:
        """Begin without having sent or fetched anything."""
        self._url, self._here = url, here
        self._fetched: dict[str, _Stamp] = {}
        self._sent: dict[str, _Stamp] = {}
        self._last_bytes = 0

    @property
    def pause(self) -> float:
        """Return the seconds to wait before sending and fetching again."""
        return max(SHORTEST_S, self._last_bytes / _BYTES_PER_S)

    def fetch(self, *names: str) -> bool:
        """Make the copies of `names` like the originals: new where changed, gone where gone.

        Returns whether any of them is there.

        Raises:
            StorageError: If the store cannot be used.
        """
        self._moved(sum(with_retries(partial(self._fetch, name)) for name in names))
        return any(name in self._fetched for name in names)

    def send(self, *names: str) -> None:
        """Put the files `names`, or all in directories of that name, in the place of the originals.

        Those that have not changed since they were sent, or are not there, are passed over.

        Raises:
            StorageError: If the store cannot be used.
        """
        found = [file for name in names for file in self._files(name)]
        # In turn, so that an older state of a file never comes after a newer one.
        with _SENDING:
            self._moved(sum(with_retries(partial(self._send, name)) for name in found))

    def _moved(self, size: int) -> None:
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
        if self._fetched.get(name) == stamp and here.exists():
            return 0
        here.parent.mkdir(parents=True, exist_ok=True)
        temporary = here.with_name(f".{here.name}.{os.getpid()}.fetched")
        try:
            download(url, temporary)
        except FileNotFoundError:  # gone since a moment: the next look will tell
            return 0
        if info.mtime_ns:  # whoever watches wants to know when it was written
            os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
        os.replace(temporary, here)
        self._fetched[name] = stamp
        return info.size

    def _send(self, name: str) -> int:
        facts = (self._here / name).stat()
        stamp = (facts.st_size, facts.st_mtime_ns)
        if self._sent.get(name) == stamp:
            return 0
        url = files.join(self._url, name)
        with (self._here / name).open("rb") as source, files.AtomicFile(url) as target:
            shutil.copyfileobj(source, target, _CHUNK)
        self._sent[name] = stamp
        return facts.st_size

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
        shutil.copyfileobj(source, target, _CHUNK)


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
        shutil.copyfileobj(source, target, _CHUNK)
