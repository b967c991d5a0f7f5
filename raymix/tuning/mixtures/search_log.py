"""What a search has in its directory besides its runs: the mixtures, in the order they are run.

`design.json` is written before the first run, so that the same command goes on with the same
mixtures, and grows by what is proposed. A run's own directory says how far it has come.
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
from raymix.training.run.rundir import differences
from raymix.tuning.mixtures.candidates import Mixture, Space, designed

FORMAT = 1
CUT = ".cut"
"""In the directory of a run: the scheduler stopped it early, and it is not to go on."""

_FILE = "design.json"
# Fields of the recipe's `tune` that decide what is run, and not only how it is judged.
_FIELDS = ("mode", "design", "prior", "concentration", "vertices", "leave_one_out", "seed")
_SAME = 2e-6

IfExists = Literal["resume", "fail", "new"]


def free_directory(path: Path, if_exists: IfExists) -> Path:
    """Return the directory to use, `path` or one beside it; it is not made.

    Raises:
        RecipeError: If `path` holds something and `if_exists` is `fail`, or it is no search.
    """
    inside = [name for name in os.listdir(path) if name[0] != "."] if path.exists() else []
    if not inside:
        return path
    if if_exists == "new":
        number = 2
        while (other := path.with_name(f"{path.name}-{number}")).exists():
            number += 1
        return other
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
    """The mixtures of a search, on disk."""

    def __init__(self, out: Path, identity: Mapping[str, Any], mixtures: Sequence[Mixture]) -> None:
        self._path = out / _FILE
        self._identity = dict(identity)
        self.mixtures = list(mixtures)

    @classmethod
    def open(cls, out: Path, recipe: Recipe, space: Space, fingerprint: str) -> SearchLog:
        """Return the record in `out`, made from the recipe's design where there is none.

        Raises:
            RecipeError: If a search of another design has begun there.
        """
        identity = _identity(recipe, space, fingerprint)
        path = out / _FILE
        if not path.is_file():
            fresh = cls(out, identity, designed(recipe.tune, space))
            fresh.write()
            return fresh
        stored = _read(path)
        kept: list[Mixture] = stored["mixtures"]
        found = cls(out, identity, kept)
        if stored["identity"] != json.loads(json.dumps(identity)):
            found = cls(out, identity, designed(recipe.tune, space))
            _refuse_another(out, kept, found.mixtures, stored["identity"], identity)
            found.write()
        return found

    def write(self) -> None:
        """Write the file, whole or not at all."""
        document = {
            "format": FORMAT,
            "identity": self._identity,
            "mixtures": [mixture.document() for mixture in self.mixtures],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, ensure_ascii=False, indent=1)
        atomic_write_text(str(self._path), text + "\n")

    def add(self, mixture: Mixture) -> None:
        """Note a mixture that was proposed, before it is run."""
        self.mixtures.append(mixture)
        self.write()


def _identity(recipe: Recipe, space: Space, fingerprint: str) -> dict[str, Any]:
    config = recipe.tune.model_dump(mode="json")
    fields = [*_FIELDS, *(["runs"] if recipe.tune.mode == "design" else ["initial"])]
    return {
        **{f"tune.{name}": config[name] for name in fields},
        **({"tune.law": config["law"]} if recipe.tune.design == "d_optimal" else {}),
        "corpus": fingerprint,
        "domains": list(space.domains),
        "floors": [round(float(value), 9) for value in space.floor_D],
        "caps": [round(float(value), 9) for value in space.cap_D],
    }


def _read(path: Path) -> dict[str, Any]:
    """Return what the file holds, with its mixtures as such."""
    try:
        stored = parse_json(path.read_text("utf-8"))
        if stored["format"] == FORMAT and stored["mixtures"]:
            mixtures = [Mixture(**mixture) for mixture in stored["mixtures"]]
            return {"identity": dict(stored["identity"]), "mixtures": mixtures}
        wrong = f"format {stored['format']!r}, not {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = f"cannot be read: {type(error).__name__} {error}"
    raise RecipeError.at("--out", str(path), wrong, fix="Give another --out")


def _refuse_another(
    out: Path,
    old: Sequence[Mixture],
    new: Sequence[Mixture],
    stored: dict[str, Any],
    identity: dict[str, Any],
) -> None:
    """Raise RecipeError unless every mixture that was begun stays what it is."""
    wanted = {mixture.name: mixture.shares for mixture in new}
    begun = [mixture for mixture in old if (out / mixture.name).exists()]
    if all(_same(mixture.shares, wanted.get(mixture.name)) for mixture in begun):
        return
    differing = "; ".join(differences(stored, identity))
    raise RecipeError.at(
        "--out",
        str(out),
        f"a search of another design is here; it differs in {differing}",
        fix="Set that back, give another --out, or use --if-exists new",
    )


def _same(old: Mapping[str, float], new: Mapping[str, float] | None) -> bool:
    if new is None or old.keys() != new.keys():
        return False
    return all(abs(share - new[name]) <= _SAME for name, share in old.items())
