"""From a recipe, the name of a mixer and a seed to the recipe of one run; pure but for files named.

A mixer is named by

- a kind, `pike`: the recipe's own mixer section where that is of this kind, else its defaults;
- a preset, `pike-balanced`: a kind with fields of `PRESETS` set;
- either with fields, `pike(tau=3, floor=0.05)`;
- a file, `my-mixer.yaml`: a mixer section, as in a recipe.

Targets of the recipe's mixer are held out under every mixer, so that all train on the same domains.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymix._utils.yaml import parse_yaml
from raymix.errors import RaymixError, RecipeError, did_you_mean, format_problem
from raymix.mixers import known_mixers
from raymix.recipe import Recipe, load_recipe

PRESETS: dict[str, dict[str, Any]] = {
    "pike-balanced": {"kind": "pike", "tau": 3.0},
    "pike-full": {"kind": "pike", "form": "full"},
}
"""Mixers that have a name of their own: a kind and the fields that make them."""

_SPEC = re.compile(r"([\w.-]+)\s*(?:\((.*)\))?", re.DOTALL)
_OPEN, _CLOSE = "([{", ")]}"
_CURVE_POINTS = 20


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of a comparison."""

    mixer: str
    """What the mixer is called in tables."""
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Return the name of its run directory."""
        return Path(self.recipe.run_dir).name


def run_name(mixer: str, seed: int) -> str:
    """Return the name of the run directory of a mixer and a seed."""
    return f"{re.sub(r'[^A-Za-z0-9_.=+-]+', '-', mixer).strip('-.')}-seed{seed}"


def make_variants(recipe: Recipe, mixers: str, *, seeds: int, out: str) -> list[Variant]:
    """Return the runs of a comparison, all mixers of the first seed first.

    Args:
        recipe: What all runs have in common.
        mixers: Mixers, as the module says, separated by commas.
        seeds: Runs per mixer; their seeds count up from the recipe's.
        out: Directory of the comparison, absolute.

    Raises:
        RecipeError: With one message per fault, which names the mixer.
    """
    problems: list[str] = []
    mixed: dict[str, Recipe] = {}
    for spec in split_specs(mixers):
        try:
            label, section = mixer_section(recipe, spec)
            taken = next((old for old in mixed if run_name(old, 0) == run_name(label, 0)), None)
            if taken is not None:
                raise RecipeError.at(
                    "--mixers", spec, f"{taken!r} has the same name", fix="Name each mixer once"
                )
            mixed[label] = _with_mixer(recipe, label, section)
        except RecipeError as error:
            problems += error.problems
    if not mixed and not problems:
        problems.append(
            format_problem(
                "--mixers",
                mixers,
                "no mixer is named",
                fix="Name some, e.g. --mixers uniform,proportional",
            )
        )
    problems += _unlike_targets(mixed)
    if problems:
        raise RecipeError(*dict.fromkeys(problems))
    return [
        Variant(label, seed, as_trial(mixed[label], f"{out}/{run_name(label, seed)}", seed))
        for seed in range(recipe.seed, recipe.seed + seeds)
        for label in mixed
    ]


def split_specs(text: str) -> list[str]:
    """Return the parts between the commas that are not inside brackets."""
    return [part for part in (part.strip() for part in _split(text)) if part]


def _split(text: str) -> Iterator[str]:
    depth = start = 0
    for at, letter in enumerate(text):
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if letter == "," and depth == 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def mixer_section(recipe: Recipe, spec: str) -> tuple[str, dict[str, Any]]:
    """Return what a mixer is called and its section of a recipe, as plain data.

    Raises:
        RecipeError: If `spec` names no mixer.
    """
    if spec.endswith((".yaml", ".yml")):
        label, section = Path(spec).stem, _read_section(spec)
    else:
        label, section = re.sub(r"\s+", "", spec), _named_section(recipe, spec)
    if recipe.mixer.targets:
        section.setdefault("targets", list(recipe.mixer.targets))
    return label, section


def _named_section(recipe: Recipe, spec: str) -> dict[str, Any]:
    found = _SPEC.fullmatch(spec)
    name = found[1] if found else spec
    kinds = known_mixers()
    if found is None or (name not in PRESETS and name not in kinds):
        known = sorted({*kinds, *PRESETS})
        allowed = f"Known: {', '.join(known)}; or a file, NAME.yaml"
        near = did_you_mean(name.partition("(")[0], known)
        raise RecipeError.at("--mixers", spec, "not a mixer", allowed=allowed, fix=near)
    preset = PRESETS.get(name, {"kind": name})
    return {**_own_section(recipe, preset["kind"]), **preset, **_fields(spec, found[2] or "")}


def _own_section(recipe: Recipe, kind: str) -> dict[str, Any]:
    """Return what the recipe says of a mixer of this kind; nothing where it has another."""
    if recipe.mixer.kind != kind:
        return {}
    return recipe.mixer.model_dump(mode="json", exclude_unset=True)


def _fields(spec: str, text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for part in split_specs(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier():
            raise RecipeError.at(
                "--mixers", spec, f"{part!r} is not FIELD=VALUE", fix="Write e.g. pike(tau=3)"
            )
        fields[key] = parse_yaml(value, name="--mixers", value=spec)
    return fields


def _read_section(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError.at(
            "--mixers", path, f"cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    section = parse_yaml(text, name="--mixers", value=path)
    if isinstance(section, dict) and isinstance(section.get("mixer"), dict):
        section = section["mixer"]
    if not isinstance(section, dict) or "kind" not in section:
        raise RecipeError.at(
            "--mixers",
            path,
            "holds no mixer section",
            fix="Write it as below `mixer:` in a recipe, e.g. kind: pike",
        )
    return dict(section)


def _with_mixer(recipe: Recipe, label: str, section: Mapping[str, Any]) -> Recipe:
    """Return the recipe under another mixer, checked as if it stood in the file."""
    try:
        return load_recipe(recipe, [f"mixer={json.dumps(section)}"])
    except RaymixError as error:
        raise RecipeError(*(f"{label}: {message}" for message in error.problems)) from error


def _unlike_targets(mixed: Mapping[str, Recipe]) -> list[str]:
    """Return why the mixers do not hold out the same domains, if so."""
    first: tuple[str, frozenset[str]] | None = None
    for label, recipe in mixed.items():
        targets = frozenset(recipe.mixer.targets)
        if first is None:
            first = label, targets
        elif targets != first[1]:
            message = format_problem(
                "mixer.targets",
                sorted(targets),
                f"holds out other domains than {first[0]}",
                fix="Set mixer.targets of the recipe; all mixers take it from there",
            )
            return [f"{label}: {message}"]
    return []


def as_trial(recipe: Recipe, path: str, seed: int, *, points: int = _CURVE_POINTS) -> Recipe:
    """Return the recipe of one run: its own directory, workers, enough points for a curve.

    Args:
        recipe: What to run.
        path: Its directory, absolute.
        seed: Its seed.
        points: Evaluations, where the recipe does not say how often.
    """
    directory = path.replace("{", "{{").replace("}", "}}")
    every = recipe.eval.every or max(1, math.ceil(steps_of(recipe) / points))
    cluster = recipe.cluster
    return recipe.model_copy(
        update={
            "seed": seed,
            "run": recipe.run.model_copy(update={"dir": directory, "tensorboard": False}),
            "eval": recipe.eval.model_copy(update={"every": every}),
            "cluster": cluster.model_copy(update={"workers": cluster.workers_per_trial}),
            "train": recipe.train.model_copy(update={"keep_checkpoints": 1}),
        }
    )


def changed_recipe(recipe: Recipe, changes: Mapping[str, Any], section: str) -> Recipe:
    """Return a recipe with fields changed, the length of a run in steps or tokens as they say.

    Args:
        recipe: The recipe.
        changes: Fields by dotted path, or nested.
        section: What messages call the place of the changes.

    Raises:
        RecipeError: If they do not fit the recipe.
    """
    flat = dict(_flat(changes))
    if "train.steps" in flat and "train.tokens" not in flat:
        flat["train.tokens"] = None
    elif "train.tokens" in flat and "train.steps" not in flat:
        flat["train.steps"] = None
    try:
        return load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in flat.items()])
    except RaymixError as error:
        raise RecipeError(*(f"{section}: {message}" for message in error.problems)) from error


def _flat(given: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            yield from _flat(value, where)
        else:
            yield where, value


def steps_of(recipe: Recipe) -> int:
    """Return the steps of a run."""
    return recipe.train.steps or -(-(recipe.train.tokens or 0) // recipe.data.step_tokens)


def labels(variants: Sequence[Variant]) -> tuple[str, ...]:
    """Return the mixers in the order they were named."""
    return tuple(dict.fromkeys(variant.mixer for variant in variants))
