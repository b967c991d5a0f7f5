"""The statistics of a comparison against closed forms and scipy, from runs' own files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from raymix.cli.compare import draw
from raymix.recipe import Recipe
from raymix.report.pages.comparison import comparison_page
from raymix.tuning.compare.statistics import compare_runs, paired, spread, to_csv
from raymix.tuning.runs.results import EvaluationPoint, RunResult, State, read_result
from raymix.tuning.runs.variants import Variant

LOSSES = st.floats(0.1, 10)


def result(
    mixer: str, seed: int, losses: Sequence[float], *, extra: float = 0.0, state: State = "done"
) -> RunResult:
    """Return a run over domains a, b, c whose losses fell in two steps to `losses`."""
    points = [
        EvaluationPoint(
            step=step,
            tokens=1000 * step,
            flops=1e9 * step,
            extra_flops=extra * 1e9 * step,
            losses={name: loss + 2 - step for name, loss in zip("abc", losses, strict=True)},
        )
        for step in range(3)
    ]
    return RunResult(
        mixer=mixer,
        seed=seed,
        path=f"/out/{mixer}-seed{seed}",
        state=state,
        problem=None if state == "done" else "the loss is nan",
        seconds=10.0,
        extra_seconds=10.0 * extra,
        shares={"a": 0.5, "b": 0.5},
        points=points,
    )


def test_mean_and_spread_over_seeds() -> None:
    runs = [result("uniform", 0, [1, 3, 9]), result("uniform", 1, [2, 6, 5])]
    row = compare_runs(runs, domains="abc", targets="c")["mixers"]["uniform"]
    # Means over a and b: 2 and 4; the worst: 3 and 6; the target c is in neither.
    assert row["mean"]["by_seed"] == {"0": 2, "1": 4}
    assert (row["mean"]["mean"], row["mean"]["sd"]) == (3, pytest.approx(np.sqrt(2)))
    assert (row["worst"]["mean"], row["worst"]["sd"]) == (4.5, pytest.approx(3 / np.sqrt(2)))
    assert (row["target"]["mean"], row["worst_domain"]) == (7, "b")
    assert row["domains"]["a"]["mean"] == 1.5
    assert row["domains"]["c"]["mean"] == 7


@settings(max_examples=30)
@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=3, max_size=8))
def test_paired_intervals_are_scipys(pairs: list[tuple[float, float]]) -> None:
    from scipy.stats import ttest_rel  # takes seconds

    own, base = (dict(enumerate(values)) for values in zip(*pairs, strict=True))
    if np.ptp([a - b for a, b in pairs]) < 1e-9:
        return
    interval = paired(own, base)
    assert interval is not None
    expected = ttest_rel(list(own.values()), list(base.values())).confidence_interval(0.95)
    assert interval["low"] == pytest.approx(expected.low, rel=1e-9, abs=1e-9)
    assert interval["high"] == pytest.approx(expected.high, rel=1e-9, abs=1e-9)
    assert interval["seeds"] == len(pairs)


def test_a_known_interval() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653.
    interval = paired({0: 2, 1: 4, 2: 6}, {0: 1, 1: 2, 2: 3})
    assert interval is not None
    assert interval["mean"] == 2
    assert interval["high"] - 2 == pytest.approx(4.3026527 / np.sqrt(3), rel=1e-7)


def test_pairing_cancels_what_seeds_have_in_common() -> None:
    common = {seed: float(value) for seed, value in enumerate([1, 5, 9])}
    shifted = {seed: value - 0.1 for seed, value in common.items()}
    interval = paired(shifted, common)
    assert interval is not None
    assert interval["high"] < 0
    assert (spread(shifted)["sd"] or 0) > 3


def test_only_common_seeds_are_paired() -> None:
    one = paired({0: 1.0, 1: 9.0}, {0: 3.0, 2: 0.0})
    assert one == {"mean": -2.0, "low": None, "high": None, "seeds": 1}
    assert paired({1: 1.0}, {2: 1.0}) is None
    assert spread({}) == {"mean": None, "sd": None, "by_seed": {}}
    assert spread({4: 2.0}) == {"mean": 2.0, "sd": None, "by_seed": {"4": 2.0}}


def test_extra_compute_is_a_part_of_training() -> None:
    runs = [result("uniform", 0, [1, 1, 1]), result("pike", 0, [1, 1, 1], extra=0.25)]
    mixers = compare_runs(runs, domains="abc")["mixers"]
    assert mixers["uniform"]["extra"]["flops_share"]["mean"] == 0
    assert mixers["pike"]["extra"]["flops_share"]["mean"] == 0.25
    assert mixers["pike"]["extra"]["seconds_share"]["mean"] == 0.25
    assert mixers["pike"]["curve"]["flops"] == [0, 1.25e9, 2.5e9]
    assert mixers["pike"]["curve"]["tokens"] == mixers["uniform"]["curve"]["tokens"]


def test_curves_are_bands_over_seeds() -> None:
    runs = [result("uniform", seed, [1 + seed, 1, 1]) for seed in range(3)]
    curve = compare_runs(runs, domains="abc")["mixers"]["uniform"]["curve"]
    assert curve["step"] == [0, 1, 2]
    band = curve["domains"]["a"]
    assert (band["mean"], band["low"], band["high"]) == ([4, 3, 2], [3, 2, 1], [5, 4, 3])


def failing() -> list[RunResult]:
    return [
        result("uniform", 0, [1, 2, 3]),
        result("pike", 0, [1, 1, 1], state="failed"),
        result("uniform", 1, [1, 2, 4]),
        result("pike", 1, [1, 2, 2]),
        result("odd<mixer>", 0, [1, 1, 1], state="failed"),
    ]


def test_failed_runs_are_listed_and_not_counted() -> None:
    document = compare_runs(failing(), domains="abc", targets="c")
    pike = document["mixers"]["pike"]
    assert (pike["runs"], pike["planned"]) == (1, 2)
    assert pike["mean"]["by_seed"] == {"1": 1.5}
    assert pike["mean"]["difference"]["seeds"] == 1
    odd = document["mixers"]["odd<mixer>"]
    assert odd["mean"]["mean"] is None
    assert odd["mean"]["difference"] is None
    assert [run["problem"] for run in document["runs"] if run["state"] == "failed"] == [
        "the loss is nan"
    ] * 2
    json.dumps(document, allow_nan=False)


def whole(runs: Sequence[RunResult], *, targets: str = "") -> dict[str, object]:
    facts = {
        "name": "demo",
        "steps": 2,
        "tokens": 2000,
        "parameters": 10,
        "corpus_fingerprint": "f" * 32,
    }
    return facts | compare_runs(runs, domains="abc", targets=targets)


def test_the_page_shows_failures_and_needs_no_network() -> None:
    html = comparison_page(whole(failing()))
    assert "odd&lt;mixer&gt;, seed 0: the loss is nan" in html
    assert "odd<mixer>" not in html
    assert "://" not in html.replace("http://www.w3.org/", "")
    assert "Against uniform" in html


def test_nothing_finished_is_a_page_too() -> None:
    runs = [result("uniform", 0, [1, 1, 1], state="failed")]
    assert "the loss is nan" in comparison_page(whole(runs))
    assert to_csv(whole(runs)).count("\n") == 1


@pytest.mark.parametrize("width", [110, 200])
def test_the_tables_on_a_terminal_are_not_cut(width: int) -> None:
    names = ["uniform", "pike", "pike-balanced", "dga", "doge", "odm", "ado"]
    runs = [result(name, seed, [1 + seed, 2, 3]) for name in names for seed in range(3)]
    console = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False)
    with console.capture() as shown:
        draw({**whole([*runs, *failing()[-1:]], targets="c"), "files": ["x"]}, console)
    said = shown.get()
    assert "\N{HORIZONTAL ELLIPSIS}" not in said
    assert "c (target)" in said
    by_domain = said[said.index("domain") :]
    assert ("\N{PLUS-MINUS SIGN}" in by_domain) == (width == 200)
    assert "odd<mixer>, seed 0: the loss is nan" in said


def test_the_csv_is_a_mixture_table() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(whole(failing(), targets="c")))))
    assert [row["run"] for row in rows] == ["uniform-seed0", "uniform-seed1", "pike-seed1"]
    assert float(rows[1]["loss.c"]) == 4
    assert float(rows[0]["share.a"]) + float(rows[0]["share.b"]) == 1
    assert rows[2]["step"] == "2"


def test_a_run_is_read_from_its_directory(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"step": 0, "eval": {"a": {"loss": 5.0}}}]
    for step in range(1, 5):
        lines.append({"step": step, "loss": 4.0, "tokens": 100 * step, "seconds": 2.0})
        if step % 2 == 0:
            lines.append({"step": step, "probe": {"seconds": 0.5}})
            lines.append({"step": step, "eval": {"a": {"loss": 5.0 - step}}})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "lo')
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "corpus": {"path": "/c"},
            "train": {"steps": 4},
            "run": {"dir": str(tmp_path)},
        }
    )
    result = read_result(Variant("uniform", 0, recipe), "done", flops_per_token=10.0)
    assert (result.seconds, result.extra_seconds) == (8.0, 1.0)
    assert [p.tokens for p in result.points] == [0, 200, 400]
    assert [p.flops for p in result.points] == [0, 2000, 4000]
    # Half a second of probing to four seconds of training.
    assert [p.extra_flops for p in result.points] == [0, 250, 500]
    assert result.losses == {"a": 1.0}

    counted = text.replace('{"seconds": 0.5}', '{"seconds": 0.5, "flops": 7}')
    (tmp_path / "metrics.jsonl").write_text(counted)
    result = read_result(Variant("uniform", 0, recipe), "failed", flops_per_token=10.0)
    assert [p.extra_flops for p in result.points] == [0, 7, 14]
    assert result.losses == {}
