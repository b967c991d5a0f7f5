"""Exclusive use of a run at a URL: a lock file that its owner rewrites as a heartbeat.

Object stores have no locks. The owner of a run writes its identity to the file `.lock` and changes
it every few seconds; a process that sees it unchanged for longer takes the run over. This compares
contents, never times, so clocks need not agree. It prevents a second start by mistake; two starts
within the same second can both succeed.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from raymix._utils.json import parse_json
from raymix.errors import RaymixError, RecipeError
from raymix.store.remote import files
from raymix.store.remote.errors import with_retries
from raymix.training.run.rundir import RunDirectory

HEARTBEAT_INTERVAL_S = 5.0
# Beats that a live owner may miss, as a store may be slow or fail for some seconds.
_MAX_MISSED_BEATS = 4
_NAME = ".lock"


@contextmanager
def run_lock(run: RunDirectory, *, note: Callable[[str], None]) -> Iterator[None]:
    """Lock a run for this process: on this machine and, if it is at a URL, on all machines.

    Args:
        run: The run.
        note: Gets a line if this has to wait for a possibly dead owner.

    Raises:
        RecipeError: If another live process uses the run.
        StorageError: If the store cannot be used.
    """
    with run.locked():
        if run.url is None:
            yield
            return
        url = files.join(run.url, _NAME)
        _wait_until_stale(run, url, note)
        heartbeat = _Heartbeat(url, run)
        try:
            yield
        finally:
            heartbeat.stop()


class _Heartbeat:
    """Rewrites the lock file every few seconds in a background thread."""

    def __init__(self, url: str, run: RunDirectory) -> None:
        """Write the lock file, and start the thread."""
        self._url, self._run = url, run
        self._owner = _identity(run)
        self._ended = threading.Event()
        with_retries(self._beat)
        # A daemon: an interpreter that exits on an error is not to wait for the next beat.
        self._thread = threading.Thread(target=self._repeat, name="raymix-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Release the run."""
        self._ended.set()
        # A beat still in flight would write the file again after its removal.
        self._thread.join()
        with suppress(RaymixError, OSError):
            if not self._lost():
                files.remove(self._url)

    def _beat(self) -> None:
        # Random, so that no two beats are alike, whatever the clocks say.
        self._owner["beat"] = uuid.uuid4().hex
        files.atomic_write_text(self._url, json.dumps(self._owner))

    def _repeat(self) -> None:
        while not self._ended.wait(HEARTBEAT_INTERVAL_S):
            # A store that fails is tried again at the next beat.
            with suppress(RaymixError, OSError):
                if self._lost():
                    # Two writers would mix their checkpoints: stop at the next step.
                    self._run.stop_request.touch()
                    return
                self._beat()

    def _lost(self) -> bool:
        """Return whether another process has taken the run over, assuming this one dead."""
        owner = _read(self._url)
        return bool(owner) and owner.get("token") != self._owner["token"]


def _identity(run: RunDirectory) -> dict[str, Any]:
    # Hashed: the lock file is public to the store's readers, a local path need not be.
    directory_hash = hashlib.blake2b(str(run.path).encode(), digest_size=8).hexdigest()
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "place": directory_hash,
    }


def _read(url: str) -> dict[str, Any]:
    try:
        owner = parse_json(files.read_bytes(url))
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _wait_until_stale(run: RunDirectory, url: str, note: Callable[[str], None]) -> None:
    """Wait until the lock file is absent or has not changed for several beats.

    Raises:
        RecipeError: If its owner is alive.
    """
    first = with_retries(lambda: _read(url))
    own = _identity(run)
    # An owner on this machine with the same directory is dead: this process has the directory's
    # flock, which the kernel releases only when its holder ends.
    if not first or (first.get("host"), first.get("place")) == (own["host"], own["place"]):
        return
    holder = f"process {first.get('process')} on {first.get('host')}"
    seconds = HEARTBEAT_INTERVAL_S * _MAX_MISSED_BEATS
    note(f"waiting {seconds:g} s to see whether {holder} still works on {run.where}")
    for _ in range(_MAX_MISSED_BEATS):
        time.sleep(HEARTBEAT_INTERVAL_S)
        current = with_retries(lambda: _read(url))
        if not current:
            return
        if current != first:
            raise RecipeError.at(
                "run.dir",
                run.where,
                f"in use by {holder}",
                fix="Wait for it, stop it, or give another run.dir",
            )
