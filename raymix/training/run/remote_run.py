"""Runs that are kept at a URL: worked on in a directory of this machine, sent there as they go.

```
driver    sends recipes, the mixture log, the controller's state, a request to stop, the report
          fetches the metrics, where workers on other machines write them
rank 0    sends the metrics, and each checkpoint: its `state.json` last, which makes it one
          fetches a request to stop
```

What is at the URL is the truth: a run goes on from it alone, on any machine. A checkpoint there is
whole if its `state.json` is there and every file has the size that this says. Metrics and log are
sent before a checkpoint, so they are never behind one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

import pyarrow.fs as pafs

from raymix.errors import StorageError, TrainingError
from raymix.store.remote import files
from raymix.store.remote.errors import translate_storage_errors, with_retries
from raymix.store.remote.mirror import Mirror, download, upload
from raymix.training.run.checkpoint import (
    STATE,
    TrainingState,
    newest_checkpoint,
    parse_state,
    read_state,
)
from raymix.training.run.rundir import RunDirectory

RECIPES = ("recipe.yaml", "environment.json", "resolved.yaml")
WORKERS = ("metrics.jsonl", "schedule.jsonl")
"""Files that the first worker writes."""
LOGS = (*WORKERS, "mixture_log.jsonl", "controller.json")
STOP = ".stop"
_WRITTEN = (*LOGS, "tensorboard")
_AT_ONCE = 4


def newest_checkpoint_of(
    run: RunDirectory, *, note: Callable[[str], None] | None = None
) -> tuple[Path, TrainingState] | None:
    """Return the newest whole checkpoint of a run and its state; `note` is told of damaged ones.

    Where the run is kept at a URL, the path is where `fetch_checkpoint` puts the files.

    Raises:
        StorageError: If the store cannot be used.
    """
    if run.url is None:
        return newest_checkpoint(run.checkpoints, note=note)
    for name, sizes in sorted(_checkpoints(run).items(), reverse=True):
        place = files.join(run.url, "checkpoints", name)
        try:
            raw = with_retries(lambda place=place: files.read_bytes(files.join(place, STATE)))
            return run.checkpoints / name, parse_state(raw, sizes.__getitem__, place)
        except FileNotFoundError:  # its writer was killed
            continue
        except TrainingError as error:
            if note is not None:
                note(f"passed over {error}")
    return None


def _checkpoints(run: RunDirectory) -> dict[str, dict[str, int]]:
    """Return the sizes of the files of each checkpoint at the run's URL, by their names."""
    assert run.url is not None
    url = files.join(run.url, "checkpoints")
    filesystem, base = files.locate(url)
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    with translate_storage_errors(url):
        infos = filesystem.get_file_info(selector)
    found: dict[str, dict[str, int]] = {}
    for info in infos:
        name, _, file = info.path.removeprefix(base).strip("/").partition("/")
        if file and info.type == pafs.FileType.File and name.startswith("step-"):
            found.setdefault(name, {})[file] = info.size
    return found


def fetch_checkpoint(run: RunDirectory, checkpoint: Path) -> Path:
    """Return the directory with the files of a checkpoint, on this machine; fetch what is not.

    One process of a machine fetches, the others wait for it.

    Raises:
        TrainingError: If it is not whole.
        StorageError: If the store cannot be used.
    """
    if run.url is None:
        return checkpoint
    here = run.checkpoints / checkpoint.name
    there = files.join(run.url, "checkpoints", checkpoint.name)
    here.parent.mkdir(parents=True, exist_ok=True)
    with (here.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = with_retries(lambda: files.read_bytes(files.join(there, STATE)))
        if _is_here(here, wanted):
            return here
        shutil.rmtree(here, ignore_errors=True)
        temporary = here.with_name(f".{here.name}.{os.getpid()}")
        temporary.mkdir()
        names = [name for name in files.list_directory(there) if name != STATE]
        _each(names, lambda name: download(files.join(there, name), temporary / name))
        (temporary / STATE).write_bytes(wanted)
        os.replace(temporary, here)
        read_state(here)
    return here


def _is_here(here: Path, state: bytes) -> bool:
    with suppress(OSError, TrainingError):
        if (here / STATE).read_bytes() == state:
            read_state(here)
            return True
    return False


def clear_checkpoints(run: RunDirectory, but: Path | None) -> None:
    """Delete the copies of checkpoints on this machine: they may be of a run that was not kept."""
    for path in run.checkpoints.glob("step-*") if run.url else ():
        if but is None or path.name != but.name:
            shutil.rmtree(path, ignore_errors=True)


def upload_checkpoint(run: RunDirectory, checkpoint: Path, *, keep: int) -> None:
    """Send a checkpoint to the run's URL, and delete all there but the newest `keep`.

    Metrics and logs go first. A run without a URL is left as it is.

    Raises:
        StorageError: If the store cannot be used; what was there before is still there.
        TrainingError: If the run's metrics are gone from this machine; nothing is sent then, as
            a checkpoint without them would leave a gap.
    """
    if run.url is None:
        return
    if not run.metrics.exists():
        raise TrainingError.at(
            "run.dir",
            run.url,
            f"its files were removed from {run.path} while it was working on them",
            fix="Give the same command again",
        )
    run.mirror().send(*_WRITTEN)
    above = files.join(run.url, "checkpoints")
    there = files.join(above, checkpoint.name)
    files.remove(files.join(there, STATE))
    names = [path.name for path in checkpoint.iterdir() if path.name != STATE]
    _each(names, lambda name: upload(checkpoint / name, files.join(there, name)))
    state = (checkpoint / STATE).read_bytes()
    with_retries(lambda: files.atomic_write_bytes(files.join(there, STATE), state))
    found = _checkpoints(run)
    whole = sorted(name for name, sizes in found.items() if STATE in sizes)
    for name in set(found) - set(whole[-keep:]):
        files.remove(files.join(above, name, STATE))
        files.remove(files.join(above, name))


def remove_working_copy(run: RunDirectory) -> None:
    """Delete the files on this machine of a run that is finished and kept elsewhere."""
    if run.url is not None:
        shutil.rmtree(run.path, ignore_errors=True)


def _each(names: Sequence[str], move: Callable[[str], None]) -> None:
    """Call `move` for every name, some at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(with_retries, lambda name=name: move(name)) for name in names]:
            done.result()


class RunSync:
    """Sends and fetches files of a run now and then, and once more at the end: a context manager.

    Does nothing for a run without a URL. A store that fails for a while does no harm: the work is
    tried again, and only the last time must succeed.
    """

    def __init__(
        self, run: RunDirectory, *, send: Sequence[str] = (), fetch: Sequence[str] = ()
    ) -> None:
        """Keep the files `send` at the run's URL like those here, and those here like `fetch`."""
        self._send, self._fetch = tuple(send), tuple(fetch)
        self._mirror = run.mirror() if run.url is not None else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="raymix-keeper", daemon=True)

    def __enter__(self) -> Self:
        if self._mirror is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._mirror is None:
            return
        self._ended.set()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return  # the second Ctrl-C does not wait
        self._thread.join()
        # What ended the work is the better error.
        with suppress(*(() if kind is None else (StorageError, OSError))):
            self._look(self._mirror)

    def _keep(self) -> None:
        assert self._mirror is not None
        while not self._ended.wait(self._mirror.pause):
            with suppress(StorageError, OSError):
                self._look(self._mirror)

    def _look(self, mirror: Mirror) -> None:
        mirror.send(*self._send)
        mirror.fetch(*self._fetch)
