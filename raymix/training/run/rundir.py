"""The run directory: its files, its lock, and the metrics of a resumed run.

```
RUN/recipe.yaml           the user's recipe: fields left at their defaults are absent
RUN/resolved.yaml         every field; its presence makes the directory a run
RUN/environment.json      versions, machine, code revision of the last start
RUN/mixture_log.jsonl     the shares and the steps they start at (written by the controller)
RUN/controller.json       the controller's state: requests to come, the mixer's state
RUN/requests/             requests of `raymix weights`, until the controller has answered them
RUN/metrics.jsonl         one object per step; `step` counts the optimizer steps done
RUN/schedule.jsonl        in document mode: lengths of some steps, their planner and cost model
RUN/checkpoints/step-XXXXXXXX/
RUN/tensorboard/
RUN/report.html, report.json
```

A run at a URL has a working directory on each machine; see `raymix.training.run.remote_run`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
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
from raymix.training.run import directory_lock
from raymix.training.run.identity import (
    LENGTH_FIELDS,
    below,
    differences,
    domain_names,
    identity,
)

IfExists = Literal["resume", "fail", "new"]
STALLS = "stalls"
"""The directory of reports on steps that take too long."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths of a run."""

    path: Path
    """Directory on this machine."""
    url: str | None = None
    """Where the run is stored, if that is a URL; `path` is then a working copy."""

    @classmethod
    def at(cls, location: str, role: str = "run") -> Self:
        """Return the run at a path or a URL; a URL gets a working directory on this machine.

        Args:
            location: The path or URL.
            role: Name of the working directory, one per writing process of the run.
        """
        if not is_remote(location):
            return cls(Path(os.path.abspath(location)))
        url = location.rstrip("/")
        return cls(_scratch(url) / role / url.rsplit("/", 1)[-1], url)

    def on_worker(self) -> RunDirectory:
        """Return the run with a worker's own working directory, maybe on another machine."""
        # A worker on the driver's machine would else write to the files that the driver sends.
        return self if self.url is None else RunDirectory.at(self.url, "worker")

    @property
    def where(self) -> str:
        """Return the location of the run: its path or URL."""
        return self.url or str(self.path)

    def mirror(self) -> Mirror:
        """Return the mirror that sends and fetches the files of a run at a URL."""
        assert self.url is not None
        return Mirror(self.url, self.path)

    @property
    def metrics(self) -> Path:
        """Return the path of the metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def mixture_log(self) -> Path:
        """Return the path of the mixture log."""
        return self.path / "mixture_log.jsonl"

    @property
    def schedule(self) -> Path:
        """Return the path of the file of document lengths, from which schedules follow."""
        return self.path / "schedule.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Return the directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def resolved(self) -> Path:
        """Return the path of the recipe with all fields."""
        return self.path / "resolved.yaml"

    @property
    def stop_request(self) -> Path:
        """Return the file whose presence asks the workers to stop at the next step."""
        return self.path / ".stop"

    @property
    def stages(self) -> Path:
        """Return the file to which rank 0 adds a line per stage before the first step."""
        return self.path / ".stages"

    @property
    def stalls(self) -> Path:
        """Return the directory of the ranks' reports on steps that take too long."""
        return self.path / STALLS

    def add_stage(self, text: str) -> None:
        """Add a line to the file of stages."""
        with self.stages.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

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
        """Write both forms of the recipe."""
        self.path.mkdir(parents=True, exist_ok=True)
        given = recipe.model_dump(mode="json", exclude_unset=True)
        atomic_write_text(str(self.path / "recipe.yaml"), dump_yaml(given))
        # Last, because its presence makes the directory a run.
        atomic_write_text(str(self.resolved), recipe_to_yaml(recipe))

    def in_use(self) -> bool | None:
        """Return whether a live process holds the lock of `locked`; None where nobody can tell."""
        return directory_lock.in_use(self.path)

    def locked(self) -> AbstractContextManager[None]:
        """Return a context that locks the directory for this process while that lives.

        Raises:
            RecipeError: If another live process holds it; when the context is entered.
        """
        return directory_lock.locked(self.path, self.where)


