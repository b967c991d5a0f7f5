"""Who works on a run that is kept at a URL: one process at a time, told by a beating heart.

Stores have no locks. The file `.lock` says who works there and changes every few seconds; who
finds it unchanged for longer takes the run over. That needs no clocks that agree, and keeps two
starts by mistake apart; it is no proof against two at the very same moment.
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

BEAT_S = 5.0
_MISSED = 4
_NAME = ".lock"


@contextmanager
def run_lock(run: RunDirectory, *, note: Callable[[str], None]) -> Iterator[None]:
    """Hold a run for this process, on this machine and, where it is kept at a URL, on all.

    Args:
        run: The run.
        note: Told what is being waited for.

    Raises:
        RecipeError: If another live process holds it.
        StorageError: If the store cannot be used.
    """
    with run.locked():
        if run.url is None:
            yield
            return
        url = files.join(run.url, _NAME)
        _wait_for_silence(run, url, note)
        heart = _Heartbeat(url, run)
        try:
            yield
        finally:
            heart.stop()


class _Heartbeat:
    """Says every few seconds that this process works on the run."""

    def __init__(self, url: str, run: RunDirectory) -> None:
        """Write the first sign, and begin to repeat it."""
        self._url, self._run = url, run
        self._mine = _sign(run)
        self._ended = threading.Event()
        with_retries(self._beat)
        self._thread = threading.Thread(target=self._keep, name="raymix-claim", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let go of the run."""
        self._ended.set()
        self._thread.join()
        with suppress(RaymixError, OSError):
            if not self._lost():
                files.remove(self._url)

    def _beat(self) -> None:
        self._mine["beat"] = uuid.uuid4().hex
        files.atomic_write_text(self._url, json.dumps(self._mine))

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(RaymixError, OSError):  # a store that fails is asked again
                if self._lost():
                    self._run.stop_request.touch()
                    return
                self._beat()

    def _lost(self) -> bool:
        """Return whether another process took the run over, having thought this one dead."""
        found = _read(self._url)
        return bool(found) and found.get("token") != self._mine["token"]


def _sign(run: RunDirectory) -> dict[str, Any]:
    place = hashlib.blake2b(str(run.path).encode(), digest_size=8).hexdigest()
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "place": place,
    }


def _read(url: str) -> dict[str, Any]:
    try:
        found = parse_json(files.read_bytes(url))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _wait_for_silence(run: RunDirectory, url: str, note: Callable[[str], None]) -> None:
    """Return once nobody works on the run.

    Raises:
        RecipeError: If somebody does.
    """
    first = with_retries(lambda: _read(url))
    mine = _sign(run)
    if not first or (first.get("host"), first.get("place")) == (mine["host"], mine["place"]):
        return  # of this machine is only one: it has the directory here
    holder = f"process {first.get('process')} on {first.get('host')}"
    seconds = BEAT_S * _MISSED
    note(f"waiting {seconds:g} s to see whether {holder} still works on {run.where}")
    for _ in range(_MISSED):
        time.sleep(BEAT_S)
        found = with_retries(lambda: _read(url))
        if not found:
            return
        if found != first:
            raise RecipeError.at(
                "run.dir",
                run.where,
                f"in use by {holder}",
                fix="Wait for it, stop it, or give another run.dir",
            )
