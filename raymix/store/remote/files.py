"""Files by URL: one way to read, write and replace them, local or on any store.

Every file that raymix writes appears under its name complete or not at all: it is written to a
temporary name in the same directory and renamed when it is complete. Endpoints and credentials come
from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), never from a URL.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import posixpath
import re
import shutil
import uuid
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.fs as pafs
from typing_extensions import Buffer

from raymix._utils.hub import HUB
from raymix.errors import CorpusError, StorageError
from raymix.store.remote.errors import is_remote, storage_errors, translate_storage_errors
from raymix.store.remote.hub import cached_path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Errors that another path would solve: no permission, a file too large for the file system.
_PATH_ERRNOS = (
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)

_PASSWORD = re.compile(r"^[A-Za-z][\w+.-]*://[^/@]*:[^/@]*@")


def locate(url: str, field: str = "path") -> tuple[pafs.FileSystem, str]:
    """Return the file system of `url` and the path in it; a plain path is a local one.

    pyarrow's own file systems are preferred (S3, GCS, HDFS, ABFS); any other scheme goes to
    fsspec. `field` is the recipe field that holds the URL, for messages.

    Raises:
        CorpusError: If nothing installed understands the scheme.
        StorageError: If the URL holds a password, or the store refuses it.
    """
    # Absolute at once: Ray workers have another working directory.
    if "://" not in url:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
    if url.startswith(HUB) and (cached := cached_path(url, field)) is not None:
        return pafs.LocalFileSystem(), cached
    if _PASSWORD.match(url):
        raise StorageError.at(
            field,
            url,
            "a password in a URL would end up in logs and in the run's files",
            fix="give it by the environment",
        )
    try:
        return pafs.FileSystem.from_uri(url)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a scheme pyarrow was built without
        return _fsspec(url, field)
    except OSError as error:  # from_uri asks the store for the bucket's region
        raise storage_errors(url, error, field) or error from error


def _fsspec(url: str, field: str) -> tuple[pafs.FileSystem, str]:
    import fsspec.core

    try:
        with translate_storage_errors(url, field):
            filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CorpusError.at(field, url, f"cannot be opened: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def check_store(url: str, field: str) -> None:
    """Check that the store behind `url` answers and has the bucket; local paths are not checked.

    Raises:
        RaymixError: If it does not; the message names `field`.
    """
    if not is_remote(url):
        return
    filesystem, path = locate(url, field)
    with translate_storage_errors(url, field), contextlib.suppress(FileNotFoundError):
        # Listing fails where the bucket is missing; get_file_info would say `not found`.
        filesystem.get_file_info(pafs.FileSelector(path))


def join(url: str, *parts: str) -> str:
    """Return `url` with `parts` appended, separated by slashes."""
    # posixpath, since URLs have slashes on every system.
    return posixpath.join(url, *parts)


def exists(url: str) -> bool:
    """Return whether a file or directory lies at `url`."""
    filesystem, path = locate(url)
    with translate_storage_errors(url):
        return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def read_bytes(url: str) -> bytes:
    """Return the content of the file at `url`.

    Raises:
        FileNotFoundError: If there is none.
    """
    filesystem, path = locate(url)
    with translate_storage_errors(url), filesystem.open_input_file(path) as source:
        return source.read()


def open_mapped(url: str) -> pa.NativeFile:
    """Return the file at `url` for random access, memory-mapped where it is local."""
    filesystem, path = locate(url)
    if isinstance(filesystem, pafs.LocalFileSystem):
        # Mapped pages are shared by all processes of a machine, and reading touches only what is
        # used.
        return pa.memory_map(path, "r")
    with translate_storage_errors(url):
        return filesystem.open_input_file(path)


def make_directory(url: str) -> None:
    """Create the directory `url` and its parents; an existing one is left as it is.

    Raises:
        CorpusError: If it cannot be made.
    """
    filesystem, path = locate(url)
    try:
        # On object stores this writes a marker or nothing.
        filesystem.create_dir(path, recursive=True)
    except OSError as error:
        raise write_error(url, error, 0) from error


def remove(url: str) -> None:
    """Delete the file or directory at `url`; nothing happens if it is absent."""
    filesystem, path = locate(url)
    with translate_storage_errors(url):
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind != pafs.FileType.NotFound:
            filesystem.delete_file(path)


def move(url: str, target: str) -> None:
    """Move the file at `url` to `target`, on the same store; nothing happens if it is absent."""
    filesystem, path = locate(url)
    with translate_storage_errors(url):
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.move(path, locate(target)[1])


def list_directory(url: str) -> list[str]:
    """Return the sorted names of the entries of the directory `url`."""
    filesystem, path = locate(url)
    selector = pafs.FileSelector(path, allow_not_found=True)
    with translate_storage_errors(url):
        return sorted(info.base_name for info in filesystem.get_file_info(selector))


def free_bytes(url: str) -> int | None:
    """Return the bytes free on the disk that holds `url`, or None where that is unknown."""
    filesystem, path = locate(url)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return None
    # The directory may not exist yet; its parent is on the same disk.
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def disk_full(url: str, needed: int) -> CorpusError:
    """Return the error for a disk that cannot take `needed` more bytes at `url`."""
    free = free_bytes(url)
    known = "" if free is None else f", {free:,} bytes are free"
    return CorpusError.at(
        "path",
        url,
        f"the disk is full: {needed:,} bytes are needed{known}",
        allowed="what was finished is kept",
        fix="make room and run the same command again, or choose another path",
    )


def write_error(url: str, error: OSError, needed: int) -> Exception:
    """Return the error to raise for an OSError while writing `needed` bytes at `url`."""
    if error.errno in _NO_SPACE:
        return disk_full(url, needed)
    if error.errno in _PATH_ERRNOS:
        why = os.strerror(error.errno or 0)
        return CorpusError.at("path", url, f"cannot be written: {why}", fix="choose another path")
    return storage_errors(url, error) or error


class AtomicFile:
    """A binary file that gets its name when closed without error, and leaves nothing otherwise.

    Used as a context manager. `sha256` and `size` are of the bytes written.
    """

    def __init__(self, url: str) -> None:
        """Open a temporary file beside `url`, making the directory if needed."""
        self.url = url
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.closed = False
        self._filesystem, self._path = locate(url)
        directory, name = posixpath.split(self._path)
        # In the same directory: a rename across file systems would be a copy.
        self._temporary = posixpath.join(directory, f".{name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            self._filesystem.create_dir(directory, recursive=True)
            self._stream = self._filesystem.open_output_stream(self._temporary)
        except OSError as error:
            raise write_error(self.url, error, 0) from error

    def write(self, data: Buffer) -> int:
        """Append `data` and return its size in bytes.

        Raises:
            CorpusError: If the disk is full.
        """
        # pyarrow hands over typed buffers, whose length would count elements.
        view = memoryview(data).cast("B")
        try:
            self._stream.write(view)
        except OSError as error:
            raise write_error(self.url, error, len(view)) from error
        # Hashed while the bytes are in the cache, instead of reading the file again.
        self.sha256.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: readers see the file only once it has its name."""

    def commit(self) -> None:
        """Give the file its name, replacing an older file."""
        try:
            self._stream.close()
            # rename(2) is atomic; object stores copy and delete, and a reader sees old or new.
            self._filesystem.move(self._temporary, self._path)
        except OSError as error:
            raise write_error(self.url, error, self.size) from error
        self.closed = True

    def abort(self) -> None:
        """Close and delete the temporary file, unless it has been committed."""
        if self.closed:
            return
        self.closed = True
        try:
            self._stream.close()
        finally:
            remove_quietly(self._filesystem, self._temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self.closed:
                self.commit()
        finally:
            self.abort()


def remove_quietly(filesystem: pafs.FileSystem, path: str) -> None:
    """Delete the file at `path`; errors are ignored."""
    try:
        filesystem.delete_file(path)
    except OSError:
        return


def atomic_write_bytes(url: str, data: bytes) -> None:
    """Write `data` to `url` atomically.

    Raises:
        CorpusError: If the disk is full.
    """
    with AtomicFile(url) as file:
        file.write(data)


def atomic_write_text(url: str, text: str) -> None:
    """Write `text` to `url` as UTF-8, atomically.

    Raises:
        CorpusError: If the disk is full.
    """
    atomic_write_bytes(url, text.encode())
