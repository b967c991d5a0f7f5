"""Recipe of one run from a base recipe, a mixer spec and a seed; reads only files that are named.

A mixer spec is

- a kind, `pike`: the recipe's own mixer section where that is of this kind, else its defaults;
- a preset, `pike-balanced`: a kind with fields of `PRESETS` set;
- either with fields, `pike(tau=3, floor=0.05)`;
- a file, `my-mixer.yaml`: a mixer section, as in a recipe.

Targets of the recipe's mixer are held out under every mixer: all train on the same domains.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymix._utils.yaml import parse_yaml
from raymix.errors import RaymixError, RecipeError, did_you_mean, format_problem
from raymix.mixers import known_mixers
from raymix.recipe import Recipe, RunConfig, load_recipe
from raymix.recipe.paths import absolute, map_override

PRESETS: dict[str, dict[str, Any]] = {
    "pike-balanced": {"kind": "pike", "tau": 3.0},
    "pike-full": {"kind": "pike", "form": "full"},
}
"""Named mixers: a kind with some of its fields set."""

_SPEC = re.compile(r"([\w.-]+)\s*(?:\((.*)\))?", re.DOTALL)
_OPEN, _CLOSE = "([{", ")]}"
# Evaluations per run where the recipe does not say: enough points for a curve.
_CURVE_POINTS = 20


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of a group: mixer, seed and complete recipe."""

    mixer: str
    """Label of the mixer in tables."""
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Return the name of its run directory."""
        return Path(self.recipe.run_dir).name


def run_name(mixer: str, seed: int) -> str:
    """Return the name of the run directory of a mixer and a seed."""
    # Only characters that need no quoting in a shell, a URL or an object store key.
    return f"{re.sub(r'[^A-Za-z0-9_.=+-]+', '-', mixer).strip('-.')}-seed{seed}"


def make_variants(recipe: Recipe, mixers: str, *, seeds: int, out: str) -> list[Variant]:
    """Return the runs of a comparison, ordered by seed, then by mixer.

    With this order an interrupted comparison has complete seeds, which paired statistics need.

    Args:
        recipe: The recipe that all runs share.
        mixers: Mixer specs (see the module), separated by commas.
        seeds: Runs per mixer; their seeds count up from the recipe's.
        out: Directory of the comparison, absolute.

    Raises:
        RecipeError: With one message per fault, each naming its mixer.
    """
    problems: list[str] = []
    recipes: dict[str, Recipe] = {}
    for spec in split_specs(mixers):
        try:
            label, section = mixer_section(recipe, spec)
            # Run names, not labels: two labels may become one name once characters are replaced.
            name = run_name(label, 0)
            duplicate = next((known for known in recipes if run_name(known, 0) == name), None)
            if duplicate is not None:
                raise RecipeError.at(
                    "--mixers", spec, f"{duplicate!r} has the same name", fix="Name each mixer once"
                )
            recipes[label] = _with_mixer(recipe, label, section)
        except RecipeError as error:
            problems += error.problems
    if not recipes and not problems:
        problems.append(
            format_problem(
                "--mixers",
                mixers,
                "no mixer is named",
                fix="Name some, e.g. --mixers uniform,proportional",
            )
        )
    problems += _target_mismatch(recipes)
    if problems:
        raise RecipeError(*dict.fromkeys(problems))
    return [
        Variant(label, seed, as_trial(recipes[label], f"{out}/{run_name(label, seed)}", seed))
        for seed in range(recipe.seed, recipe.seed + seeds)
        for label in recipes
    ]


def split_specs(text: str) -> list[str]:
    """Return the parts of a comma-separated list; commas inside brackets do not separate."""
    return [part for part in (part.strip() for part in _split(text)) if part]


def _split(text: str) -> Iterator[str]:
    depth = start = 0
    for index, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if char == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def mixer_section(recipe: Recipe, spec: str) -> tuple[str, dict[str, Any]]:
    """Return the label of a mixer and its recipe section, as plain data.

    Raises:
        RecipeError: If `spec` names no mixer.
    """
    if spec.endswith((".yaml", ".yml")):
        label, section = Path(spec).stem, _read_section(spec)
    else:
        label, section = re.sub(r"\s+", "", spec), _named_section(recipe, spec)
    # A default only: `_target_mismatch` compares the targets that a spec sets itself.
    if recipe.mixer.targets:
        section.setdefault("targets", list(recipe.mixer.targets))
    return label, section


def _named_section(recipe: Recipe, spec: str) -> dict[str, Any]:
    match = _SPEC.fullmatch(spec)
    name = match[1] if match else spec
    kinds = known_mixers()
    if match is None or (name not in PRESETS and name not in kinds):
        known = sorted({*kinds, *PRESETS})
        allowed = f"Known: {', '.join(known)}; or a file, NAME.yaml"
        suggestion = did_you_mean(name.partition("(")[0], known)
        raise RecipeError.at("--mixers", spec, "not a mixer", allowed=allowed, fix=suggestion)
    preset = PRESETS.get(name, {"kind": name})
    # Later ones win: the recipe, then the preset, then the fields of the spec.
    return {**_own_section(recipe, preset["kind"]), **preset, **_fields(spec, match[2] or "")}


def _own_section(recipe: Recipe, kind: str) -> dict[str, Any]:
    """Return the fields that the recipe sets for this kind; empty where its mixer is another."""
    if recipe.mixer.kind != kind:
        return {}
    return recipe.mixer.model_dump(mode="json", exclude_unset=True)


def _fields(spec: str, text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for part in split_specs(text):
        key, equals, value = (token.strip() for token in part.partition("="))
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
    # A whole recipe is accepted as well.
    if isinstance(section, dict) and isinstance(section.get("mixer"), dict):
        section = section["mixer"]
    if not isinstance(section, dict) or "kind" not in section:
        raise RecipeError.at(
            "--mixers",
            path,
            "holds no mixer section",
            fix="Write it as below `mixer:` in a recipe, e.g. kind: pike",
        )
    # As in a recipe, relative paths start at the file.
    base = os.path.dirname(os.path.abspath(path))
    moved = map_override("mixer", section, lambda p, field, _: absolute(p, field, base))
    return dict(moved)


def _with_mixer(recipe: Recipe, label: str, section: Mapping[str, Any]) -> Recipe:
    """Return the recipe with another mixer, validated as if it were in the recipe file."""
    # As an override, so that all cross-field checks of the recipe run again.
    try:
        return load_recipe(recipe, [f"mixer={json.dumps(section)}"])
    except RaymixError as error:
        raise RecipeError(*(f"{label}: {message}" for message in error.problems)) from error


def _target_mismatch(recipes: Mapping[str, Recipe]) -> list[str]:
    """Return one message if the mixers do not hold out the same domains, else none."""
    first: tuple[str, frozenset[str]] | None = None
    for label, recipe in recipes.items():
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
    """Return the recipe of one run: its own directory, its workers, evaluations for a curve.

    Args:
        recipe: The recipe.
        path: Absolute run directory.
        seed: The seed.
        points: Number of evaluations, where the recipe sets no interval.
    """
    # `run.dir` is a format string (`{name}`, `{seed}`).
    directory = path.replace("{", "{{").replace("}", "}}")
    eval_every = recipe.eval.every or max(1, math.ceil(steps_of(recipe) / points))
    cluster = recipe.cluster
    return recipe.model_copy(
        update={
            "seed": seed,
            "run": RunConfig(dir=directory, tensorboard=False),
            "eval": recipe.eval.model_copy(update={"every": eval_every}),
            "cluster": cluster.model_copy(update={"workers": cluster.workers_per_trial}),
            # A group of hundreds of runs would fill the disk with older checkpoints.
            "train": recipe.train.model_copy(update={"keep_checkpoints": 1}),
        }
    )


def changed_recipe(recipe: Recipe, changes: Mapping[str, Any], section: str) -> Recipe:
    """Return a recipe with some fields changed.

    Steps and tokens exclude each other: a change of one clears the other.

    Args:
        recipe: The recipe.
        changes: Fields by dotted path, or nested.
        section: Prefix of the error messages, the field that holds the changes.

    Raises:
        RecipeError: If they do not fit the recipe.
    """
    flat = dict(_flatten(changes))
    if "train.steps" in flat and "train.tokens" not in flat:
        flat["train.tokens"] = None
    elif "train.tokens" in flat and "train.steps" not in flat:
        flat["train.steps"] = None
    try:
        return load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in flat.items()])
    except RaymixError as error:
        raise RecipeError(*(f"{section}: {message}" for message in error.problems)) from error


def _flatten(fields: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        dotted = f"{path}.{key}" if path else key
        # An empty mapping is a value: it clears the field.
        if isinstance(value, dict) and value:
            yield from _flatten(value, dotted)
        else:
            yield dotted, value


def steps_of(recipe: Recipe) -> int:
    """Return the number of steps of a run; tokens are rounded up to whole steps."""
    return recipe.train.steps or -(-(recipe.train.tokens or 0) // recipe.data.step_tokens)


def labels(variants: Sequence[Variant]) -> tuple[str, ...]:
    """Return the labels of the mixers, in the order they were named."""
    return tuple(dict.fromkeys(variant.mixer for variant in variants))
