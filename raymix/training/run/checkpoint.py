"""Checkpoints: a Hugging Face model, the optimizer's state, and the state of the data order.

```
checkpoints/step-00000100/config.json, model.safetensors, tokenizer files
checkpoints/step-00000100/optimizer.safetensors     see `raymix.training.run.optimizer_state`
checkpoints/step-00000100/adapter_config.json, adapter_model.safetensors     with `model.lora`,
                                                     instead of model.safetensors
checkpoints/step-00000100/state.json                 the rest, and the size of every other file
```

A checkpoint is written under a temporary name and renamed when complete. Nothing in it depends on
the number of ranks or on how parameters were sharded. `state.json` lists the files' sizes, so a
checkpoint that was truncated later (a full disk, an interrupted copy) is detected and skipped. What
is not finite is not saved: every run that went on from it would fail.

This module reads them; `raymix.training.run.checkpoint_writer` writes them.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymix._utils.json import parse_json
from raymix.errors import RecipeError, TrainingError, UnreachableError

FORMAT = 1
"""The number of the format in `state.json`."""
STATE_FILE = "state.json"
"""The file that makes a directory a checkpoint."""
# A network file system fails for seconds where its server is restarted or a path is taken over.
_READ_DELAYS_S = (0.1, 0.2, 0.4, 0.8, 1.6)
# Errors that say that a file is not there; all others say nothing about it.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class DamagedError(TrainingError):
    """A checkpoint that is not whole, such as one that was cut short."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The part of a checkpoint that is not tensors, in JSON types."""

    step: int
    """Optimizer steps done."""
    sampler: dict[str, Any]
    """The stream's state: position, carries, counts, mixture log."""
    controller: dict[str, Any] | None
    """The controller's snapshot."""
    corpus_fingerprint: str
    """Hash of the corpus' content."""
    recipe_hash: str
    """Hash of the identifying recipe fields."""
    world_size: int
    """Workers that wrote it; any number may resume from it."""
    micro_batch_rows: int
    """Rows per forward pass; reused on as many workers, so that rounding is the same."""
    seed: int
    """Seed of the run: random numbers of a step follow from seed, step and rank."""
    tokens: dict[str, int]
    """Tokens trained on, by domain."""
    window: dict[str, list[float | None]]
    """Losses (`nats`) and label counts (`labels`) by domain since the window began.

    None stands for NaN, which JSON does not have.
    """
    left: dict[str, int] = field(default_factory=dict)
    """Tokens trained on of domains that the run no longer reads."""
    domain_fingerprints: dict[str, str] = field(default_factory=dict)
    """Hash of each domain's content; empty in checkpoints of earlier versions."""
    tokenizer: str = ""
    """Hash of the tokenizer; empty in checkpoints of earlier versions."""


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after `step` steps."""
    # Zero-padded, so that sorting names sorts steps.
    return f"step-{step:08d}"


def disk_full(error: Exception, directory: Path) -> Exception:
    """Return a RecipeError if `error` means that the disk is full, else `error` itself."""
    # ENOSPC: the disk; EDQUOT: the user's quota; EFBIG: the process' file size limit (ulimit).
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors raises a type of its own that carries no errno, only Rust's text for it.
    if not full and not any(
        text in str(error) for text in ("No space left", "os error 28", "os error 27")
    ):
        return error
    return RecipeError.at(
        "run.dir",
        str(directory),
        "the disk is full",
        fix="Free space there and run the same command again: it resumes from the last checkpoint",
    )


def read_state(checkpoint: Path) -> TrainingState:
    """Return the state in a checkpoint.

    Raises:
        DamagedError: If the checkpoint is not whole.
        TrainingError: If it is of a newer format.
        UnreachableError: If it cannot be read for some seconds; its content may be whole.
    """

    def read() -> TrainingState:
        raw = (checkpoint / STATE_FILE).read_bytes()
        return parse_state(raw, lambda name: (checkpoint / name).stat().st_size, str(checkpoint))

    try:
        return _with_retries(read)
    except _ABSENT as error:
        raise _damaged(str(checkpoint), error) from error
    except OSError as error:
        # Not damage: for that the run would go back to an older checkpoint, or to its beginning.
        raise UnreachableError.at(
            "checkpoint",
            str(checkpoint),
            f"cannot be read: {error.strerror}",
            fix="Nothing was changed: check the disk or mount, and run the same command again",
        ) from error


def _with_retries(read: Callable[[], TrainingState]) -> TrainingState:
    for delay in _READ_DELAYS_S:
        try:
            return read()
        except _ABSENT:
            raise
        except OSError:
            time.sleep(delay)
    return read()


def parse_state(raw: bytes, size: Callable[[str], int], location: str) -> TrainingState:
    """Return the state in `state.json`, after checking the sizes of the files beside it.

    Args:
        raw: Content of `state.json`.
        size: Returns the bytes of a file beside it; raises OSError or KeyError if there is none.
        location: Path or URL of the checkpoint, for messages.

    Raises:
        DamagedError: If the checkpoint is not whole.
        TrainingError: If it is of a newer format.
        OSError: If a file beside it cannot be looked at.
    """
    try:
        document = parse_json(raw)
        if document["format"] > FORMAT:
            raise TrainingError.at(
                "checkpoint",
                location,
                f"format {document['format']}, this raymix reads up to {FORMAT}",
                fix="Upgrade raymix",
            )
        sizes: dict[str, int] = document.pop("files")
        for name, expected in sizes.items():
            # `state.json` may come from a store that others write to: no `../` into other files.
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a file name")
            if size(name) != expected:
                raise ValueError(f"{name} is not {expected} bytes long")
        del document["format"]
        return TrainingState(**document)
    except (*_ABSENT, ValueError, KeyError, TypeError) as error:
        raise _damaged(location, error) from error


def _damaged(location: str, error: Exception) -> DamagedError:
    return DamagedError.at("checkpoint", location, f"damaged: {error}")


def newest_checkpoint(
    directory: Path, *, note: Callable[[str], None] | None = None
) -> tuple[Path, TrainingState] | None:
    """Return the newest whole checkpoint and its state; `note` gets a line per damaged one.

    Raises:
        TrainingError: If a newer one is of a newer format.
        StorageError: If one cannot be read.
    """
    return next(whole_checkpoints(directory, note=note), None)


def whole_checkpoints(
    directory: Path, *, note: Callable[[str], None] | None = None
) -> Iterator[tuple[Path, TrainingState]]:
    """Yield the whole checkpoints and their states, the newest first; see `newest_checkpoint`."""
    for path in sorted(_checkpoints(directory), reverse=True):
        try:
            yield path, read_state(path)
        except DamagedError as error:
            if note is not None:
                note(f"skipped {error}")


def _checkpoints(directory: Path) -> Iterator[Path]:
    return directory.glob("step-[0-9]*") if directory.is_dir() else iter(())
