"""Run directories, tolerant of runs still being written, cut off or damaged.

The lines of `metrics.jsonl` are parsed by `raymix.report.data.steps`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from raymix._utils.json import parse_json
from raymix._utils.yaml import parse_yaml
from raymix.errors import RaymixError, RecipeError, did_you_mean, format_problem
from raymix.report.data.steps import Document, Evaluation, Steps, steps_and_evaluations
from raymix.sampling import MixtureLog
from raymix.store import Corpus
from raymix.store.remote import files
from raymix.store.remote.errors import is_remote
from raymix.store.remote.mirror import Mirror

METRICS = "metrics.jsonl"
RECIPE = "resolved.yaml"
LOG = "mixture_log.jsonl"
FILES = (RECIPE, "environment.json", LOG, METRICS)
"""The files of a run that a report needs; the last, its metrics, tells how far it is."""

T = TypeVar("T")


class _Section(BaseModel):
    # A report must open runs of later versions, whose recipes have fields that this one lacks.
    model_config = ConfigDict(extra="allow")

    kind: str | None = None
    type: str | None = None
    mode: str | None = None
    path: str | None = None
    workers: int | None = None
    steps: int | None = None
    sequence_length: Annotated[int, Field(ge=1)] | None = None
    max_epochs: float | dict[str, float | None] | None = None


class _RecipeSubset(BaseModel):
    """The recipe fields that reports use; recipes of other versions may have any others."""

    corpus: _Section | None = None
    data: _Section | None = None
    mixer: _Section | None = None
    model: _Section | None = None
    train: _Section | None = None
    cluster: _Section | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The parsed files of one run directory."""

    path: Path
    where: str
    """The path as given by the user, or the URL."""
    recipe: Document
    environment: Document
    domains: tuple[str, ...]
    steps: Steps
    evaluations: tuple[Evaluation, ...]
    log: MixtureLog | None
    corpus: Corpus | None
    notes: tuple[str, ...]
    """Missing or damaged files, one sentence each."""

    @property
    def name(self) -> str:
        """Return the name of the run: the directory's."""
        return self.path.resolve().name


def outline(path: str | Path) -> RunRecord:
    """Return a run without its steps: recipe, environment, corpus, mixture log.

    Raises:
        RecipeError: If it is no run directory.
    """
    directory = Path(path)
    if not (directory / RECIPE).is_file() and not (directory / METRICS).is_file():
        raise RecipeError(_no_run(directory))
    return _record(directory, *steps_and_evaluations([])[:2], [])


@contextmanager
def on_this_machine(place: str | Path) -> Iterator[Path]:
    """Yield a local directory of the run; the files of a run at a URL are fetched into one.

    Raises:
        RecipeError: If there is no run at the URL.
        StorageError: If the store cannot be used.
    """
    url = str(place).rstrip("/")
    if not is_remote(url):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="raymix-") as above:
        # The directory gives the run its name.
        directory = Path(above) / url.rsplit("/", 1)[-1]
        fetch_run(url, Mirror(url, directory))
        yield directory


def fetch_run(url: str, mirror: Mirror) -> None:
    """Update the local copies of the files that a report needs of the run at `url`.

    Raises:
        RecipeError: If there is no run.
        StorageError: If the store cannot be used.
    """
    if not mirror.fetch(*FILES):
        # A store that cannot be used raises its own, better error.
        files.check_store(url, "run")
        raise RecipeError.at(
            "run", url, f"not a run directory: no {METRICS} in it", fix="`raymix train` makes one"
        )


def read_run(path: str | Path) -> RunRecord:
    """Return the run at `path`; missing and damaged files become notes, not errors.

    Args:
        path: A run directory, or the URL of one.

    Raises:
        RecipeError: If it is no run directory, or holds neither a step nor an evaluation.
        StorageError: If it is a URL and the store cannot be used.
    """
    with on_this_machine(path) as directory:
        # The copy's path means nothing to the user, and is gone when the page is read.
        return replace(_read_run(directory, str(path)), where=str(path))


def _read_run(directory: Path, path: str) -> RunRecord:
    notes: list[str] = []
    steps, evaluations = _read_metrics(directory, notes)
    if not len(steps) and not evaluations:
        raise RecipeError.at(
            "run", path, f"{METRICS} holds no step yet", fix="Try again once training has begun"
        )
    return _record(directory, steps, evaluations, notes)


