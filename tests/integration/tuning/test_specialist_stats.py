"""The statistics of merged specialists, on losses whose answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from raymix.report.pages.specialists import specialists_page
from raymix.tuning.merges.specialist_stats import SpecialistLosses, specialist_stats
from raymix.tuning.runs.results import EvaluationPoint, RunResult

BASE = {"a": 4.0, "b": 6.0}
DOMAINS, SEEDS = ("a", "b"), (1, 2)


def run(label: str, seed: int, first: Mapping[str, float], last: Mapping[str, float]) -> RunResult:
    points = [
        EvaluationPoint(step=step, tokens=step * 10, flops=0.0, extra_flops=0.0, losses=losses)
        for step, losses in ((0, first), (3, last))
    ]
    return RunResult(
        mixer=label, seed=seed, path=f"{label}-seed{seed}", state="done", shares={}, points=points
    )


def runs() -> list[RunResult]:
    results: list[RunResult] = []
    for seed in SEEDS:
        shift = 0.5 * (seed - 1)
        base = {name: loss + shift for name, loss in BASE.items()}
        results += [
            run("specialist-a", seed, base, {"a": 3.0 + shift, "b": 7.0}),
            run("specialist-b", seed, base, {"a": 5.0, "b": 4.0 + shift}),
            run("joint", seed, base, {"a": 3.5 + shift, "b": 4.5 + shift}),
        ]
    return results


def merged(given: float, best: float, scale: float | None) -> dict[str, Any]:
    options = {} if scale is None else {"scale": scale}
    test = {"given": {"a": given, "b": given}, "best": {"a": best, "b": best}}
    point = {"number": 0, "options": {"scale": 1.0} if scale else {}, "loss": given}
    other = {"number": 1, "options": options, "loss": best}
    points = [point] if scale is None else [point, other]
    return {"points": points, "best": options, "test": test}


def document(**changes: Any) -> dict[str, Any]:
    merges = {
        ("drm", 1): merged(5.0, 4.25, 0.5),
        ("drm", 2): merged(5.5, 4.75, 0.7),
        ("linear", 1): merged(4.5, 4.5, None),
        ("linear", 2): merged(5.0, 5.0, None),
        ("broken", 1): None,
        ("broken", 2): None,
    }
    measured = SpecialistLosses(DOMAINS, SEEDS, ("drm", "linear", "broken"), runs(), merges)
    return specialist_stats(measured, {"broken-seed1": "no <luck>"}) | changes


def test_references_are_of_the_runs() -> None:
    rows = document()["rows"]
    assert rows["base"]["mean"]["by_seed"] == {"1": 5.0, "2": 5.5}
    assert rows["specialists"]["mean"]["by_seed"] == {"1": 3.5, "2": 4.0}
    assert rows["specialists"]["domains"]["b"]["by_seed"] == {"1": 4.0, "2": 4.5}
    assert rows["joint"]["mean"]["mean"] == 4.25
    recovered = {name: row["recovered"]["mean"] for name, row in rows.items()}
    assert recovered == {"base": 0.0, "specialists": 1.0, "joint": pytest.approx(2 / 3)}


def test_merges_stand_beside_them() -> None:
    merges = document()["merges"]
    assert list(merges) == ["drm", "linear"]
    drm = merges["drm"]
    assert drm["scale"]["mean"] == pytest.approx(0.6)
    assert drm["given"]["recovered"]["mean"] == 0
    assert drm["best"]["recovered"]["mean"] == pytest.approx(0.5)
    # Seeds differ by as much in both: the paired difference knows no spread.
    assert drm["best"]["to_joint"] == {"mean": 0.25, "low": 0.25, "high": 0.25, "seeds": 2}
    assert [point["scale"] for point in drm["curves"]["1"]] == [0.5, 1.0]
    assert merges["linear"]["scale"] is None


def test_methods_are_compared_seed_by_seed() -> None:
    differences = document()["differences"]
    assert differences["best"]["drm"]["linear"]["mean"] == -0.25
    assert differences["best"]["linear"]["drm"]["mean"] == 0.25
    assert differences["given"]["drm"]["linear"]["mean"] == 0.5


def test_what_failed_is_counted_and_told() -> None:
    stats = document()
    assert stats["failed"] == 2
    assert stats["problems"] == {"broken-seed1": "no <luck>"}


def test_what_a_specialist_unlearns() -> None:
    assert document()["matrix"] == {"a": {"a": 3.25, "b": 7.0}, "b": {"a": 5.0, "b": 4.25}}


FACTS = {
    "name": "A <run>",
    "seeds": list(SEEDS),
    "domains": list(DOMAINS),
    "base": None,
    "base_tokens": 1000,
    "tokens": 200,
    "joint_tokens": 400,
    "parameters": 1234,
    "held_out": {"test_rows": 4, "search_rows": 3, "shared": ["a"]},
    "corpus_fingerprint": "0123456789abcdef",
}


def test_the_page_says_all_of_it() -> None:
    page = specialists_page(document(**FACTS))
    assert "A &lt;run&gt;" in page
    assert page.count("<svg") == 2
    assert "://" not in page.replace("http://www.w3.org/", "")
    for words in (
        "no &lt;luck&gt;",
        "66.7",
        "+0.2500 [+0.2500, +0.2500]",
        "which test and search rows share",
    ):
        assert words in page


def test_the_page_of_one_seed_and_one_method_without_a_scale() -> None:
    measured = SpecialistLosses(
        DOMAINS, (1,), ("linear",), runs()[:3], {("linear", 1): merged(4.5, 4.5, None)}
    )
    page = specialists_page(
        specialist_stats(measured, {}) | FACTS | {"seeds": [1], "base": "some/base"}
    )
    assert page.count("<svg") == 1
    assert "some/base" in page