def open_run(
    recipe: Recipe, if_exists: IfExists, *, may_differ: frozenset[str] = frozenset()
) -> RunDirectory:
    """Return the run directory that `recipe` names, or a free one beside it; writes nothing.

    A run that is there may differ in the fields `may_differ`, and those below them.

    Raises:
        RecipeError: If the directory is in use: by anything but a run, by a run of another
            recipe, or by any run when `if_exists` is `fail`.
    """
    run = RunDirectory.at(_location(recipe))
    # A start that failed its checks may have left the hidden lock file, and nothing else.
    names = _visible_files(run)
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
            fix="Use --if-exists resume to continue it, or --if-exists new for a new directory",
        )
    stored, document = (each.model_dump(mode="json") for each in (stored_recipe(run), recipe))
    differing = [
        line
        for line in differences(identity(stored), identity(document))
        if not below(line.partition(":")[0], may_differ)
    ]
    if differing:
        fields = {line.partition(":")[0] for line in differing}
        longer = "" if fields - LENGTH_FIELDS else "--extend to make it longer, "
        if domain_names(stored) != domain_names(document):
            longer += "--domains-from STEP to change its domains, "
        raise RecipeError.at(
            "run.dir",
            where,
            f"a run of another recipe is here; it differs in {'; '.join(differing)}",
            fix=f"Use {longer}--if-exists new, give another run.dir, or restore the recipe",
        )
    return run


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop all lines after step `last_step`, and an incomplete last line, in a new file."""
    # A new file, because a worker that outlived its driver still has the old one open and appends
    # to it: truncated in place, it would mix its lines into those of the resumed run.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.writelines(
            line.rstrip(b"\n") + b"\n"
            for line, record in _lines(path)
            if record["step"] <= last_step
        )
    os.replace(temporary, path)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a metrics file, of which a long run has millions.

    Damaged lines, such as an incomplete last one, are left out.
    """
    return (record for _, record in _lines(path))


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the valid lines of a metrics file, raw and parsed."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = parse_json(line)
                # Not `isinstance`: True is an int to it.
                valid = type(record["step"]) is int
            except (ValueError, KeyError, TypeError):
                continue
            if valid:
                yield line, record


def _location(recipe: Recipe) -> str:
    template = recipe.run.dir
    try:
        return template.format(name=recipe.name, seed=recipe.seed)
    except (KeyError, IndexError, ValueError) as error:
        raise RecipeError.at(
            "run.dir", template, f"{error} is unknown", allowed="Allowed in braces: name, seed"
        ) from error


def _scratch(url: str) -> Path:
    """Return the local directory for a run at `url`, readable by this user only.

    Raises:
        RecipeError: If another user made it.
    """
    parent = Path(tempfile.gettempdir()) / f"raymix-{os.getuid()}"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The temporary directory is shared: another user may have made the name first, or a symbolic
    # link of that name, to read or redirect what is written. `lstat` does not follow links.
    status = parent.lstat()
    if status.st_uid != os.getuid() or not parent.is_dir() or parent.is_symlink():
        raise RecipeError.at(
            "run.dir",
            url,
            f"{parent}, its working directory on this machine, belongs to another user",
            fix="Set TMPDIR to a directory of your own",
        )
    # Hashed: a URL has slashes, and may be longer than a file name can be.
    return parent / hashlib.blake2b(url.encode(), digest_size=8).hexdigest()


def _visible_files(run: RunDirectory) -> list[str]:
    """Return the names of the files in the run's directory, without hidden ones."""
    files.check_store(run.where, "run.dir")
    if run.url is None and run.path.exists() and not run.path.is_dir():
        raise RecipeError.at("run.dir", run.where, "a file, not a directory")
    return [name for name in files.list_directory(run.where) if not name.startswith(".")]


def _next_free(location: str) -> str:
    number = 2
    while files.exists(candidate := f"{location}-{number}"):
        number += 1
    return candidate


def stored_recipe(run: RunDirectory) -> Recipe:
    """Return the recipe that a run directory holds, read where the run is stored.

    Raises:
        RecipeError: If it cannot be read.
    """
    try:
        text = files.read_bytes(files.join(run.where, run.resolved.name)).decode()
        document = parse_yaml(text, name="run.dir", value=run.where)
        return Recipe.model_validate(document)
    except (ValueError, RecipeError) as error:
        raise RecipeError.at(
            "run.dir",
            run.where,
            "resolved.yaml cannot be read: it is damaged or was written by another version",
        ) from error
