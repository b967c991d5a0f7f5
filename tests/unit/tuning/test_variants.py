"""From the name of a mixer to a recipe, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raymix.errors import RecipeError
from raymix.recipe import Recipe, load_recipe
from raymix.tuning.runs.variants import (
    labels,
    make_variants,
    mixer_section,
    run_name,
    split_specs,
)

OUT = "/results/of {braces}"


def recipe(**sections: Any) -> Recipe:
    document: dict[str, Any] = {
        "name": "demo",
        "seed": 3,
        "corpus": {
            "path": "/corpora/demo",
            "domains": [{"name": name, "train": f"/{name}.jsonl"} for name in "abc"],
        },
        "data": {"sequence_length": 64, "rows_per_step": 8},
        "train": {"steps": 200},
        "cluster": {"workers": 4},
    }
    return load_recipe(Recipe.model_validate({**document, **sections}))


def mixer_of(used: Recipe, spec: str) -> dict[str, Any]:
    (variant,) = make_variants(used, spec, seeds=1, out=OUT)
    return variant.recipe.mixer.model_dump(mode="json")


def test_mixers_by_seeds_in_the_order_in_which_they_can_be_compared_first() -> None:
    variants = make_variants(recipe(), "uniform,proportional,unimax", seeds=2, out=OUT)
    assert labels(variants) == ("uniform", "proportional", "unimax")
    assert [v.name for v in variants[:4]] == [
        "uniform-seed3",
        "proportional-seed3",
        "unimax-seed3",
        "uniform-seed4",
    ]
    for variant in variants:
        used = variant.recipe
        assert (used.seed, used.mixer.kind) == (variant.seed, variant.mixer)
        assert used.run_dir == f"{OUT}/{variant.name}"
        assert used.cluster.workers == 0
        assert used.train.steps == 200
        assert used.eval.every == 10


def test_what_is_no_mixers_business_stays_as_it_is() -> None:
    base = recipe(eval={"every": 7, "rows_per_domain": 5})
    for variant in make_variants(base, "uniform,unimax", seeds=1, out=OUT):
        assert (variant.recipe.data, variant.recipe.model) == (base.data, base.model)
        assert (variant.recipe.corpus, variant.recipe.eval) == (base.corpus, base.eval)
        assert variant.recipe.train == base.train.model_copy(update={"keep_checkpoints": 1})


def test_a_run_given_in_tokens_is_scored_as_often() -> None:
    used = recipe(train={"tokens": 200 * 8 * 64})
    (variant,) = make_variants(used, "uniform", seeds=1, out=OUT)
    assert variant.recipe.eval.every == 10


def test_the_recipes_own_section_is_taken_for_its_kind() -> None:
    own = recipe(mixer={"kind": "unimax", "max_epochs": 2.5})
    assert mixer_of(own, "unimax")["max_epochs"] == 2.5
    assert mixer_of(recipe(), "unimax")["max_epochs"] == 4.0
    assert mixer_of(own, "unimax(max_epochs=1)")["max_epochs"] == 1
    weighted = recipe(mixer={"kind": "static", "weights": {"a": 0.5, "b": 0.25, "c": 0.25}})
    assert mixer_of(weighted, "static")["weights"] == {"a": 0.5, "b": 0.25, "c": 0.25}


def test_presets_are_kinds_with_fields() -> None:
    assert (mixer_of(recipe(), "pike")["tau"], mixer_of(recipe(), "pike-balanced")["tau"]) == (0, 3)
    own = recipe(mixer={"kind": "pike", "floor": 0.25, "tau": 1.0})
    preset = mixer_of(own, "pike-balanced")
    assert (preset["kind"], preset["tau"], preset["floor"]) == ("pike", 3, 0.25)
    assert mixer_of(own, "pike-balanced(tau=5)")["tau"] == 5
    assert mixer_of(recipe(), "pike-full")["form"] == "full"


def test_fields_may_hold_commas_and_brackets() -> None:
    spec = "static(weights={a: 0.5, b: 0.25, c: 0.25}), temperature( temperature = 2 )"
    variants = make_variants(recipe(), spec, seeds=1, out=OUT)
    assert [v.mixer for v in variants] == [
        "static(weights={a:0.5,b:0.25,c:0.25})",
        "temperature(temperature=2)",
    ]
    assert variants[1].name == "temperature-temperature=2-seed3"
    assert variants[1].recipe.mixer.model_dump()["temperature"] == 2


@given(
    st.lists(st.sampled_from(["uniform", "pike(tau=3,floor=0)", "s(w={a: [1, 2]})"]), min_size=1)
)
def test_splitting_undoes_joining(specs: list[str]) -> None:
    assert split_specs(", ".join(specs)) == specs


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_holds_a_section(tmp_path: Path, wrapped: bool) -> None:
    section = {"kind": "temperature", "temperature": 1.5}
    path = tmp_path / "gentle.yaml"
    path.write_text(yaml.safe_dump({"mixer": section} if wrapped else section))
    (variant,) = make_variants(recipe(), str(path), seeds=1, out=OUT)
    assert variant.mixer == "gentle"
    assert variant.recipe.mixer.model_dump()["temperature"] == 1.5


def test_targets_of_the_recipe_are_held_out_under_every_mixer() -> None:
    used = recipe(mixer={"kind": "dga", "targets": ["c"]})
    for variant in make_variants(used, "uniform,dga,doge,odm", seeds=1, out=OUT):
        assert variant.recipe.mixer.targets == ("c",), variant.mixer


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("pyke", ("--mixers = 'pyke': not a mixer", "Known: ", "Did you mean 'pike'?")),
        ("pike-balance", ("Did you mean 'pike-balanced'?",)),
        ("pyke(tau=3)", ("not a mixer", "Did you mean 'pike'?")),
        ("pike(tau", ("not a mixer",)),
        ("pike(tau)", ("'tau' is not FIELD=VALUE",)),
        ("pike(tau=-1)", ("pike(tau=-1): mixer.tau = -1",)),
        ("pike(tua=1)", ("pike(tua=1): mixer.tua", "Did you mean 'mixer.tau'?")),
        ("temperature(temperature=[)", ("not valid YAML",)),
        ("dga", ("dga: mixer.targets", "dga needs a target")),
        ("static", ("static: mixer.weights",)),
        ("uniform,uniform", ("Name each mixer once",)),
        ("unimax(max_epochs=2),unimax(max_epochs= 2)", ("Name each mixer once",)),
        ("uniform,unimax(targets=[c])", ("unimax(targets=[c]): mixer.targets", "than uniform")),
        (" , ", ("no mixer is named",)),
        ("nowhere.yaml", ("--mixers = 'nowhere.yaml'", "No such file")),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_clear_error(spec: str, says: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        make_variants(recipe(), spec, seeds=2, out=OUT)
    (message,) = caught.value.problems
    for words in says:
        assert words in message


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        make_variants(recipe(), "pyke,uniform,dga,pike(tau=-1)", seeds=1, out=OUT)
    assert [text[:4] for text in caught.value.problems] == ["--mi", "dga:", "pike"]


@pytest.mark.parametrize("text", ["", "- a", "tau: 3", "kind: [pike"])
def test_a_file_without_a_section_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"--mixers = .*odd\.yml"):
        mixer_section(recipe(), str(path))


def test_names_of_runs_are_names_of_directories() -> None:
    assert run_name("pike(tau=3, form=full)", 4) == "pike-tau=3-form=full-seed4"
    assert "/" not in run_name("a/../b", 0)
