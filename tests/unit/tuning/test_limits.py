"""What a search may mix: names, limits and numbers of runs, refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.errors import LawError, RecipeError
from raymix.laws import known_laws
from raymix.laws.design import (
    check_limits,
    d_optimal_design,
    dirichlet_design,
    features_for,
    leave_one_out,
    space_filling_design,
    vertices,
    within_limits,
)
from raymix.recipe import Recipe, TuneConfig, load_recipe
from raymix.store import Corpus
from raymix.tuning.mixtures.candidates import (
    EVALUATIONS,
    Mixture,
    MixtureSpace,
    check_run_count,
    design_mixtures,
    initial_runs,
    loss_weights,
    objective_of,
    optimum_mixture,
    proxy_recipe,
    references,
    smoke_config,
    space_of,
    variant,
)
from raymix.tuning.mixtures.learn import check_law
from raymix.tuning.mixtures.search_log import SearchLog, free_directory
from raymix.tuning.runs.variants import steps_of
from tests.support.loops import train_corpus
from tests.support.recipes import document, write
from tests.unit.tuning.test_candidates import recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


def space(size: int = 3, *, floor: float = 0.0, cap: float = 1.0) -> MixtureSpace:
    """Return the space of so many domains, the later ones with more text."""
    proportional_D = np.arange(1.0, size + 1) / np.arange(1.0, size + 1).sum()
    return MixtureSpace(
        domains=tuple(f"d{at}" for at in range(size)),
        targets=(),
        floor_D=np.full(size, floor),
        cap_D=np.full(size, cap),
        prior_D=proportional_D,
        proportional_D=proportional_D,
    )


def shares_of(mixtures: list[Mixture], origin: str) -> list[list[float]]:
    return [list(mixture.shares.values()) for mixture in mixtures if mixture.origin == origin]


# The section of a recipe.


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "design_"}, "tune.mode = 'design_': not known. Allowed: 'design', 'sequential'"),
        ({"design": "latin"}, "tune.design = 'latin': not known. Allowed: 'dirichlet', "),
        ({"scheduler": "pbt"}, "tune.scheduler = 'pbt': not known. Allowed: 'none' or 'asha'"),
        ({"runs": 1}, "tune.runs = 1: "),
        ({"runs": 20_000}, "tune.runs = 20000: "),
        ({"runs": 2.5}, "tune.runs = 2.5: "),
        ({"initial": 1}, "tune.initial = 1: "),
        ({"concentration": 0}, "tune.concentration = 0: "),
        ({"floor": 1}, "tune.floor = 1: "),
        ({"floors": {"books": 1.5}}, "tune.floors.books = 1.5: "),
        ({"caps": {"books": -0.1}}, "tune.caps.books = -0.1: "),
        ({"caps": {"boks": 0.5}}, "tune.caps.boks = 0.5: no domain of the corpus has this name. "),
        ({"floors": {"boks": 0.1}}, "Did you mean 'books'?"),
        ({"weights": {"law": 1.0}}, "tune.weights.law = 1.0: no domain of the corpus"),
        ({"prior": {"books": 0.5, "law": 0.5}}, "tune.prior.law = 0.5: no domain of the corpus"),
        ({"prior": {"books": 0.5, "code": 0.4}}, "tune.prior"),
        ({"prior": "even"}, "tune.prior = 'even': "),
        ({"max_epochs": 0}, "tune.max_epochs = 0: "),
        ({"horizon": 0}, "tune.horizon = 0: "),
        ({"kl": -1}, "tune.kl = -1: "),
        ({"verify": -1}, "tune.verify = -1: "),
        ({"law": ""}, "tune.law = '': "),
        ({"verfiy": 2}, "tune.verfiy = 2: unknown key"),
        ({"mode": "sequential", "scheduler": "asha"}, "tune.scheduler = 'asha': runs that follow"),
        ({"mode": "optuna", "scheduler": "asha"}, "Use it with mode: design."),
    ],
)
def test_a_section_that_cannot_be_is_one_clear_error(
    section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path / "r.yaml", document(tune=section)))
    assert len(caught.value.problems) == 1, caught.value.problems
    assert message in caught.value.problems[0]


@pytest.mark.parametrize("name", ["name", "seed", "corpus", "mixer", "run", "cluster", "tune"])
@pytest.mark.parametrize("nested", [False, True])
def test_small_runs_cannot_be_of_another_kind(name: str, nested: bool, tmp_path: Path) -> None:
    proxy = {name: {"x": 1}} if nested else {f"{name}.x": 1}
    with pytest.raises(RecipeError, match=rf"tune.proxy.{name}.*cannot differ in the small runs"):
        load_recipe(write(tmp_path / "r.yaml", document(tune={"proxy": proxy})))


def test_all_faults_of_a_section_are_told_at_once(tmp_path: Path) -> None:
    section = {"runs": 4, "initial": 9, "weights": {"books": 0}, "proxy": {"seed": 1}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path / "r.yaml", document(tune=section)))
    assert len(caught.value.problems) == 3


def test_a_section_survives_its_file(tmp_path: Path) -> None:
    given_ = TuneConfig(mode="sequential", runs=9, initial=4, prior={"books": 0.25, "code": 0.75})
    path = write(tmp_path / "r.yaml", document(tune=given_.model_dump(mode="json")))
    assert load_recipe(path).tune == given_
    assert set(given_.by_domain()) == {"weights", "floors", "caps", "prior"}
    assert "prior" not in TuneConfig().by_domain()


def test_a_law_that_there_is_not_is_refused_by_its_path() -> None:
    with pytest.raises(RecipeError, match=r"tune: law = 'bimx'.*Did you mean 'bimix'"):
        check_law("bimx")
    for kind in known_laws():
        check_law(kind)


# Names, where only the prepared corpus knows them.


@pytest.mark.parametrize(
    ("section", "mixer", "message"),
    [
        ({"caps": {"aa": 0.5}}, {}, "tune.caps.aa = 0.5: no domain of the corpus has this name"),
        ({"floors": {"z": 0.1}}, {}, "tune.floors.z = 0.1: no domain"),
        ({"weights": {"z": 1.0}}, {}, "tune.weights.z = 1.0: no domain"),
        ({"prior": {"a": 0.5, "z": 0.5}}, {}, "Known: a, b, c."),
        ({}, {"targets": ["medicine"]}, "mixer.targets = 'medicine': no domain"),
        ({}, {"targets": ["a", "b", "c"]}, "every domain is a target"),
        ({"floors": {"c": 0.2}}, {"targets": ["c"]}, "tune.floors.c = 0.2: a target is measured"),
        (
            {"prior": {"a": 0.5, "c": 0.5}},
            {"targets": ["c"]},
            "tune.prior.c = 0.5: a target is measured and never trained on. Its share must be 0.",
        ),
        ({}, {"targets": ["b", "c"]}, "a mixture needs two domains or more"),
    ],
)
def test_names_are_checked_against_the_corpus(
    corpus: Corpus, section: dict[str, Any], mixer: dict[str, Any], message: str
) -> None:
    one = recipe(corpus, section, mixer={"kind": "uniform", **mixer})
    with pytest.raises(RecipeError) as caught:
        space_of(one, corpus)
    assert any(message in problem for problem in caught.value.problems), caught.value.problems


def test_a_target_may_be_weighted_and_capped(corpus: Corpus) -> None:
    section = {"weights": {"c": 1, "a": 3}, "caps": {"c": 0.0}, "prior": {"a": 1.0, "c": 0.0}}
    one = recipe(corpus, section, mixer={"kind": "uniform", "targets": ["c"]})
    space = space_of(one, corpus)
    assert loss_weights(one, space) == {"c": 0.25, "a": 0.75}
    assert space.prior_D.tolist() == [1.0, 0.0]


def test_a_prior_of_targets_alone_leaves_nothing_to_draw_around(corpus: Corpus) -> None:
    one = recipe(corpus, {"prior": {"c": 1.0}}, mixer={"kind": "uniform", "targets": ["c"]})
    with pytest.raises(RecipeError, match=r"tune.prior.c = 1.0: a target"):
        space_of(one, corpus)


# Limits.


@pytest.mark.parametrize(
    ("section", "messages"),
    [
        ({"floors": {"a": 0.6, "b": 0.6}}, ["tune: floors = ", "they sum to 1 or more"]),
        ({"floors": {"a": 0.5}, "caps": {"a": 0.4}}, ["tune: floor of a = 0.5: above its cap"]),
        ({"caps": {"a": 0.2, "b": 0.2, "c": 0.2}}, ["tune: caps = 0.6", "Raise some"]),
        ({"max_epochs": 0.5}, ["tune: caps = ", "no choice of mixture"]),
    ],
)
def test_limits_that_cannot_be_met_are_refused(
    corpus: Corpus, section: dict[str, Any], messages: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        space_of(recipe(corpus, section), corpus)
    assert all(words in str(caught.value) for words in messages)


def test_a_floor_never_lifts_a_domain_above_its_cap(corpus: Corpus) -> None:
    space = space_of(recipe(corpus, {"floor": 0.9, "caps": {"c": 0.05}}), corpus)
    np.testing.assert_allclose(space.floor_D, [0.3, 0.3, 0.05])


def test_caps_by_epochs_are_of_the_recipes_own_run(corpus: Corpus) -> None:
    small = {"max_epochs": 2, "proxy": {"train.steps": 1}}
    long = recipe(corpus, small, train={"steps": 100})
    short = recipe(corpus, small, train={"steps": 50})
    ratio_D = space_of(long, corpus).cap_D / space_of(short, corpus).cap_D
    assert ratio_D[2] == pytest.approx(0.5)
    data = {"sequence_length": 32, "rows_per_step": 4, "max_epochs": {"c": 1}}
    by_data = space_of(recipe(corpus, data=data), corpus)
    assert by_data.cap_D[0] == by_data.cap_D[1] == 1
    assert by_data.cap_D[2] == pytest.approx(2976 / 12800, rel=0.02)
    # What `tune` says of epochs goes before what `data` says.
    freed = space_of(recipe(corpus, {"max_epochs": 50}, data=data), corpus)
    assert freed.cap_D[2] == 1


@given(raw=st.lists(st.floats(1e-9, 1), min_size=2, max_size=40))
def test_rounded_shares_still_sum_to_one(raw: list[float]) -> None:
    some = space(len(raw))
    shares = some.shares(np.array(raw) / sum(raw))
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert min(shares.values()) >= 0
    np.testing.assert_allclose(some.array(shares), np.array(raw) / sum(raw), atol=3e-5)


def test_the_objective_says_what_the_section_says(corpus: Corpus) -> None:
    section = {"minimax": True, "kl": 0.25, "caps": {"a": 0.5}, "floors": {"b": 0.2}}
    one = recipe(corpus, section)
    objective = objective_of(one, space_of(one, corpus), horizon=77)
    assert (objective.horizon, objective.minimax, objective.kl) == (77, True, 0.25)
    assert (objective.caps["a"], objective.floors["b"]) == (0.5, 0.2)
    assert objective.weights == dict.fromkeys("abc", 1 / 3)
    assert objective.prior is not None
    assert sum(objective.prior.values()) == pytest.approx(1)


# Designs.


@pytest.mark.parametrize(("corners", "left", "enough"), [(0, 0, False), (1, 0, True), (0, 1, True)])
def test_a_design_too_short_for_a_law_is_refused(corners: int, left: int, enough: bool) -> None:
    config = TuneConfig(runs=2, vertices=bool(corners), leave_one_out=bool(left))
    if enough:
        check_run_count(config, space())
        return
    with pytest.raises(RecipeError, match=r"tune.runs = 2: too few runs for a law. Allowed: 3"):
        check_run_count(config, space())


def test_vertices_and_leave_one_out_stand_after_the_design() -> None:
    config = TuneConfig(runs=5, vertices=True, leave_one_out=True, law="regression")
    mixtures = design_mixtures(config, space())
    assert [mixture.origin for mixture in mixtures[:5]] == ["dirichlet"] * 5
    np.testing.assert_allclose(shares_of(mixtures, "vertex"), np.eye(3), atol=1e-5)
    # Proportional shares are 1, 2 and 3 sixths.
    np.testing.assert_allclose(
        shares_of(mixtures, "one domain left out"),
        [[0, 0.4, 0.6], [0.25, 0, 0.75], [1 / 3, 2 / 3, 0]],
        atol=1e-5,
    )


def test_mixtures_that_are_there_already_are_not_run_twice() -> None:
    # Of two domains, the prior less one of them is a vertex.
    config = TuneConfig(runs=4, vertices=True, leave_one_out=True)
    assert len(design_mixtures(config, space(2))) == 6


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (TuneConfig(mode="sequential", runs=16), 8),
        (TuneConfig(mode="sequential", runs=3), 2),
        (TuneConfig(mode="optuna", runs=16, initial=5), 5),
    ],
)
def test_others_follow_from_a_first_part(config: TuneConfig, first: int) -> None:
    assert initial_runs(config) == first
    assert len(design_mixtures(config, space())) == first


@pytest.mark.parametrize("design", ["dirichlet", "space_filling", "d_optimal"])
def test_limits_too_narrow_for_the_runs_are_refused(design: Any) -> None:
    config = TuneConfig(design=design, runs=50)
    with pytest.raises(RecipeError, match=r"tune: runs = \d+.*Widen the limits, or take fewer"):
        design_mixtures(config, space(2, cap=0.5 + 2e-6))


def test_the_references_need_no_law() -> None:
    uniform, proportional = references(space(3))
    assert list(uniform.shares.values()) == pytest.approx([1 / 3] * 3, abs=2e-6)
    assert list(proportional.shares.values()) == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=2e-6)


def test_the_name_of_an_optimum_is_that_of_its_shares() -> None:
    some = space(2)
    one = optimum_mixture({"d0": 0.25, "d1": 0.75}, some)
    assert one.name == optimum_mixture({"d1": 0.75, "d0": 0.25 + 1e-9}, some).name
    assert one.name != optimum_mixture({"d0": 0.251, "d1": 0.749}, some).name
    assert one.shares == {"d0": 0.25, "d1": 0.75}


@settings(max_examples=25)
@given(size=st.integers(2, 9), low=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_the_limits_bend_no_mixture_that_keeps_them(size: int, low: float, seed: int) -> None:
    floor_D, cap_D = np.full(size, low / size), np.ones(size)
    draw_ND = np.random.default_rng(seed).dirichlet(np.ones(size), 4)
    share_ND = floor_D + (1 - floor_D.sum()) * draw_ND
    np.testing.assert_allclose(within_limits(share_ND, floor_D, cap_D), share_ND, atol=1e-9)


def test_a_single_row_is_a_table_of_one() -> None:
    shares = within_limits(np.array([8.0, 1.0, 1.0]), np.zeros(3), np.array([0.5, 1, 1]))
    np.testing.assert_allclose(shares, [[0.5, 0.25, 0.25]], atol=1e-9)
    zeros = within_limits(np.zeros(4), np.zeros(4), np.ones(4))
    np.testing.assert_allclose(zeros, [[0.25] * 4], atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_only_ratios_of_what_is_wanted_count(scale: float) -> None:
    wanted_D, floor_D, cap_D = np.array([3.0, 2, 1]), np.full(3, 0.2), np.array([0.4, 1, 1])
    np.testing.assert_allclose(
        within_limits(scale * wanted_D, floor_D, cap_D), [[0.4, 0.4, 0.2]], atol=1e-9
    )


@pytest.mark.parametrize("law", ["bimix", "additive", "joint", "auto", "regression", "gp"])
def test_features_are_those_the_law_is_linear_in(law: str) -> None:
    share_CD = np.array([[0.2, 0.3, 0.5], [0.0, 0.5, 0.5]])
    features = features_for(law)(share_CD)
    assert np.isfinite(features).all()
    if law in ("regression", "gp"):
        np.testing.assert_array_equal(features, share_CD[:, :2])
    else:
        np.testing.assert_allclose(features[0], np.log(share_CD[0]))


def test_a_d_optimal_design_beats_draws_by_its_own_measure() -> None:
    floor_D, cap_D = np.full(4, 0.02), np.ones(4)

    def information(share_ND: Any) -> float:
        feature_NP = np.hstack([np.ones((len(share_ND), 1)), np.log(share_ND)])
        return float(np.linalg.slogdet(feature_NP.T @ feature_NP)[1])

    limits: Any = {"floor_D": floor_D, "cap_D": cap_D}
    chosen = d_optimal_design(8, features_for("bimix"), seed=0, **limits)
    filled = space_filling_design(8, seed=0, **limits)
    drawn = [
        information(dirichlet_design(8, np.ones(4), concentration=1, seed=s, **limits))
        for s in range(20)
    ]
    assert information(chosen) > max(information(filled), *drawn)


def test_fewer_runs_than_features_are_still_different() -> None:
    design = d_optimal_design(
        2, features_for("bimix"), floor_D=np.full(6, 0.01), cap_D=np.ones(6), seed=1
    )
    assert np.abs(design[0] - design[1]).sum() > 0.5


def test_corners_hold_all_that_the_limits_allow() -> None:
    floor_D, cap_D = np.array([0.1, 0.2, 0.0]), np.array([0.9, 0.6, 0.3])
    max_share_D = np.minimum(cap_D, 1 - (floor_D.sum() - floor_D))
    np.testing.assert_allclose(np.diag(vertices(floor_D, cap_D)), max_share_D, atol=1e-5)
    left_DD = leave_one_out(np.array([0.0, 0.5, 0.5]), floor_D, cap_D)
    assert (left_DD >= floor_D - 1e-9).all()
    assert (left_DD <= cap_D + 1e-9).all()
    np.testing.assert_allclose(left_DD.sum(axis=1), 1)


def test_limits_name_every_domain_at_fault() -> None:
    with pytest.raises(LawError) as caught:
        check_limits(np.array([0.3, 0.4, 0.1]), np.array([0.2, 0.3, 1.0]), ("x", "y", "z"))
    assert [problem.split(" = ")[0] for problem in caught.value.problems] == [
        "floor of x",
        "floor of y",
    ]


# Recipes of small runs.


@pytest.mark.parametrize(
    ("train", "proxy", "steps"),
    [
        ({"steps": 100}, {}, 100),
        ({"steps": 100}, {"train": {"steps": 7}}, 7),
        ({"steps": 100}, {"train.tokens": 1280}, 10),
        ({"tokens": 12_800}, {"data.rows_per_step": 2}, 200),
    ],
)
def test_steps_of_a_small_run(
    corpus: Corpus, train: dict[str, int], proxy: dict[str, Any], steps: int
) -> None:
    one = proxy_recipe(recipe(corpus, {"proxy": proxy}, train=train))
    assert steps_of(one) == steps
    run = variant(one, references(space_of(one, corpus))[0], out="/o").recipe
    assert run.eval.every == -(-steps // EVALUATIONS)
    assert (run.cluster.workers, run.train.keep_checkpoints, run.run.tensorboard) == (0, 1, False)


def test_a_run_that_verifies_is_told_from_the_one_it_verifies(corpus: Corpus) -> None:
    proxy = proxy_recipe(recipe(corpus))
    some = Mixture(name="mix-003", origin="", shares={"a": 0.5, "b": 0.5})
    small, again = variant(proxy, some, out="/o"), variant(proxy, some, out="/o", seed=9)
    assert (small.name, small.seed) == ("mix-003", proxy.seed)
    assert (again.name, again.seed, again.recipe.seed) == ("verify-mix-003-seed9", 9, 9)
    assert small.mixer == again.mixer == some.name
    # Braces of a directory are no fields of its name.
    assert variant(proxy, some, out="/o/{x}").recipe.run_dir == "/o/{x}/mix-003"


def test_a_smoke_test_is_never_larger_than_the_search(corpus: Corpus) -> None:
    small = TuneConfig(runs=3, verify=0)
    assert smoke_config(small) == small
    large = smoke_config(TuneConfig(runs=500, verify=9))
    assert (large.runs, large.verify, large.initial) == (8, 1, None)
    tiny = proxy_recipe(recipe(corpus, train={"steps": 5}), smoke=True)
    assert (tiny.train.steps, tiny.eval.every) == (5, 1)


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ({"train.steps": "many"}, "tune.proxy: train.steps = 'many'"),
        ({"data": {"rows_per_step": 0}}, "tune.proxy: data.rows_per_step = 0"),
        ({"data.rowz_per_step": 1}, "unknown key"),
    ],
)
def test_small_runs_that_cannot_be_name_the_field(
    corpus: Corpus, proxy: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        proxy_recipe(recipe(corpus, {"proxy": proxy}))
    assert message in str(caught.value)


# The record on disk.


def opened(out: Path, one: Recipe, some: MixtureSpace, fingerprint: str = "f") -> list[Mixture]:
    return SearchLog.open(out, one, some, fingerprint).mixtures


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 99, "identity": {}, "mixtures": [{}]}',
        '{"format": 1, "identity": {}, "mixtures": []}',
        '{"format": 1, "identity": {}, "mixtures": [{"name": "mix-000"}]}',
        '{"format": 1, "mixtures": [{"name": "m", "origin": "", "shares": {}}]}',
    ],
)
def test_a_damaged_record_is_refused_and_left_as_it_is(
    corpus: Corpus, tmp_path: Path, text: str
) -> None:
    (tmp_path / "design.json").write_text(text)
    one = recipe(corpus)
    with pytest.raises(RecipeError, match=r"--out = .*design.json'.*Give another --out"):
        opened(tmp_path, one, space_of(one, corpus))
    assert (tmp_path / "design.json").read_text() == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"design": "space_filling"}, "tune.design: 'dirichlet' -> 'space_filling'"),
        ({"floor": 0.6}, "floors"),
        ({"caps": {"a": 0.4}}, "caps"),
        ({"prior": "uniform"}, "tune.prior: 'proportional' -> 'uniform'"),
    ],
)
def test_a_changed_design_is_told_field_by_field(
    corpus: Corpus, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    one, other = recipe(corpus, {"runs": 4}), recipe(corpus, {"runs": 4, **changes})
    opened(tmp_path, one, space_of(one, corpus))
    before = (tmp_path / "design.json").read_bytes()
    (tmp_path / "mix-000").mkdir()
    with pytest.raises(RecipeError) as caught:
        opened(tmp_path, other, space_of(other, corpus))
    assert message in str(caught.value)
    assert "Set that back, give another --out" in str(caught.value)
    assert (tmp_path / "design.json").read_bytes() == before


def test_how_a_search_is_judged_may_change(corpus: Corpus, tmp_path: Path) -> None:
    one = recipe(corpus, {"runs": 4})
    first = opened(tmp_path, one, space_of(one, corpus))
    (tmp_path / "mix-000").mkdir()
    judged = {"runs": 4, "law": "gp", "minimax": True, "kl": 0.1, "weights": {"a": 1}, "verify": 9}
    other = recipe(corpus, judged)
    assert opened(tmp_path, other, space_of(other, corpus)) == first


def test_another_corpus_is_another_search(corpus: Corpus, tmp_path: Path) -> None:
    one = recipe(corpus, {"runs": 4})
    some = space_of(one, corpus)
    opened(tmp_path, one, some, "old")
    # The same shares of another corpus: the runs themselves are refused where they do not fit.
    stored = json.loads((tmp_path / "design.json").read_text())
    opened(tmp_path, one, some, "new")
    again = json.loads((tmp_path / "design.json").read_text())
    assert stored["mixtures"] == again["mixtures"]
    assert (stored["identity"]["corpus"], again["identity"]["corpus"]) == ("old", "new")


def test_what_is_proposed_is_on_disk_at_once(corpus: Corpus, tmp_path: Path) -> None:
    one = recipe(corpus, {"mode": "sequential", "runs": 6, "initial": 2})
    some = space_of(one, corpus)
    record = SearchLog.open(tmp_path, one, some, "f")
    proposed = Mixture(name="mix-002", origin="a law", shares=some.shares(np.ones(3) / 3))
    record.add(proposed)
    assert opened(tmp_path, one, some)[2] == proposed
    # More runs in all are no other design where each follows from those before.
    more = recipe(corpus, {"mode": "sequential", "runs": 60, "initial": 2})
    assert len(opened(tmp_path, more, some)) == 3


def test_a_fresh_directory_is_the_first_that_is_free(tmp_path: Path) -> None:
    out = tmp_path / "s"
    assert free_directory(out, "new") == free_directory(out, "fail") == out
    assert not out.exists()
    for name in ("s", "s-2", "s-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "design.json").touch()
    assert free_directory(out, "new") == tmp_path / "s-4"
    assert free_directory(out, "resume") == out
    # A lock alone is no search.
    (tmp_path / "s-5").mkdir()
    (tmp_path / "s-5" / ".lock").touch()
    assert free_directory(tmp_path / "s-5", "fail") == tmp_path / "s-5"
