"""Merges that are tried: made, scored on held-out rows, removed; what they came to stays on disk.

A point of a search is a JSON file, written whole: a search that is killed loses the merge it was
at and no more. Held-out text has two parts that share no document: the first rows of a domain's
valid split, on which everything else in raymix is scored and which are reported (`test`), and its
last rows, which a search chooses by (`search`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from raymix.errors import MergeError, RecipeError
from raymix.merging.recipe import MergeFile
from raymix.merging.run.engine import merge
from raymix.merging.run.plan import plan_merge
from raymix.merging.search_space import Dimension, Point, apply_point
from raymix.recipe import Recipe
from raymix.store import Corpus, atomic_write_text
from raymix.training.evaluate.held_out import HeldOutRows, held_out_rows, search_rows
from raymix.training.evaluate.score import score_checkpoint

Part = Literal["test", "search"]

_IDENTITY = "search.json"
_WORK = ".merge"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What models are scored on."""

    corpus: str
    """Path of the prepared corpus."""
    fingerprint: str
    sequence_length: int
    domains: tuple[str, ...]
    test_rows: int
    """Rows per domain at the beginning of the valid split: what is reported."""
    search_rows: int
    """Rows per domain, at most, at its end: what is chosen by."""
    shared: tuple[str, ...] = ()
    """Domains whose two parts are of one document: all that is held out of them."""

    @classmethod
    def of(
        cls, recipe: Recipe, corpus: Corpus, domains: Sequence[str], rows: int | None = None
    ) -> HeldOut:
        """Return the parts that a recipe evaluates on; `rows` to choose by, or as many.

        Raises:
            RaymixError: If a domain has too little held-out text for two parts.
        """
        tested = recipe.eval.rows_per_domain
        found = cls(
            corpus.path,
            corpus.fingerprint,
            recipe.data.sequence_length,
            tuple(domains),
            tested,
            rows or tested,
        )
        _, shared = found._search_rows(corpus)
        return replace(found, shared=shared)

    def rows(self, part: Part) -> HeldOutRows:
        """Return the rows of a part."""
        corpus, length = Corpus.open(self.corpus), self.sequence_length
        if part == "test":
            return held_out_rows(
                corpus,
                sequence_length=length,
                rows_per_domain=self.test_rows,
                domains=self.domains,
            )
        return self._search_rows(corpus)[0]

    def _search_rows(self, corpus: Corpus) -> tuple[HeldOutRows, tuple[str, ...]]:
        return search_rows(
            corpus,
            sequence_length=self.sequence_length,
            rows_per_domain=self.search_rows,
            test_rows=self.test_rows,
            domains=self.domains,
        )

    def losses(self, checkpoint: str | Path, part: Part, *, threads: int) -> dict[str, float]:
        """Return a model's loss by domain, in nats per token.

        Raises:
            RaymixError: If the model cannot be loaded, or does not fit the corpus.
        """
        corpus = Corpus.open(self.corpus)
        table = score_checkpoint(self.rows(part), checkpoint, corpus, threads=threads)
        return {name: float(row["loss"] or 0.0) for name, row in table.items()}

    def document(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**asdict(self), "domains": list(self.domains), "shared": list(self.shared)}


def mean_loss(losses: Mapping[str, float]) -> float | None:
    """Return the mean over domains; None where there are none."""
    return math.fsum(losses.values()) / len(losses) if losses else None


@dataclass(frozen=True, slots=True)
class Search:
    """A merge file, the options looked for, and where what was tried is kept."""

    file: MergeFile
    space: tuple[Dimension, ...]
    trials: int
    held_out: HeldOut
    folder: Path
    device: str = "cpu"

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for two searches to be one: files, models, text."""
        return {
            "merge": self.file.model_dump(mode="json"),
            "inputs": plan_merge(self.file).identity(),
            "space": [asdict(dimension) for dimension in self.space],
            "trials": self.trials,
            "held_out": self.held_out.document(),
        }

    def open(self) -> bool:
        """Begin the search, or take up one that was begun; return False if another is there."""
        identity = json.loads(json.dumps(self.identity()))
        path = self.folder / _IDENTITY
        if path.is_file():
            return json.loads(path.read_text("utf-8")) == identity
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(str(path), json.dumps(identity, indent=1) + "\n")
        return True

    def restart(self) -> None:
        """Forget what was tried, and begin."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.open()

    def read(self, number: int) -> dict[str, Any] | None:
        """Return what point `number` came to, None where it was not tried yet."""
        path = self.folder / f"{number:03d}.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def record(self, number: int, point: Point, *, threads: int) -> dict[str, Any]:
        """Return what a point came to on the rows to choose by, having tried and noted it.

        A merge that cannot be made has no losses, and says why.
        """
        found: dict[str, Any] = {"number": number, "options": dict(point), "losses": {}}
        try:
            found["losses"] = self.score(point, "search", threads=threads, number=number)
        except MergeError as error:
            found["problem"] = str(error)
        found["loss"] = mean_loss(found["losses"])
        path = self.folder / f"{number:03d}.json"
        atomic_write_text(str(path), json.dumps(found, ensure_ascii=False) + "\n")
        return found

    def score(
        self, point: Point, part: Part, *, threads: int, number: int | str = ""
    ) -> dict[str, float]:
        """Return the losses by domain of the merge at a point.

        Raises:
            MergeError: If it cannot be made, or has no finite loss.
            RaymixError: If its model cannot be loaded.
        """
        out = self.folder / f"{_WORK}-{number}"
        shutil.rmtree(out, ignore_errors=True)
        try:
            merge(
                apply_point(self.file, point),
                out,
                workers=threads,
                device=self.device,
                scratch=True,
            )
            losses = self.held_out.losses(out, part, threads=threads)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise MergeError.at(
                    "--search",
                    dict(point),
                    f"the loss of {name} is not finite",
                    fix="Look at lower scales",
                )
        return losses

    def points(self) -> list[dict[str, Any]]:
        """Return what was tried so far, up to the first point that was not."""
        found: list[dict[str, Any]] = []
        while (point := self.read(len(found))) is not None:
            found.append(point)
        return found


def tried(points: Sequence[Mapping[str, Any]]) -> list[tuple[Point, float]]:
    """Return points and their losses; the loss of one that failed is infinite."""
    losses = [math.inf if p["loss"] is None else float(p["loss"]) for p in points]
    return [(p["options"], loss) for p, loss in zip(points, losses, strict=True)]


def best_of(points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the point of the least loss, the first of several.

    Raises:
        MergeError: If every merge failed, with the first reason.
    """
    usable = [point for point in points if point["loss"] is not None]
    if not usable:
        said = next((point.get("problem") for point in points if point.get("problem")), None)
        raise MergeError.at(
            "--search", len(points), f"none of {len(points)} merges has a loss", fix=str(said or "")
        )
    return min(usable, key=lambda point: point["loss"])


def refuse_another(folder: Path) -> RecipeError:
    """Return the error of a directory that holds another search."""
    return RecipeError.at(
        "--out",
        str(folder),
        "another search is here: of another merge file, other models, options or text",
        fix="Give another --out, or remove the directory",
    )
