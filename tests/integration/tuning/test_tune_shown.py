"""What is learned from small runs, and how a search and a merge are shown."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from raymix.cli.tune import draw
from raymix.errors import RecipeError
from raymix.laws import Objective
from raymix.recipe import TuneConfig
from raymix.report.figures.merging import draw_merge
from raymix.report.formatting import fixed, prediction
from raymix.store import Corpus
from raymix.tuning.mixtures.candidates import (
    Mixture,
    MixtureSpace,
    design_mixtures,
    references,
    space_of,
)
from raymix.tuning.mixtures.learn import LearnedLaw, learn, mixture_table, predict_mixture, value_of
from raymix.tuning.mixtures.verify import observed_runs, roles_of, verify_mixtures
from raymix.tuning.runs.results import EvaluationPoint, RunResult
from tests.support.loops import train_corpus
from tests.support.searches import SEEDS, changed, search_document, table_of, unverified
from tests.unit.tuning.test_candidates import STEPS, recipe, results_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


@pytest.fixture(scope="module")
def space(corpus: Corpus) -> MixtureSpace:
    return space_of(recipe(corpus), corpus)


@pytest.fixture(scope="module")
def mixtures(space: MixtureSpace) -> list[Mixture]:
    return design_mixtures(TuneConfig(runs=6), space)


@pytest.fixture(scope="module")
def learned(corpus: Corpus, space: MixtureSpace, mixtures: list[Mixture]) -> LearnedLaw:
    return learn(table_of(mixtures, space), recipe(corpus), space)


@pytest.fixture(scope="module")
def searched(corpus: Corpus) -> dict[str, Any]:
    return search_document(corpus)


def printed(document: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    draw(document, Console(file=stream, highlight=False))
    return stream.getvalue()


def row_of(text: str, first: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(first))


# On the terminal.


def test_the_terminal_sets_predicted_beside_measured(searched: dict[str, Any]) -> None:
    shown = printed(searched)
    assert "Traceback" not in shown
    rows = searched["verified"]
    uniform = row_of(shown, "uniform")
    assert f"{rows['uniform']['predicted']['value']:.4f}" in uniform
    assert f"{rows['uniform']['measured']['mean']:.4f} \N{PLUS-MINUS SIGN}" in uniform
    best = row_of(shown, "best observed")
    assert f"({rows['best observed']['mixture']})" in best
    assert "(mean over a, b, c)" in shown
    assert f"measured over seeds {list(SEEDS)}" in shown
    assert shown.rstrip().endswith("files: tune.json")
    assert max(map(len, shown.splitlines())) <= 200
    assert row_of(shown, "BiMix as published").split()[-3:] == ["<", "0.2", "%"]
    for domain in "abc":
        assert row_of(shown, f"{domain} ").count("%") == len(rows)


def test_the_terminal_says_what_was_minimised(searched: dict[str, Any]) -> None:
    uneven = changed(searched, lambda d: d.update(weights={"a": 0.7, "b": 0.3}))
    assert "(weighted mean over a, b)" in printed(uneven)
    worst = changed(searched, lambda d: d.update(minimax=True))
    assert "(largest weighted over a, b, c)" in printed(worst)
    many = changed(searched, lambda d: d.update(weights={f"w{at}": 0.1 for at in range(10)}))
    assert "(mean over w0, w1, w2, w3 and 6 more)" in printed(many)


def test_the_terminal_tells_failures_and_warnings(searched: dict[str, Any]) -> None:
    def fail(document: dict[str, Any]) -> None:
        document["problems"] = {"mix-001": "the loss is [nan]"}
        document["optimum"]["warnings"] = ["far from every run"]

    shown = printed(changed(searched, fail))
    assert "mix-001: the loss is [nan]" in shown
    assert "optimum: far from every run" in shown


def test_nothing_verified_is_shown_as_nothing(searched: dict[str, Any]) -> None:
    shown = printed(changed(searched, unverified))
    assert "measured over seeds none" in shown
    assert row_of(shown, "optimum").count("\N{EN DASH}") >= 4


def test_of_many_domains_the_first_are_shown(searched: dict[str, Any]) -> None:
    names = [f"domain{at}" for at in range(45)]

    def grow(document: dict[str, Any]) -> None:
        document["domains"] = names
        for row in document["verified"].values():
            row["shares"] = dict.fromkeys(names, 1 / 45)

    shown = printed(changed(searched, grow))
    assert "domain39" in shown
    assert "domain40" not in shown
    assert "... 5 more in the files" in shown


def test_numbers_as_text() -> None:
    assert fixed(None, 3) == "\N{EN DASH}"
    assert fixed(0.12345, 3) == "0.123"
    assert prediction({"value": 1.5, "low": None, "high": None}) == "1.5000"
    assert prediction({"value": 1.5, "low": 1.25, "high": 1.75}) == "1.5000 [1.2500, 1.7500]"


# What is learned.


def test_the_value_is_the_sum_or_the_worst() -> None:
    losses = {"a": 2.0, "b": 4.0, "c": 100.0}
    weights = {"a": 0.5, "b": 0.5}
    assert value_of(Objective(weights=weights), losses) == 3
    assert value_of(Objective(weights=weights, minimax=True), losses) == 2


def test_the_interval_of_the_worst_is_its_own(learned: LearnedLaw) -> None:
    even = dict.fromkeys("abc", 1 / 3)
    mean = predict_mixture(learned, even, step=STEPS)
    worst = predict_mixture(
        replace(learned, objective=replace(learned.objective, minimax=True)), even, step=STEPS
    )
    assert worst["value"] == pytest.approx(max(worst["losses"].values()) / 3)
    # Three equal errors that go the same way: a third of the width of their sum.
    assert worst["high"] - worst["low"] == pytest.approx((mean["high"] - mean["low"]) / 3, rel=1e-6)


def test_a_loss_that_was_not_judged_has_no_interval(learned: LearnedLaw) -> None:
    some = {name: score for name, score in learned.report.targets.items() if name != "a"}
    prediction = predict_mixture(
        replace(learned, report=replace(learned.report, targets=some)),
        dict.fromkeys("abc", 1 / 3),
        step=STEPS,
    )
    assert (prediction["low"], prediction["high"]) == (None, None)
    assert prediction["value"] > 0


def test_the_law_stands_beside_bimix_and_those_that_know_less(searched: dict[str, Any]) -> None:
    judged = searched["judged"]
    assert list(judged["laws"]) == [searched["law"], "bimix"]
    assert judged["laws"]["bimix"]["unseen_last"]["mre"] >= 0
    assert set(judged["nulls"]) == set(judged["nulls_last"]) == {"mean"}


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_slice_moves_one_share_from_floor_to_cap(
    searched: dict[str, Any], space: MixtureSpace, name: str
) -> None:
    share = searched["slices"][name]["share"]
    at = space.domains.index(name)
    assert share == sorted(share)
    assert share[0] == pytest.approx(space.floor_D[at], rel=1e-6)
    assert share[-1] == pytest.approx(1 - space.floor_D.sum() + space.floor_D[at], rel=1e-6)


def test_evaluations_that_are_no_numbers_teach_nothing(
    mixtures: list[Mixture], space: MixtureSpace
) -> None:
    runs = results_of(mixtures)
    last = runs[0].points[-1]
    torn = replace(last, losses={**last.losses, "a": float("nan")})
    start = replace(last, step=0)
    runs[0] = replace(runs[0], points=[start, *runs[0].points[:-1], torn])
    table = mixture_table(runs, {m.name: m.shares for m in mixtures}, space)
    assert [float(s) for s, n in zip(table.step_R, table.runs, strict=True) if n == "mix-000"] == [
        10, 20,
    ]  # fmt: skip
    assert len(table) == 3 * len(mixtures) - 1


def test_losses_that_some_run_lacks_are_left_out(
    mixtures: list[Mixture], space: MixtureSpace
) -> None:
    runs = results_of(mixtures)
    without = [replace(p, losses={"a": p.losses["a"], "c": p.losses["c"]}) for p in runs[2].points]
    runs[2] = replace(runs[2], points=without)
    table = mixture_table(runs, {m.name: m.shares for m in mixtures}, space)
    assert table.targets == ("a", "c")


def test_runs_are_told_as_far_as_they_came(mixtures: list[Mixture]) -> None:
    objective = Objective(weights={"a": 1.0})
    stopped, failed, *_ = results_of(mixtures)
    stopped = replace(stopped, state="stopped", points=stopped.points[:2])
    start = EvaluationPoint(step=0, tokens=0, flops=0.0, extra_flops=0.0, losses={"a": 4.1})
    failed = replace(failed, state="failed", problem="the loss is nan", points=[start])
    rows = observed_runs([stopped, failed], mixtures, objective)
    assert [row["state"] for row in rows] == ["stopped", "failed"] + ["waiting"] * 4
    assert [(row["step"], row["value"]) for row in rows[1:3]] == [(0, None), (0, None)]
    assert (rows[0]["step"], rows[0]["value"]) == (20, stopped.points[1].losses["a"])
    assert rows[1]["problem"] == "the loss is nan"


def test_only_finished_runs_are_best(mixtures: list[Mixture], space: MixtureSpace) -> None:
    optimum, others = Mixture(name="optimum-1", origin="", shares={}), references(space)

    def run(name: str, state: str, value: float | None) -> dict[str, Any]:
        return {"name": name, "origin": "o", "shares": {}, "state": state, "value": value}

    runs = [run("x", "stopped", 0.1), run("y", "done", None), run("z", "done", 3.0)]
    roles = roles_of(runs, optimum, others)
    assert {role: m.name for role, m in roles.items()} == {
        "optimum": "optimum-1",
        "best observed": "z",
        "uniform": "uniform",
        "proportional": "proportional",
    }
    assert "runner-up" in roles_of([*runs, run("w", "done", 2.0)], optimum, others)


def test_a_verifying_run_that_failed_is_left_out(learned: LearnedLaw, space: MixtureSpace) -> None:
    roles = {mixture.name: mixture for mixture in references(space)}
    runs: list[RunResult] = results_of(list(roles.values()), seeds=(1, 2, 3))
    lost = [
        replace(run, state="failed") if (run.mixer, run.seed) == ("uniform", 2) else run
        for run in runs
    ]
    rows = verify_mixtures(roles, lost, learned, space=space, step=STEPS)
    assert list(rows["uniform"]["measured"]["by_seed"]) == ["1", "3"]
    assert rows["uniform"]["against"]["proportional"]["seeds"] == 2
    assert rows["uniform"]["losses"]["a"]["mean"] == pytest.approx(
        np.mean([run.losses["a"] for run in lost if run.mixer == "uniform" and run.losses])
    )
    none = verify_mixtures(roles, [], learned, space=space, step=STEPS)["uniform"]
    assert (none["measured"]["mean"], none["error"], none["inside"]) == (None, None, None)
    assert none["against"] == {"proportional": None}


# The picture of a merge.


def report(out: Path, tensors: Any) -> Path:
    out.mkdir()
    (out / "merge_report.json").write_text(json.dumps({"tensors": tensors}))
    return out


def test_panels_are_of_what_the_method_has(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": {
            "delta_norm": 1.0,
            "task_norms": [2.0, None, 4.0],
            "alignment": 0.5,
        },
        "model.layers.0.mlp.down_proj.weight": {"delta_norm": None, "task_norms": []},
        "model.norm.weight": {"delta_norm": 1.0, "task_norms": [0.0, 0.0], "alignment": None},
    }
    text = draw_merge(report(tmp_path / "out", tensors)).read_text()
    assert text.startswith('<?xml version="1.0" encoding="utf-8"?>\n<svg')
    for words in ("delta norm", "alignment of tasks", "attention", "mlp", "other"):
        assert words in text
    for words in ("sign agreement", "kept", "embeddings"):
        assert words not in text
    assert not list(tmp_path.glob("**/.*"))


def test_a_merge_without_deltas_is_drawn(tmp_path: Path) -> None:
    path = draw_merge(report(tmp_path / "out", {"lm_head.weight": {}}))
    assert "embeddings" in path.read_text()


@pytest.mark.parametrize("text", [None, "", "[1]", "{}", '{"tensors": 3}', '{"tensors": {"a": 1}}'])
def test_what_is_no_report_of_a_merge_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "merge_report.json").write_text(text)
    with pytest.raises(RecipeError, match=r"out = .*merge_report.json': not a merge report"):
        draw_merge(tmp_path)
    assert not (tmp_path / "merge_report.svg").exists()
