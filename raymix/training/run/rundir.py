"""The run directory: who may use it, what it holds, and how a resumed run starts clean.

```
RUN/recipe.yaml           what the user wrote: fields left at their defaults are absent
RUN/resolved.yaml         every field; its presence makes the directory a run
RUN/environment.json      versions, machine, code revision of the last start
RUN/mixture_log.jsonl     the weights and the steps they start at (written by the controller)
RUN/metrics.jsonl         one object per step; `step` counts the optimizer steps done
RUN/schedule.jsonl        in document mode: lengths of some steps, and what deals them out
RUN/checkpoints/step-XXXXXXXX/
RUN/tensorboard/
RUN/report.html, report.json
```

A run whose place is a URL is worked on in a directory of this machine; see
`raymix.training.run.remote_run`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from raymix._utils.json import parse_json
from raymix._utils.yaml import dump_yaml, parse_yaml
from raymix.errors import RecipeError
from raymix.recipe import Recipe, recipe_to_yaml
from raymix.store import atomic_write_text
from raymix.store.remote import files
from raymix.store.remote.errors import is_remote
from raymix.store.remote.mirror import Mirror

IfExists = Literal["resume", "fail", "new"]

# What may differ between the runs of one directory: it changes neither batches nor mathematics
# beyond rounding. The corpus is known by its fingerprint, which every checkpoint holds.
_FREE_FIELDS = (
    "name",
    "corpus",
    "cluster",
    "eval",
    "run",
    "tune",
    "specialists",
    "data.accept_changed_corpus",
    "data.assign",
    "data.cache_bytes",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.micro_batch_rows",
    "train.parallel",
    "train.compile",
    "train.activation_checkpointing",
)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths of a run."""

    path: Path
    """Where its files are on this machine."""
    url: str | None = None
    """Where they are kept, if that is elsewhere."""

    @classmethod
    def at(cls, place: str, role: str = "run") -> Self:
        """Return the run at a path or a URL; what a URL holds is worked on in a directory here.

        Args:
            place: The path or URL.
            role: Names the directory here: two processes of a run may not write to the same files.
        """
        if not is_remote(place):
            return cls(Path(os.path.abspath(place)))
        url = place.rstrip("/")
        return cls(_scratch(url) / role / url.rsplit("/", 1)[-1], url)

    def on_worker(self) -> RunDirectory:
        """Return the same run as a worker, maybe on another machine, works on it."""
        return self if self.url is None else RunDirectory.at(self.url, "worker")

    @property
    def where(self) -> str:
        """Return where the run is kept: its path or URL."""
        return self.url or str(self.path)

    def mirror(self) -> Mirror:
        """Return what sends and fetches the files of a run with a URL."""
        assert self.url is not None
        return Mirror(self.url, self.path)

    @property
    def metrics(self) -> Path:
        """Return the path of the metrics."""
        return self.path / "metrics.jsonl"

    @property
    def mixture_log(self) -> Path:
        """Return the path of the mixture log."""
        return self.path / "mixture_log.jsonl"

    @property
    def schedule(self) -> Path:
        """Return the path of the lengths of some steps, from which their schedules follow."""
        return self.path / "schedule.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Return the directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def resolved(self) -> Path:
        """Return the path of the whole recipe."""
        return self.path / "resolved.yaml"

    @property
    def stop_request(self) -> Path:
        """Return the file whose presence asks the workers to stop at the next step."""
        return self.path / ".stop"

    def recipe(self) -> Recipe:
        """Return the recipe of the run.

        Raises:
            RecipeError: If this is no run directory.
        """
        from raymix.recipe import load_recipe

        if not self.resolved.is_file():
            raise RecipeError.at(
                "run",
                self.where,
                "not a run directory: it has no resolved.yaml",
                fix="Name a directory of a run",
            )
        return load_recipe(self.resolved)

    def write_recipe(self, recipe: Recipe) -> None:
        """Write both forms of the recipe; `resolved.yaml` last."""
        self.path.mkdir(parents=True, exist_ok=True)
        given = recipe.model_dump(mode="json", exclude_unset=True)
        atomic_write_text(str(self.path / "recipe.yaml"), dump_yaml(given))
        atomic_write_text(str(self.resolved), recipe_to_yaml(recipe))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; the kernel lets go when the process dies.

        Raises:
            RecipeError: If another live process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise RecipeError.at(
                    "run.dir",
                    self.where,
                    f"in use by {holder}",
                    fix="Wait for it, stop it, or give another run.dir",
                ) from error
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield


