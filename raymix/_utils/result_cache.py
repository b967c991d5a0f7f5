"""Results of slow functions in files of the user's cache directory.

A result is found again for the same inputs, the same versions of the libraries that computed it,
and unchanged source files of raymix. A directory that cannot be read or written only costs time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

_PACKAGE = Path(__file__).parents[1]
# Some kB each; the oldest go first.
_MAX_FILES = 500


def cached(
    inputs: Iterable[str], compute: Callable[[], T], kind: type[T], libraries: Iterable[str] = ()
) -> T:
    """Return `compute()`, from its file if there is one for these inputs.

    Args:
        inputs: Texts that determine the result together; the first says what is computed.
        compute: Returns the result. What it raises is raised, and not stored.
        kind: The type of the result: a dataclass or another type that pydantic reads from JSON.
        libraries: Distributions whose version the result depends on.
    """
    directory = _directory()
    if directory is None:
        return compute()
    versions = [f"{name} {_version(name)}" for name in libraries]
    key = "\0".join([*inputs, *versions, sys.version, _source_digest()])
    path = directory / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    adapter = TypeAdapter(kind)
    with suppress(OSError, ValidationError):
        return adapter.validate_json(path.read_bytes())
    result = compute()
    with suppress(OSError):
        _write(path, adapter.dump_json(result))
    return result


def _directory() -> Path | None:
    # Not made here: a home that does not exist, or cannot be written to, is no error.
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "raymix" if os.path.isabs(base) else None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Renamed into place: another process may read it now.
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)
    stored = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)
    for file in stored[:-_MAX_FILES]:
        file.unlink(missing_ok=True)


@lru_cache
def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@lru_cache
def _source_digest() -> str:
    """Return a digest of the names, sizes and times of raymix's source files."""
    # An installation that is developed has one version for many states of its source.
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
