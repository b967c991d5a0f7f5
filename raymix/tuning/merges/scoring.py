"""Search points: merge, score on held-out rows, delete the merge, store its losses as JSON.

The file of a point is written atomically, so a killed search loses only the merge in progress.
Held-out text has two parts that share no document: `test`, the first rows of a domain's valid
split, which all of raymix reports losses on, and `search`, its last rows, which a search selects
by.
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
# Hidden, so that merges in progress are not listed beside the points.
_WORK_PREFIX = ".merge"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Corpus, domains and rows that models are scored on."""

    corpus: str
    """Path of the prepared corpus."""
    fingerprint: str
    sequence_length: int
    domains: tuple[str, ...]
    test_rows: int
    """Rows per domain at the beginning of the valid split, for reported losses."""
    search_rows: int
    """Maximum rows per domain at its end, for selection."""
    shared: tuple[str, ...] = ()
    """Domains whose two parts are from one document, because they hold out no other."""

    @classmethod
    def of(
        cls, recipe: Recipe, corpus: Corpus, domains: Sequence[str], rows: int | None = None
    ) -> HeldOut:
        """Return the parts for a recipe; `rows` is the size of the search part, default `test`'s.

        Raises:
            RaymixError: If a domain has too little held-out text for two parts.
        """
        test_rows = recipe.eval.rows_per_domain
        held_out = cls(
            corpus.path,
            corpus.fingerprint,
            recipe.data.sequence_length,
            tuple(domains),
            test_rows,
            rows or test_rows,
        )
        # `shared` depends on where documents end, so the rows are selected once to find it.
        _, shared = held_out._search_rows(corpus)
        return replace(held_out, shared=shared)

    def rows(self, part: Part) -> HeldOutRows:
        """Return the rows of a part."""
        # Opened here: a path is cheap to pickle to the trials, an open corpus is not.
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
        """Return the fields as JSON types."""
        # Lists instead of tuples: the identity of a search is compared after a round trip.
        return {**asdict(self), "domains": list(self.domains), "shared": list(self.shared)}


def mean_loss(losses: Mapping[str, float]) -> float | None:
    """Return the mean loss over domains; None without losses."""
    # fsum is exact, so the mean does not depend on the order of the domains.
    return math.fsum(losses.values()) / len(losses) if losses else None


@dataclass(frozen=True, slots=True)
class Search:
    """A merge file, its search space, and the directory of the points."""

    file: MergeFile
    space: tuple[Dimension, ...]
    trials: int
    held_out: HeldOut
    folder: Path
    device: str = "cpu"

    def identity(self) -> dict[str, Any]:
        """Return what identifies a search: merge file, models, space, number of points, text."""
        return {
            "merge": self.file.model_dump(mode="json"),
            "inputs": plan_merge(self.file).identity(),
            "space": [asdict(dimension) for dimension in self.space],
            "trials": self.trials,
            "held_out": self.held_out.document(),
        }

    def open(self) -> bool:
        """Create or resume the search; return False if the directory holds another search."""
        # Through JSON, as the stored one: tuples become lists.
        identity = json.loads(json.dumps(self.identity()))
        path = self.folder / _IDENTITY
        if path.is_file():
            return json.loads(path.read_text("utf-8")) == identity
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(str(path), json.dumps(identity, indent=1) + "\n")
        return True

    def restart(self) -> None:
        """Delete all points and create the search anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.open()

    def read(self, number: int) -> dict[str, Any] | None:
        """Return the record of point `number`, or None if it was not evaluated yet."""
        path = self.folder / f"{number:03d}.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def record(self, number: int, point: Point, *, threads: int) -> dict[str, Any]:
        """Evaluate a point on the search rows, store and return its record.

        A merge that fails has no losses, and the reason as `problem`.
        """
        record: dict[str, Any] = {"number": number, "options": dict(point), "losses": {}}
        try:
            record["losses"] = self.score(point, "search", threads=threads, number=number)
        except MergeError as error:
            # A result, not a failure of the search: some options make some methods diverge.
            record["problem"] = str(error)
        record["loss"] = mean_loss(record["losses"])
        path = self.folder / f"{number:03d}.json"
        atomic_write_text(str(path), json.dumps(record, ensure_ascii=False) + "\n")
        return record

    def score(
        self, point: Point, part: Part, *, threads: int, number: int | str = ""
    ) -> dict[str, float]:
        """Return the losses by domain of the merge at a point.

        Raises:
            MergeError: If the merge fails, or a loss is not finite.
            RaymixError: If its model cannot be loaded.
        """
        out = self.folder / f"{_WORK_PREFIX}-{number}"
        # Left over where a trial was killed; `merge` refuses a directory that exists.
        shutil.rmtree(out, ignore_errors=True)
        try:
            merge(
                apply_point(self.file, point),
                out,
                workers=threads,
                device=self.device,
                scratch=True,
            )
            # From disk, as a user would load it: what is scored is what would be written.
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
        """Return the records of the points up to the first one that is missing."""
        # Points of a round end in any order, but the next round needs all of those before it.
        records: list[dict[str, Any]] = []
        while (point := self.read(len(records))) is not None:
            records.append(point)
        return records


def evaluated(points: Sequence[Mapping[str, Any]]) -> list[tuple[Point, float]]:
    """Return points and their losses; a failed point has an infinite loss."""
    # Infinite, not left out: the next proposals must stay away from it.
    losses = [math.inf if p["loss"] is None else float(p["loss"]) for p in points]
    return [(p["options"], loss) for p, loss in zip(points, losses, strict=True)]


def best_of(points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the record of the point with the lowest loss; the first one of a tie.

    Raises:
        MergeError: If every merge failed, with the first reason.
    """
    usable = [point for point in points if point["loss"] is not None]
    if not usable:
        problem = next((point.get("problem") for point in points if point.get("problem")), None)
        raise MergeError.at(
            "--search",
            len(points),
            f"none of {len(points)} merges has a loss",
            fix=str(problem or ""),
        )
    # `min` keeps the first of a tie, and the file's own values are point 0: they win it.
    return min(usable, key=lambda point: point["loss"])


def refuse_another(folder: Path) -> RecipeError:
    """Return the error for a directory that holds another search."""
    return RecipeError.at(
        "--out",
        str(folder),
        "another search is here: of another merge file, other models, options or text",
        fix="Give another --out, or remove the directory",
    )