def open_run(recipe: Recipe, if_exists: IfExists) -> RunDirectory:
    """Return the run directory that `recipe` names, or a free one beside it; writes nothing.

    Raises:
        RecipeError: If the directory is taken: by anything but a run, by a run of another
            recipe, or by any run when `if_exists` is `fail`.
    """
    run = RunDirectory.at(_place(recipe))
    names = _visible(run)
    if not names:
        return run
    if if_exists == "new":
        return RunDirectory.at(_next_free(run.where))
    where = run.where
    if run.resolved.name not in names:
        raise RecipeError.at(
            "run.dir", where, "the directory holds files but no run", fix="Give another run.dir"
        )
    if if_exists == "fail":
        raise RecipeError.at(
            "run.dir",
            where,
            "a run is here already",
            fix="Use --if-exists resume to go on, or --if-exists new for a fresh directory",
        )
    differing = differences(identity(_stored(run)), identity(recipe.model_dump(mode="json")))
    if differing:
        raise RecipeError.at(
            "run.dir",
            where,
            f"a run of another recipe is here; it differs in {'; '.join(differing)}",
            fix="Use --if-exists new, give another run.dir, or set the recipe back",
        )
    return run


def identity(document: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe's document that make a run what it is, by dotted path."""
    flat = dict(_flat(document, ""))
    return {
        path: value
        for path, value in flat.items()
        if not any(path == free or path.startswith(f"{free}.") for free in _FREE_FIELDS)
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `path: old -> new` for every field that differs, in order of path."""
    absent = "absent"
    return [
        f"{path}: {old.get(path, absent)!r} -> {new.get(path, absent)!r}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path, absent) != new.get(path, absent)
    ]


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop all lines after step `last_step`, and a torn last line, in a new file.

    A worker that outlived its driver still has the old file open and goes on writing there,
    where nobody reads.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.writelines(
            line.rstrip(b"\n") + b"\n" for line, found in _lines(path) if found["step"] <= last_step
        )
    os.replace(temporary, path)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a metrics file, of which a long run has millions.

    A torn last line is left out.
    """
    return (found for _, found in _lines(path))


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines of a metrics file, as they are and parsed, less those that are damaged."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                found = parse_json(line)
                whole = type(found["step"]) is int
            except (ValueError, KeyError, TypeError):
                continue
            if whole:
                yield line, found


def _place(recipe: Recipe) -> str:
    template = recipe.run.dir
    try:
        filled = template.format(name=recipe.name, seed=recipe.seed)
    except (KeyError, IndexError, ValueError) as error:
        raise RecipeError.at(
            "run.dir", template, f"{error} is unknown", allowed="Allowed in braces: name, seed"
        ) from error
    return filled


def _scratch(url: str) -> Path:
    """Return the directory of this machine for what is kept at `url`, which only we can read.

    Raises:
        RecipeError: If somebody else made it.
    """
    above = Path(tempfile.gettempdir()) / f"raymix-{os.getuid()}"
    above.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = above.lstat()
    if facts.st_uid != os.getuid() or not above.is_dir() or above.is_symlink():
        raise RecipeError.at(
            "run.dir",
            url,
            f"{above}, where it would be worked on, belongs to somebody else",
            fix="Set TMPDIR to a directory of your own",
        )
    return above / hashlib.blake2b(url.encode(), digest_size=8).hexdigest()


def _visible(run: RunDirectory) -> list[str]:
    """Return the names of what the run's place holds, hidden files left out."""
    files.check_store(run.where, "run.dir")
    if run.url is None and run.path.exists() and not run.path.is_dir():
        raise RecipeError.at("run.dir", run.where, "a file, not a directory")
    return [name for name in files.list_directory(run.where) if not name.startswith(".")]


def _next_free(place: str) -> str:
    number = 2
    while files.exists(candidate := f"{place}-{number}"):
        number += 1
    return candidate


def _stored(run: RunDirectory) -> dict[str, Any]:
    try:
        text = files.read_bytes(files.join(run.where, run.resolved.name)).decode()
        document = parse_yaml(text, name="run.dir", value=run.where)
        return Recipe.model_validate(document).model_dump(mode="json")
    except (ValueError, RecipeError) as error:
        raise RecipeError.at(
            "run.dir",
            run.where,
            "resolved.yaml cannot be read; it was written by another version or damaged",
        ) from error


def _flat(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, item in node.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
