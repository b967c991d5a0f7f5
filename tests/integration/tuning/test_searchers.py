"""Mixtures proposed one by one, without a cluster: by a law's expected improvement, by Optuna."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymix.errors import RecipeError
from raymix.recipe import Recipe, load_recipe
from raymix.store import Corpus
from raymix.tuning.mixtures.candidates import MixtureSpace, space_of
from raymix.tuning.mixtures.search_log import SearchLog
from raymix.tuning.mixtures.searchers import MixtureSearcher, expected_improvement, final_losses
from tests.support.laws import OwnShare
from tests.support.loops import train_corpus

STEPS = 10
Losses = Callable[[Mapping[str, float]], dict[str, float]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


def recipe(corpus: Corpus, **tune: Any) -> Recipe:
    document = {
        "name": "run",
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 32, "rows_per_step": 4},
        "train": {"steps": STEPS},
        "tune": {"law": OwnShare.kind, "mode": "sequential", "initial": 4, **tune},
    }
    return load_recipe(Recipe.model_validate(document))


def powers(shares: Mapping[str, float]) -> dict[str, float]:
    """Return losses whose sum is least near 0.17, 0.28, 0.55, by the law that tests fit."""
    exponents = {"a": 0.1, "b": 0.2, "c": 0.6}
    return {name: 2 * (share + 1e-3) ** -exponents[name] for name, share in shares.items()}


def write_end(run: Path, losses: Mapping[str, float], step: int = STEPS) -> None:
    run.mkdir(parents=True)
    table = {name: {"loss": loss} for name, loss in losses.items()}
    (run / "metrics.jsonl").write_text(json.dumps({"step": step, "eval": table}) + "\n")


def searcher(one: Recipe, space: MixtureSpace, out: Path, names: list[str]) -> MixtureSearcher:
    record = SearchLog.open(out, one, space, "f")
    return MixtureSearcher(one, record, names, space=space, out=out, steps=STEPS)


def search(one: Recipe, space: MixtureSpace, out: Path, runs: int) -> list[dict[str, Any]]:
    """Return what the searcher configured `runs` runs with, each finished before the next."""
    mixture_searcher = searcher(one, space, out, [f"mix-{at:03d}" for at in range(runs)])
    configured: list[dict[str, Any]] = []
    for at in range(runs):
        config = mixture_searcher.suggest(f"trial-{at}")
        assert config is not None
        configured.append(config)
        write_end(out / config["name"], powers(config["shares"]))
        mixture_searcher.on_trial_complete(f"trial-{at}", {"state": "done"})
    return configured


def test_the_law_finds_its_optimum(corpus: Corpus, tmp_path: Path) -> None:
    one = recipe(corpus)
    space = space_of(one, corpus)
    configured = search(one, space, tmp_path, 8)
    assert [config["at"] for config in configured] == list(range(8))
    values = [sum(powers(config["shares"]).values()) / 3 for config in configured]
    draws = np.random.default_rng(0).dirichlet(np.ones(3), 20_000)
    draws = space.floor_D + (1 - space.floor_D.sum()) * draws
    best = min(sum(powers(dict(zip("abc", row, strict=True))).values()) / 3 for row in draws)
    assert min(values[4:]) < min(values[:4])
    assert min(values[4:]) == pytest.approx(best, rel=2e-3)
    for config in configured:
        share_D = space.array(config["shares"])
        assert (share_D >= space.floor_D - 2e-6).all()
        assert share_D.sum() == pytest.approx(1, abs=1e-9)
    stored = json.loads((tmp_path / "design.json").read_text())["mixtures"]
    assert [mixture["shares"] for mixture in stored] == [c["shares"] for c in configured]
    assert "expected improvement" in stored[-1]["origin"]


def test_a_new_searcher_learns_from_what_is_there(corpus: Corpus, tmp_path: Path) -> None:
    one = recipe(corpus)
    space = space_of(one, corpus)
    search(one, space, tmp_path / "a", 5)
    search(one, space, tmp_path / "b", 6)
    again = searcher(one, space, tmp_path / "a", ["mix-005"])
    config = again.suggest("trial")
    assert config is not None
    assert (config["at"], config["name"]) == (0, "mix-005")
    stored = json.loads((tmp_path / "b" / "design.json").read_text())["mixtures"]
    assert config["shares"] == pytest.approx(stored[5]["shares"], abs=1e-5)


def test_it_waits_where_too_little_is_known(corpus: Corpus, tmp_path: Path) -> None:
    one = recipe(corpus, initial=2)
    space = space_of(one, corpus)
    mixture_searcher = searcher(one, space, tmp_path, ["mix-000", "mix-001", "mix-002"])
    assert mixture_searcher.suggest("one") is not None
    assert mixture_searcher.suggest("two") is not None
    # Two runs are under way: a law needs three, so the third is a draw once they have ended.
    assert mixture_searcher.suggest("three") is None
    for trial, name in (("one", "mix-000"), ("two", "mix-001")):
        write_end(tmp_path / name, {"a": 2.0, "b": 2.0, "c": 2.0})
        mixture_searcher.on_trial_complete(trial, {"state": "done"})
    config = mixture_searcher.suggest("three")
    assert config is not None
    assert config["name"] == "mix-002"


def test_runs_under_way_are_not_proposed_again(corpus: Corpus, tmp_path: Path) -> None:
    one = recipe(corpus)
    space = space_of(one, corpus)
    search(one, space, tmp_path, 4)
    mixture_searcher = searcher(one, space, tmp_path, ["mix-004", "mix-005"])
    first, second = mixture_searcher.suggest("one"), mixture_searcher.suggest("two")
    assert first is not None
    assert second is not None
    apart = np.sqrt(space.array(first["shares"])) - np.sqrt(space.array(second["shares"]))
    assert math.sqrt(float(np.square(apart).sum())) > 0.05


def test_a_run_without_an_end_teaches_nothing(tmp_path: Path) -> None:
    assert final_losses(tmp_path / "none", STEPS) is None
    write_end(tmp_path / "begun", {"a": 1.0}, step=STEPS - 1)
    assert final_losses(tmp_path / "begun", STEPS) is None
    write_end(tmp_path / "done", {"a": 1.0})
    assert final_losses(tmp_path / "done", STEPS) == {"a": 1.0}


def test_expected_improvement_is_that_of_a_normal() -> None:
    value, deviation, best = np.array([1.0, 1.2, 0.5]), np.array([0.3, 0.1, 0.2]), 0.9
    draws = np.random.default_rng(0).normal(value, deviation, (400_000, 3))
    measured = np.maximum(0, best - draws).mean(axis=0)
    np.testing.assert_allclose(expected_improvement(value, deviation, best), measured, atol=1e-3)


def test_optuna_searches_the_same_mixtures(corpus: Corpus, tmp_path: Path) -> None:
    one = recipe(corpus, mode="optuna")
    space = space_of(one, corpus)
    configured = search(one, space, tmp_path, 24)
    values = [sum(powers(config["shares"]).values()) / 3 for config in configured]
    assert min(values[4:]) < min(values[:4])
    for config in configured:
        assert (space.array(config["shares"]) >= space.floor_D - 2e-6).all()
    again = searcher(one, space, tmp_path, ["mix-024"])
    assert again.suggest("trial") is not None


def test_optuna_is_asked_for_where_it_is_missing(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one = recipe(corpus, mode="optuna")
    with pytest.raises(RecipeError, match=r"pip install raymix\[optuna\]"):
        searcher(one, space_of(one, corpus), tmp_path, ["mix-000"])
