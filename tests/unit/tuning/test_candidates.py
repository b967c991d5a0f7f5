"""Which mixtures a search runs, what is kept of them, and what the law is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.errors import RecipeError, TrainingError
from raymix.recipe import Recipe, TuneConfig, load_recipe
from raymix.store import Corpus
from raymix.tuning.mixtures.candidates import (
    Mixture,
    design_mixtures,
    loss_weights,
    optimum_mixture,
    proxy_recipe,
    references,
    smoke_config,
    space_of,
    variant,
)
from raymix.tuning.mixtures.learn import learn, mixture_table, optimum_path, predict_mixture, slices
from raymix.tuning.mixtures.search_log import SearchLog, free_directory
from raymix.tuning.mixtures.verify import observed_runs, roles_of, verify_mixtures
from raymix.tuning.runs.results import EvaluationPoint, RunResult
from tests.support.laws import OwnShare
from tests.support.loops import train_corpus

STEPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


def recipe(corpus: Corpus, tune: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    document = {
        "name": "run",
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 32, "rows_per_step": 4},
        "train": {"steps": 100},
        "tune": {"law": OwnShare.kind, **(tune or {})},
        **sections,
    }
    return load_recipe(Recipe.model_validate(document))


def test_limits_follow_from_floors_caps_and_epochs(corpus: Corpus) -> None:
    given = {"floor": 0.3, "floors": {"b": 0.2}, "caps": {"a": 0.6}, "max_epochs": 2}
    space = space_of(recipe(corpus, given), corpus)
    assert space.domains == ("a", "b", "c")
    np.testing.assert_allclose(space.floor_D, [0.1, 0.2, 0.1])
    # 100 steps of 128 tokens; c has 3,000 tokens in blocks of 256, of which 2,976 fill rows of 32.
    np.testing.assert_allclose(
        space.cap_D, [0.6, 1.0 * 2 * 5984 / 12800, 2 * 2976 / 12800], rtol=0.01
    )
    np.testing.assert_allclose(space.proportional_D, [0.5, 1 / 3, 1 / 6], atol=0.01)


def test_targets_are_measured_and_not_mixed(corpus: Corpus) -> None:
    with_target = recipe(corpus, mixer={"kind": "uniform", "targets": ["c"]})
    space = space_of(with_target, corpus)
    assert (space.domains, space.targets) == (("a", "b"), ("c",))
    assert loss_weights(with_target, space) == {"c": 1.0}
    assert loss_weights(recipe(corpus, {"weights": {"a": 3, "b": 1}}), space) == {
        "a": 0.75,
        "b": 0.25,
    }
    one = variant(proxy_recipe(with_target), references(space)[0], out="/x")
    assert one.recipe.mixer.targets == ("c",)


@settings(max_examples=20)
@given(
    design=st.sampled_from(["dirichlet", "space_filling", "d_optimal"]),
    corners=st.booleans(),
    left=st.booleans(),
    seed=st.integers(0, 50),
)
def test_designed_mixtures_can_be_run(
    corpus: Corpus, design: str, corners: bool, left: bool, seed: int
) -> None:
    given_ = {"design": design, "vertices": corners, "leave_one_out": left, "seed": seed, "runs": 5}
    one = recipe(corpus, given_)
    space = space_of(one, corpus)
    mixtures = design_mixtures(one.tune, space)
    assert 5 <= len(mixtures) <= 5 + 3 * corners + 3 * left
    assert [mixture.name for mixture in mixtures] == [f"mix-{n:03d}" for n in range(len(mixtures))]
    assert len({tuple(mixture.shares.values()) for mixture in mixtures}) == len(mixtures)
    proxy = proxy_recipe(one)
    for mixture in mixtures:
        share_D = space.array(mixture.shares)
        assert (share_D >= space.floor_D - 2e-6).all()
        run = variant(proxy, mixture, out="/o")
        # Read back as training reads it: the shares sum to 1 and stay what they are.
        stored = Recipe.model_validate(run.recipe.model_dump(mode="json"))
        assert stored.mixer.shares()["weights"] == mixture.shares
        assert (run.name, run.recipe.run_dir) == (mixture.name, f"/o/{mixture.name}")
        assert (run.recipe.cluster.workers, run.recipe.tune) == (0, TuneConfig())


def test_small_runs_differ_where_the_recipe_says_so(corpus: Corpus) -> None:
    changes = {"train.steps": 20, "model": {"config": {"hidden_size": 16}}, "eval": {"every": 5}}
    one = recipe(
        corpus,
        {"proxy": changes},
        train={"tokens": 10_000},
        data={"sequence_length": 32, "rows_per_step": 4, "max_epochs": 1},
        model={"type": "llama", "config": {"num_hidden_layers": 2}},
    )
    proxy = proxy_recipe(one)
    assert (proxy.train.steps, proxy.train.tokens, proxy.eval.every) == (20, None, 5)
    assert proxy.model.model_dump()["config"] == {"num_hidden_layers": 2, "hidden_size": 16}
    assert proxy.data.max_epochs is None
    tiny = proxy_recipe(one, smoke=True)
    assert (tiny.train.steps, tiny.eval.every, tiny.data.sequence_length) == (20, 5, 32)
    assert smoke_config(TuneConfig(runs=30, initial=20)).initial == 8
    with pytest.raises(RecipeError, match=r"tune.proxy: train.stepz = 3: unknown key"):
        proxy_recipe(recipe(corpus, {"proxy": {"train.stepz": 3}}))


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"proxy": {"mixer.kind": "uniform"}}, "cannot differ in the small runs"),
        ({"prior": {"a": 0.5}}, "tune.prior"),
        ({"initial": 20}, "more than the 16 runs"),
        ({"weights": {"a": 0}}, "every weight is 0"),
        ({"runs": 1}, "tune.runs"),
    ],
)
def test_what_cannot_be_is_refused(
    corpus: Corpus, given_: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    document = recipe(corpus).model_dump(mode="json") | {"tune": given_}
    file.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match=expected):
        load_recipe(file)


def test_limits_without_room_are_refused(corpus: Corpus) -> None:
    with pytest.raises(RecipeError, match=r"tune: caps = 0.9.*no choice of mixture"):
        space_of(recipe(corpus, {"caps": {"a": 0.3, "b": 0.3, "c": 0.3}}), corpus)


def test_a_begun_design_is_kept_or_refused(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = recipe(corpus, {"runs": 4})
    space = space_of(one, corpus)
    first = SearchLog.open(out, one, space, "f").mixtures
    assert SearchLog.open(out, one, space, "f").mixtures == first
    # Nothing has begun: another design takes its place.
    other = recipe(corpus, {"runs": 4, "seed": 3})
    assert SearchLog.open(out, other, space, "f").mixtures != first
    SearchLog.open(out, one, space, "f")
    (out / "mix-001").mkdir()
    # Longer, and what has begun stays what it is.
    longer = SearchLog.open(out, recipe(corpus, {"runs": 6}), space, "f").mixtures
    assert (len(longer), longer[:4]) == (6, first)
    with pytest.raises(RecipeError, match=r"tune.seed: 0 -> 3.*--if-exists new"):
        SearchLog.open(out, other, space, "f")


def test_directories_of_something_else_are_refused(tmp_path: Path) -> None:
    assert free_directory(tmp_path, "fail") == tmp_path
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RecipeError, match="holds files but no search"):
        free_directory(tmp_path, "resume")
    with pytest.raises(RecipeError, match="a search is here already"):
        free_directory(tmp_path, "fail")
    assert free_directory(tmp_path, "new") == tmp_path.with_name(f"{tmp_path.name}-2")


def results_of(mixtures: list[Mixture], *, seeds: tuple[int, ...] = (0,)) -> list[RunResult]:
    """Return runs whose losses are 3 own_share ** -0.1 step ** -0.05, to 1 % per seed."""

    def point(mixture: Mixture, step: int, seed: int) -> EvaluationPoint:
        losses = {
            name: 3 * (share + 1e-3) ** -0.1 * step**-0.05 * (1 + 0.01 * seed)
            for name, share in mixture.shares.items()
        }
        return EvaluationPoint(step=step, tokens=step, flops=0.0, extra_flops=0.0, losses=losses)

    return [
        RunResult(
            mixer=mixture.name,
            seed=seed,
            path=f"/o/{mixture.name}",
            state="done",
            shares=mixture.shares,
            points=[point(mixture, step, seed) for step in (10, 20, STEPS)],
        )
        for mixture in mixtures
        for seed in seeds
    ]


def test_from_runs_to_a_verified_optimum(corpus: Corpus) -> None:
    one = recipe(corpus, {"runs": 8, "prior": "uniform"})
    space = space_of(one, corpus)
    mixtures = design_mixtures(one.tune, space)
    runs = results_of(mixtures)
    table = mixture_table(runs, {m.name: m.shares for m in mixtures}, space)
    assert (len(table), table.run_count) == (24, 8)
    learned = learn(table, one, space)
    # Equal exponents: even shares are best, and the law knows the losses exactly.
    optimum = optimum_mixture(learned.optimum.shares, space)
    np.testing.assert_allclose(list(optimum.shares.values()), 1 / 3, atol=0.03)
    prediction = predict_mixture(learned, optimum.shares, step=STEPS)
    exact = results_of([optimum])[0].losses
    assert prediction["value"] == pytest.approx(sum(exact.values()) / 3, rel=1e-6)
    # The law fits exactly: what is left is the 1 % that it says it is unsure by.
    assert prediction["high"] - prediction["value"] == pytest.approx(
        1.96 * 0.01 * prediction["value"], rel=1e-6
    )

    tried = observed_runs(runs, mixtures, learned.objective)
    roles = roles_of(tried, optimum, references(space))
    seeds = results_of(list(roles.values()), seeds=(1, 2, 3))
    rows = verify_mixtures(roles, seeds, learned, space=space, step=STEPS)
    best = min(tried, key=lambda run: run["value"])
    assert rows["best observed"]["mixture"] == best["name"]
    assert rows["uniform"]["measured"]["mean"] == pytest.approx(
        1.02 * rows["uniform"]["predicted"]["value"]
    )
    assert rows["optimum"]["error"] == pytest.approx(1 / 1.02 - 1, abs=1e-6)
    assert rows["optimum"]["inside"] is False
    assert rows["uniform"]["allowed"]
    assert max(optimum.shares.values()) <= table.share_RD.max() + 1e-6
    gain = rows["optimum"]["against"]["proportional"]
    assert gain["high"] < 0
    assert gain["seeds"] == 3

    path = optimum_path(learned, one, table)
    assert [path[0]["step"], path[-1]["step"]] == [10, 4 * STEPS]
    assert [spot["measured"] for spot in path] == sorted(
        (spot["measured"] for spot in path), reverse=True
    )
    curve = slices(learned, space, step=STEPS)["a"]
    lowest = curve["share"][int(np.argmin(curve["value"]))]
    assert lowest == pytest.approx(1 / 3, abs=0.12)


def test_the_optimum_has_no_share_beyond_those_of_the_runs(corpus: Corpus) -> None:
    one = recipe(corpus, {"runs": 4, "concentration": 50})
    space = space_of(one, corpus)
    mixtures = design_mixtures(one.tune, space)
    table = mixture_table(results_of(mixtures), {m.name: m.shares for m in mixtures}, space)
    near = learn(table, one, space).optimum.shares
    assert all(near[name] <= table.share_RD[:, at].max() for at, name in enumerate("abc"))
    far = learn(table, recipe(corpus, {"extrapolate": True}), space).optimum.shares
    assert far["c"] == pytest.approx(1 / 3, abs=0.03)


def test_too_few_runs_are_a_failure(corpus: Corpus) -> None:
    one = recipe(corpus)
    space = space_of(one, corpus)
    mixtures = design_mixtures(one.tune, space)[:2]
    with pytest.raises(TrainingError, match="only 2 of 2 small runs"):
        mixture_table(results_of(mixtures), {m.name: m.shares for m in mixtures}, space)
