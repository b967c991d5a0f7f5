"""Log of the mixtures of a search, in the order of their runs, in `design.json`.

It is written before the first run, so that the same command resumes with the same mixtures, and
grows by each proposal. The stage of a run is read from its own directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from raymix._utils.json import parse_json
from raymix.errors import RecipeError
from raymix.recipe import Recipe
from raymix.store import atomic_write_text
from raymix.training.run.identity import differences
from raymix.tuning.mixtures.candidates import Mixture, MixtureSpace, design_mixtures

FORMAT = 1
CUT = ".cut"
"""Marker file in a run directory: the scheduler stopped the run early; it is not resumed."""

_FILE = "design.json"
# Fields of `tune` that determine the mixtures; others (objective, verification) may change.
_DESIGN_FIELDS = ("mode", "design", "prior", "concentration", "vertices", "leave_one_out", "seed")
# Shares are rounded to six digits; the largest one also takes the rounding error of the others.
_SHARE_TOLERANCE = 2e-6

IfExists = Literal["resume", "fail", "new"]


def free_directory(path: Path, if_exists: IfExists) -> Path:
    """Return the directory to use, `path` or a free one beside it, without creating it.

    Raises:
        RecipeError: If `path` is not empty and `if_exists` is `fail`, or it holds no search.
    """
    # Hidden files do not count: a lock file may be left.
    names = [name for name in os.listdir(path) if name[0] != "."] if path.exists() else []
    if not names:
        return path
    if if_exists == "new":
        number = 2
        while (candidate := path.with_name(f"{path.name}-{number}")).exists():
            number += 1
        return candidate
    if if_exists == "fail":
        raise RecipeError.at(
            "--out",
            str(path),
            "a search is here already",
            fix="Use --if-exists resume to go on, or --if-exists new for a fresh directory",
        )
    if not (path / _FILE).is_file():
        raise RecipeError.at(
            "--out", str(path), "the directory holds files but no search", fix="Give another --out"
        )
    return path


class SearchLog:
    """The mixtures of a search, mirrored to `design.json`."""

    def __init__(self, out: Path, identity: Mapping[str, Any], mixtures: Sequence[Mixture]) -> None:
        self._path = out / _FILE
        self._identity = dict(identity)
        self.mixtures = list(mixtures)

    @classmethod
    def open(cls, out: Path, recipe: Recipe, space: MixtureSpace, fingerprint: str) -> SearchLog:
        """Return the log in `out`, created from the recipe's design if there is none.

        Raises:
            RecipeError: If a search of another design has begun there.
        """
        identity = _identity(recipe, space, fingerprint)
        path = out / _FILE
        if not path.is_file():
            fresh = cls(out, identity, design_mixtures(recipe.tune, space))
            fresh.write()
            return fresh
        stored = _read(path)
        mixtures: list[Mixture] = stored["mixtures"]
        log = cls(out, identity, mixtures)
        # Through JSON, which turns tuples to lists: the stored identity has been through it too.
        if stored["identity"] != json.loads(json.dumps(identity)):
            # Another design may replace the stored one as long as no run of it would change.
            log = cls(out, identity, design_mixtures(recipe.tune, space))
            _refuse_other_design(out, mixtures, log.mixtures, stored["identity"], identity)
            log.write()
        return log

    def write(self) -> None:
        """Write the file atomically."""
        document = {
            "format": FORMAT,
            "identity": self._identity,
            "mixtures": [mixture.document() for mixture in self.mixtures],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, ensure_ascii=False, indent=1)
        atomic_write_text(str(self._path), text + "\n")

    def add(self, mixture: Mixture) -> None:
        """Append a proposed mixture, before its run starts."""
        self.mixtures.append(mixture)
        self.write()


def _identity(recipe: Recipe, space: MixtureSpace, fingerprint: str) -> dict[str, Any]:
    config = recipe.tune.model_dump(mode="json")
    # In a sequential search `runs` may be raised later; its initial design may not change.
    fields = [*_DESIGN_FIELDS, *(["runs"] if recipe.tune.mode == "design" else ["initial"])]
    return {
        **{f"tune.{name}": config[name] for name in fields},
        **({"tune.law": config["law"]} if recipe.tune.design == "d_optimal" else {}),
        "corpus": fingerprint,
        "domains": list(space.domains),
        # Rounded: they are computed, and another numpy may differ in the last bits.
        "floors": [round(float(value), 9) for value in space.floor_D],
        "caps": [round(float(value), 9) for value in space.cap_D],
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the identity and the mixtures in the file."""
    try:
        stored = parse_json(path.read_text("utf-8"))
        if stored["format"] == FORMAT and stored["mixtures"]:
            mixtures = [Mixture(**mixture) for mixture in stored["mixtures"]]
            return {"identity": dict(stored["identity"]), "mixtures": mixtures}
        problem = f"format {stored['format']!r}, not {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read: {type(error).__name__} {error}"
    raise RecipeError.at("--out", str(path), problem, fix="Give another --out")


def _refuse_other_design(
    out: Path,
    old: Sequence[Mixture],
    new: Sequence[Mixture],
    stored: dict[str, Any],
    identity: dict[str, Any],
) -> None:
    """Raise RecipeError if the shares of a run that has begun would change."""
    new_shares = {mixture.name: mixture.shares for mixture in new}
    begun = [mixture for mixture in old if (out / mixture.name).exists()]
    if all(_equal_shares(mixture.shares, new_shares.get(mixture.name)) for mixture in begun):
        return
    differing = "; ".join(differences(stored, identity))
    raise RecipeError.at(
        "--out",
        str(out),
        f"a search of another design is here; it differs in {differing}",
        fix="Set that back, give another --out, or use --if-exists new",
    )


def _equal_shares(old: Mapping[str, float], new: Mapping[str, float] | None) -> bool:
    if new is None or old.keys() != new.keys():
        return False
    return all(abs(share - new[name]) <= _SHARE_TOLERANCE for name, share in old.items())
