"""Runs at a URL: a local working directory, synchronized with an object store.

```
driver    sends recipes, the mixture log, the controller's state, stop requests, the report
          fetches the metrics, which workers on other machines write
rank 0    sends the metrics and each checkpoint, whose `state.json` goes last and completes it
          fetches stop requests
```

The URL is authoritative: a run resumes from it alone, on any machine. A checkpoint there is
complete if its `state.json` exists and every file has the size that this lists. Metrics and
mixture log are sent before a checkpoint, so they always reach at least as far.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
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
    STATE_FILE,
    DamagedError,
    TrainingState,
    parse_state,
    read_state,
    whole_checkpoints,
)
from raymix.training.run.rundir import RunDirectory

RECIPE_FILES = ("recipe.yaml", "environment.json", "resolved.yaml")
WORKER_FILES = ("metrics.jsonl", "schedule.jsonl")
"""Files that rank 0 writes."""
LOG_FILES = (*WORKER_FILES, "mixture_log.jsonl", "controller.json")
STOP_FILE = ".stop"
_BEFORE_CHECKPOINT = (*LOG_FILES, "tensorboard")
_ABANDON_S = 3.0
# A single stream does not fill the line to a store; more than a few only compete for it.
_PARALLEL_TRANSFERS = 4


def newest_checkpoint_of(
    run: RunDirectory, *, note: Callable[[str], None] | None = None
) -> tuple[Path, TrainingState] | None:
    """Return the newest whole checkpoint of a run and its state; see `whole_checkpoints_of`."""
    return next(whole_checkpoints_of(run, note=note), None)


def whole_checkpoints_of(
    run: RunDirectory, *, note: Callable[[str], None] | None = None
) -> Iterator[tuple[Path, TrainingState]]:
    """Yield the whole checkpoints of a run and their states, the newest first.

    For a run at a URL, the path is the one to which `fetch_checkpoint` downloads the files.

    Args:
        run: The run.
        note: Gets a line per damaged checkpoint.

    Raises:
        StorageError: If the store or the disk cannot be read.
        TrainingError: If a checkpoint is of a newer format.
    """
    if run.url is None:
        yield from whole_checkpoints(run.checkpoints, note=note)
        return
    for name, sizes in sorted(_checkpoints(run).items(), reverse=True):
        url = files.join(run.url, "checkpoints", name)
        try:
            raw = with_retries(lambda url=url: files.read_bytes(files.join(url, STATE_FILE)))
            state = parse_state(raw, sizes.__getitem__, url)
        except FileNotFoundError:
            # Its writer was killed before it sent `state.json`.
            continue
        except DamagedError as error:
            if note is not None:
                note(f"skipped {error}")
            continue
        yield run.checkpoints / name, state


def move_checkpoint(run: RunDirectory, name: str, folder: str) -> str:
    """Move a checkpoint of a run to a folder beside the checkpoints, and return its new location.

    Raises:
        StorageError: If the store cannot be used.
    """
    parent = files.join(run.where, "checkpoints")
    target = files.join(parent, folder, name)
    number = 2
    while files.exists(target):
        target = files.join(parent, folder, f"{name}-{number}")
        number += 1
    if run.url is None:
        Path(target).parent.mkdir(exist_ok=True)
        os.replace(files.join(parent, name), target)
        return target
    source = files.join(parent, name)
    names = [each for each in files.list_directory(source) if each != STATE_FILE]
    # A store copies file by file. The state goes last: until then the checkpoint counts as damaged,
    # and without it, it would be taken for what a killed upload left, and removed.
    for each in [*names, STATE_FILE]:
        files.move(files.join(source, each), files.join(target, each))
    return target


def _checkpoints(run: RunDirectory) -> dict[str, dict[str, int]]:
    """Return the file sizes of each checkpoint at the run's URL, by checkpoint and file name."""
    assert run.url is not None
    url = files.join(run.url, "checkpoints")
    filesystem, base = files.locate(url)
    # One recursive listing, not one per checkpoint: a store charges a round trip for each request.
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    with translate_storage_errors(url):
        infos = filesystem.get_file_info(selector)
    checkpoints: dict[str, dict[str, int]] = {}
    for info in infos:
        name, _, file = info.path.removeprefix(base).strip("/").partition("/")
        if file and info.type == pafs.FileType.File and name.startswith("step-"):
            checkpoints.setdefault(name, {})[file] = info.size
    return checkpoints