def _record(
    directory: Path, steps: Steps, evaluations: tuple[Evaluation, ...], notes: list[str]
) -> RunRecord:
    recipe = _tolerant(_read_recipe, directory, RECIPE, notes)
    log = _tolerant(_read_log, directory, LOG, notes)
    corpus = _read_corpus(recipe or {}, notes)
    return RunRecord(
        path=directory,
        where=str(directory),
        recipe=recipe or {},
        environment=_tolerant(_read_json, directory, "environment.json", notes) or {},
        domains=_domains(log, corpus, steps, evaluations),
        steps=steps,
        evaluations=evaluations,
        log=log,
        corpus=corpus,
        notes=tuple(notes),
    )


def _read_metrics(directory: Path, notes: list[str]) -> tuple[Steps, tuple[Evaluation, ...]]:
    try:
        # A lone carriage return in a damaged line is no end of line, and a character cut in two
        # must not cost the lines before it.
        file = (directory / METRICS).open(encoding="utf-8", errors="replace", newline="\n")
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(_no_run(directory)) from None
    with file:
        steps, evaluations, bad, cut_off = steps_and_evaluations(file)
    if cut_off:
        notes.append(f"{METRICS}: the last line was cut off and is left out.")
        # A run that is still being written ends in half a line: that is no damage.
        bad.pop()
    if bad:
        which = f"line{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:5]))}"
        notes.append(f"{METRICS}: {which}{' and others' * (len(bad) > 5)} damaged, left out.")
    return steps, evaluations


def _no_run(directory: Path) -> str:
    if not directory.exists():
        parent = directory.parent
        near = [item.name for item in parent.iterdir()] if parent.is_dir() else []
        return format_problem(
            "run", str(directory), "no such directory", fix=did_you_mean(directory.name, near)
        )
    inside = sorted(item.parent.name for item in directory.glob(f"*/{METRICS}"))
    return format_problem(
        "run",
        str(directory),
        f"not a run directory: no {METRICS} in it",
        fix=f"Runs in it: {', '.join(inside[:8])}" if inside else "`raymix train` makes one",
    )


def _tolerant(read: Callable[[Path], T], directory: Path, name: str, notes: list[str]) -> T | None:
    """Return `read` of a file of the run, or None and a note if that fails."""
    try:
        return read(directory / name)
    # Before OSError, which it is: an absent file is no damaged one.
    except FileNotFoundError:
        notes.append(f"{name} is missing.")
    except (OSError, ValueError, RaymixError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        notes.append(f"{name} is damaged ({first}).")
    return None


def _read_json(path: Path) -> Document:
    return _mapping(parse_json(path.read_text(encoding="utf-8")))


def _read_recipe(path: Path) -> Document:
    document = _mapping(parse_yaml(path.read_text(encoding="utf-8"), name=RECIPE, value=str(path)))
    # Validated, not converted: readers then take the types of these fields for granted.
    _RecipeSubset.model_validate(document)
    return document


def _mapping(value: Any) -> Document:
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not a mapping")
    return value


def _read_log(path: Path) -> MixtureLog:
    # `splitlines` would also split at U+2028, which JSON strings may hold.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return MixtureLog.from_lines(lines, path=LOG).joined()


def _read_corpus(recipe: Document, notes: list[str]) -> Corpus | None:
    path = (recipe.get("corpus") or {}).get("path")
    if not isinstance(path, str):
        return None
    try:
        return Corpus.open(path)
    except (RaymixError, OSError) as error:
        notes.append(f"The corpus cannot be read: {str(error).splitlines()[0]}")
        return None


def _domains(
    log: MixtureLog | None,
    corpus: Corpus | None,
    steps: Steps,
    evaluations: Sequence[Evaluation],
) -> tuple[str, ...]:
    # The log comes first: the order of its domains is that of the statistics in it.
    if log is not None and log.domains:
        return log.domains
    if corpus is not None:
        return corpus.domain_names
    named = [shares or {} for shares in steps.shares[:1]]
    named += [evaluation.domains for evaluation in evaluations[:1]]
    return tuple(dict.fromkeys(name for names in named for name in names))
