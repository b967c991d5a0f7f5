"""A recipe that extends another: merged by field, by name, from any directory, and in one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raymix.errors import RecipeError
from raymix.jobs.submission import prepare_submission
from raymix.recipe import Recipe, load_recipe, read_recipe
from tests.support.recipes import document, write

BASE = document(
    corpus={
        "path": "corpora/demo",
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "domains": [{"name": name, "train": f"data/{name}/*.txt"} for name in ("a", "b", "c")],
    },
    mixer={"kind": "temperature", "temperature": 3},
    train={"steps": 10, "lr": 0.1},
)


def extend(folder: Path, name: str = "child.yaml", base: str = "base.yaml", **own: Any) -> Path:
    return write(folder / name, {"extends": base, **own})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "base.yaml", BASE)
    return tmp_path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_nothing_said_is_the_base(folder: Path) -> None:
    assert load_recipe(extend(folder)) == load_recipe(folder / "base.yaml")


def test_fields_are_merged_and_the_extending_file_wins(folder: Path) -> None:
    recipe = load_recipe(extend(folder, name="x.yaml", train={"steps": 20}, seed=3))
    assert (recipe.train.steps, recipe.train.lr, recipe.seed) == (20, 0.1, 3)


def test_another_kind_drops_the_fields_of_the_old(folder: Path) -> None:
    assert load_recipe(extend(folder, mixer={"kind": "uniform"})).mixer.kind == "uniform"


def test_another_tokenizer_replaces_the_old(folder: Path) -> None:
    recipe = load_recipe(extend(folder, corpus={"tokenizer": "byte"}))
    assert recipe.corpus.tokenizer.model_dump() == {"kind": "byte"}
    path = extend(folder, corpus={"tokenizer": {"path": "./t"}})
    assert load_recipe(path).corpus.tokenizer.path == str(folder / "t")  # type: ignore[union-attr]  # chosen above


def test_domains_are_merged_by_name(folder: Path) -> None:
    domains = [{"name": "b", "text_column": "t"}, {"name": "d", "train": "d.txt"}]
    merged = load_recipe(extend(folder, corpus={"domains": domains})).corpus.domains
    assert [domain.name for domain in merged] == ["a", "b", "c", "d"]
    assert merged[1].text_column == "t"
    assert merged[1].train == (str(folder / "data/b/*.txt"),)


def test_names_alone_select_domains(folder: Path) -> None:
    selected = load_recipe(extend(folder, corpus={"domains": ["c", "a"]})).corpus.domains
    assert [domain.name for domain in selected] == ["c", "a"]
    path = extend(folder, corpus={"domains": ["c", "aa"]})
    assert refused(path) == (
        "corpus.domains = 'aa': the extended recipe has no entry of this name. "
        "Known: a, b, c. Did you mean 'a'?"
    )


def test_shares_are_replaced_as_a_whole(folder: Path) -> None:
    """Shares of two files would not sum to 1."""
    write(folder / "base.yaml", BASE | {"mixer": {"kind": "static", "weights": {"a": 1}}})
    path = extend(folder, mixer={"weights": {"b": 0.5, "c": 0.5}})
    assert load_recipe(path).mixer.weights == {"b": 0.5, "c": 0.5}  # type: ignore[union-attr]  # static


def test_fields_of_a_model_are_merged(folder: Path) -> None:
    write(folder / "base.yaml", BASE | {"model": {"config": {"hidden_size": 8, "vocab_size": 9}}})
    recipe = load_recipe(extend(folder, model={"config": {"hidden_size": 16}}))
    assert recipe.model.config == {"hidden_size": 16, "vocab_size": 9}  # type: ignore[union-attr]  # config


def test_null_is_a_value(folder: Path) -> None:
    recipe = load_recipe(extend(folder, train={"steps": None, "tokens": 10_000}))
    assert (recipe.train.steps, recipe.train.tokens) == (None, 10_000)


@given(depth=st.integers(1, 8))
def test_any_depth(tmp_path_factory: pytest.TempPathFactory, depth: int) -> None:
    folder = tmp_path_factory.mktemp("deep")
    write(folder / "0.yaml", BASE)
    for at in range(1, depth + 1):
        extend(folder, f"{at}.yaml", f"{at - 1}.yaml", seed=at, train={"steps": 100 + at})
    recipe = load_recipe(folder / f"{depth}.yaml")
    assert (recipe.seed, recipe.train.steps, recipe.train.lr) == (depth, 100 + depth, 0.1)


def test_a_cycle_is_refused(folder: Path) -> None:
    extend(folder, "x.yaml", "y.yaml")
    extend(folder, "y.yaml", "sub/../x.yaml")
    (folder / "sub").mkdir()
    assert "a recipe cannot extend itself" in refused(folder / "x.yaml")
    assert "Break the cycle" in refused(extend(folder, "z.yaml", "z.yaml"))


def test_a_missing_base_names_both_files(folder: Path) -> None:
    path = extend(folder, base="bases.yaml")
    assert refused(path) == (
        f"recipe = '{folder / 'bases.yaml'}': no such file. Did you mean 'base.yaml'? "
        f"{path} extends it."
    )


@pytest.mark.parametrize("base", [3, "", ["base.yaml"], {"a": 1}])
def test_what_is_no_path_is_refused(folder: Path, base: Any) -> None:
    assert "not a path" in refused(write(folder / "x.yaml", {"extends": base}))


def test_faults_of_the_base_say_where_they_stand(folder: Path) -> None:
    write(folder / "base.yaml", BASE | {"train": {"steps": 10, "lr": -1}})
    message = refused(extend(folder, train={"steps": 0}))
    own, inherited = message.splitlines()
    assert own.startswith("train.steps = 0: too small")
    assert "Inherited" not in own
    assert inherited.endswith(f"Inherited from {folder / 'base.yaml'}.")


def test_sources_start_at_the_file_that_names_them(folder: Path) -> None:
    below = folder / "[odd] name"
    below.mkdir()
    path = extend(below, base="../base.yaml", corpus={"domains": [{"name": "d", "train": "d.txt"}]})
    domains = load_recipe(path).corpus.domains
    assert domains[0].train == (str(folder / "data/a/*.txt"),)
    assert Path(read_recipe(path)[0].corpus.domains[3].train[0]) == Path("d.txt")


def test_a_base_in_an_odd_directory_is_no_pattern(folder: Path) -> None:
    odd = folder / "v[1]"
    (odd / "data" / "a").mkdir(parents=True)
    write(odd / "base.yaml", BASE)
    (odd / "data" / "a" / "x.txt").write_text("text")
    train = load_recipe(extend(folder, base="v[1]/base.yaml")).corpus.domains[0].train[0]
    assert list(Path("/").glob(train[1:])) == [odd / "data" / "a" / "x.txt"]


def test_only_files_extend(folder: Path) -> None:
    assert "only a file can extend another" in refused(folder / "base.yaml", "extends=x.yaml")
    with pytest.raises(ValueError, match="only a file can extend another"):
        Recipe.model_validate({**BASE, "extends": "x.yaml"})


def test_a_written_recipe_stands_alone(folder: Path) -> None:
    recipe = load_recipe(extend(folder, seed=5))
    assert "extends" not in recipe.model_dump()
    written = write(folder / "again.yaml", yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(written) == recipe


def test_a_job_ships_every_file_of_a_recipe(folder: Path) -> None:
    project = folder / "project"
    (project / "data").mkdir(parents=True)
    for name in "abc":
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "x.txt").write_text("text")
    path = extend(project, base="../base.yaml")
    with pytest.raises(RecipeError, match=r"base\.yaml': not among the files|outside of the"):
        prepare_submission("plan", str(path), project=project)
    assert prepare_submission("plan", str(path), project=folder).entrypoint
