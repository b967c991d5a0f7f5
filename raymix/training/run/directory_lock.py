"""Exclusive use of a directory, by a lock of the kernel or else by a file that names its owner.

The kernel releases its lock (flock) when the process dies. Some network file systems have none,
such as Lustre mounted without `-o flock`, or NFS without its lock daemon. There the owner makes the
file `.lock-owner`, which only one process can; it holds host, boot and process, by which a later
start on the same host tells that its owner is dead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from raymix._utils.json import parse_json
from raymix.errors import RecipeError

_LOCK, _OWNER = ".lock", ".lock-owner"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def in_use(directory: Path) -> bool | None:
    """Return whether a live process holds the lock of `locked`; None where nobody can tell."""
    try:
        with (directory / _LOCK).open() as lock:
            holder = lock.read()
            # Shared, and given back at once: see `_lock`.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        owner = _read(directory / _OWNER)
        return False if owner is None else _is_alive(owner)
    # Some network file systems keep such locks to one machine.
    return False if holder.endswith(f" on {socket.gethostname()}") else None


@contextmanager
def locked(directory: Path, where: str) -> Iterator[None]:
    """Lock a directory for this process, making it if needed.

    Args:
        directory: The directory.
        where: The run's location, for messages.

    Raises:
        RecipeError: If another live process holds it, or may hold it, or it cannot be locked.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # "a+": mode "w" would erase the holder's name before it is known whether there is one.
    with (directory / _LOCK).open("a+") as lock:
        try:
            _lock(lock)
        except BlockingIOError as error:
            lock.seek(0)
            raise _in_use(where, lock.read().strip() or "another process") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise RecipeError.at(
                    "run.dir", where, f"cannot be locked: {error.strerror}", fix="Check the disk"
                ) from error
            with _owner_file(directory / _OWNER, where):
                yield
            return
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _lock(file: IO[str]) -> None:
    """Lock a file; raise BlockingIOError if another process keeps it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # It may be one that only looks whether the run is in use, for microseconds.
        time.sleep(0.05)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _owner_file(path: Path, where: str) -> Iterator[None]:
    """Hold the file that names the owner of a directory.

    Raises:
        RecipeError: If another process holds it, or one on another machine may.
    """
    own = {"host": socket.gethostname(), "boot": _boot_id(), "process": os.getpid()}
    own |= {"started": _start_time(os.getpid())}
    if (owner := _read(path)) is not None:
        alive = _is_alive(owner)
        known = {"process", "host"} <= owner.keys()
        holder = f"process {owner['process']} on {owner['host']}" if known else "another process"
        if alive:
            raise _in_use(where, holder)
        if alive is None:
            raise RecipeError.at(
                "run.dir",
                where,
                f"{holder} may use it: its file system has no locks, so only that machine can tell",
                fix=f"If that process has ended, remove {path} and run the same command again",
            )
        _take_away(path, owner, where)
    try:
        # O_EXCL: of two processes one gets the file, on NFS (since version 3) and Lustre too.
        with path.open("x", encoding="utf-8") as file:
            json.dump(own, file)
    except FileExistsError as error:
        raise _in_use(where, "another process") from error
    try:
        yield
    finally:
        with suppress(OSError):
            if _read(path) == own:
                path.unlink()


def _take_away(path: Path, owner: dict[str, Any], where: str) -> None:
    """Remove the file of a dead owner, and no other: another process may do the same."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != owner:
            os.rename(aside, path)
            raise _in_use(where, "another process")
        aside.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the owner that a file names; None without the file."""
    try:
        owner = parse_json(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        # Being written, or torn by a crash.
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Return whether an owner is running; None if it is on another machine, or not known."""
    if owner.get("host") != socket.gethostname():
        return None
    if owner.get("boot") != _boot_id():
        return False
    # The start time too: the kernel gives the number of an ended process to another one.
    return _start_time(owner.get("process")) == owner.get("started")


def _start_time(process: object) -> str | None:
    """Return when a process of this machine was started; None if there is none of that number."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text("utf-8")
    except OSError:
        return None
    # Field 22 of proc(5), counted behind the name, which may have spaces and brackets.
    return stat.rpartition(")")[2].split()[19]


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text("utf-8").strip()
    except OSError:
        return ""


def _in_use(where: str, holder: str) -> RecipeError:
    return RecipeError.at(
        "run.dir",
        where,
        f"in use by {holder}",
        fix="Wait for it, stop it, or give another run.dir",
    )