def fetch_checkpoint(run: RunDirectory, checkpoint: Path) -> Path:
    """Return the local directory of a checkpoint, downloading it if needed.

    One process per machine downloads, the others wait for it.

    Raises:
        TrainingError: If the checkpoint is incomplete.
        StorageError: If the store cannot be used.
    """
    if run.url is None:
        return checkpoint
    local = run.checkpoints / checkpoint.name
    url = files.join(run.url, "checkpoints", checkpoint.name)
    local.parent.mkdir(parents=True, exist_ok=True)
    # All ranks of a machine share the directory; the kernel drops the lock of a killed one.
    with (local.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = with_retries(lambda: files.read_bytes(files.join(url, STATE_FILE)))
        if _is_downloaded(local, state):
            return local
        shutil.rmtree(local, ignore_errors=True)
        # Renamed when complete, so a killed download is not taken for a checkpoint.
        temporary = local.with_name(f".{local.name}.{os.getpid()}")
        temporary.mkdir()
        names = [name for name in files.list_directory(url) if name != STATE_FILE]
        _transfer(names, lambda name: download(files.join(url, name), temporary / name))
        (temporary / STATE_FILE).write_bytes(state)
        os.replace(temporary, local)
        # Raises if a file changed at the store while it was downloaded.
        read_state(local)
    return local


def _is_downloaded(local: Path, state: bytes) -> bool:
    with suppress(OSError, TrainingError):
        # Same bytes, not same step: another attempt may have written the step anew.
        if (local / STATE_FILE).read_bytes() == state:
            read_state(local)
            return True
    return False


def clear_checkpoints(run: RunDirectory, but: Path | None) -> None:
    """Delete local copies of checkpoints of a run at a URL, except that named as `but`."""
    # They may be of an attempt whose upload failed; the store decides which checkpoints exist.
    for path in run.checkpoints.glob("step-*") if run.url else ():
        if but is None or path.name != but.name:
            shutil.rmtree(path, ignore_errors=True)


def upload_checkpoint(run: RunDirectory, checkpoint: Path, *, keep: int) -> None:
    """Upload a checkpoint to the run's URL, and delete all but the newest `keep` there.

    Metrics and logs are sent first. Does nothing for a run without a URL.

    Raises:
        StorageError: If the store cannot be used; earlier checkpoints are still there.
        TrainingError: If the run's metrics are gone from this machine; nothing is sent then, as
            a checkpoint without them would leave a gap in the metrics.
    """
    if run.url is None:
        return
    if not run.metrics.exists():
        raise TrainingError.at(
            "run.dir",
            run.url,
            f"its files were removed from {run.path} while it was running",
            fix="Run the same command again",
        )
    run.mirror().send(*_BEFORE_CHECKPOINT)
    parent = files.join(run.url, "checkpoints")
    url = files.join(parent, checkpoint.name)
    # A store has no directory rename, so `state.json` decides: gone before the first file changes,
    # back after the last. A reader never takes a mixture of two attempts for a checkpoint.
    files.remove(files.join(url, STATE_FILE))
    names = [path.name for path in checkpoint.iterdir() if path.name != STATE_FILE]
    _transfer(names, lambda name: upload(checkpoint / name, files.join(url, name)))
    state = (checkpoint / STATE_FILE).read_bytes()
    with_retries(lambda: files.atomic_write_bytes(files.join(url, STATE_FILE), state))
    whole = [path.name for path, _ in whole_checkpoints_of(run)]
    # Also removes what killed uploads left. Damaged checkpoints count for nothing and stay: if they
    # counted, the whole ones would be removed.
    left = [name for name, sizes in _checkpoints(run).items() if STATE_FILE not in sizes]
    for name in [*left, *whole[keep:]]:
        files.remove(files.join(parent, name, STATE_FILE))
        files.remove(files.join(parent, name))


def remove_working_copy(run: RunDirectory) -> None:
    """Delete the local files of a finished run at a URL."""
    if run.url is not None:
        shutil.rmtree(run.path, ignore_errors=True)


def _transfer(names: Sequence[str], move: Callable[[str], None]) -> None:
    """Call `move` for every name, a few in parallel."""
    with ThreadPoolExecutor(_PARALLEL_TRANSFERS) as pool:
        transfers = [pool.submit(with_retries, lambda name=name: move(name)) for name in names]
        for transfer in transfers:
            transfer.result()


class RunSync:
    """Sends and fetches files of a run periodically and at its end; a context manager.

    Does nothing for a run without a URL. A store that fails for a while does no harm: the
    transfer is tried again, and only the last one must succeed.
    """

    def __init__(
        self, run: RunDirectory, *, send: Sequence[str] = (), fetch: Sequence[str] = ()
    ) -> None:
        """Prepare to copy the files `send` to the run's URL, and the files `fetch` from it."""
        self._send, self._fetch = tuple(send), tuple(fetch)
        self._mirror = run.mirror() if run.url is not None else None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._repeat, name="raymix-sync", daemon=True)

    def __enter__(self) -> Self:
        if self._mirror is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._mirror is None:
            return
        self._ended.set()
        # The second Ctrl-C does not wait for a transfer, only for its end where that is near: a
        # process that ends inside a call of the store's client may crash.
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._thread.join(_ABANDON_S)
            return
        self._thread.join()
        # An error of the store must not hide the error that ended the work.
        with suppress(*(() if kind is None else (StorageError, OSError))):
            self._sync(self._mirror)

    def refresh(self) -> None:
        """Copy now what is newer; a store that fails does no harm."""
        if self._mirror is not None:
            with suppress(StorageError, OSError):
                self._sync(self._mirror)

    def _repeat(self) -> None:
        assert self._mirror is not None
        while not self._ended.wait(self._mirror.pause):
            self.refresh()

    def _sync(self, mirror: Mirror) -> None:
        with self._lock:
            mirror.send(*self._send)
            mirror.fetch(*self._fetch)
