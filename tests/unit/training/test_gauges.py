"""Gauges of a run: what is set, how often, and that the dashboard draws all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from raymix.training.run import gauges
from raymix.training.run.gauges import METRICS, Gauges, Metric, cluster_gauges
from tests.support.paths import ROOT

DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text())

Values = dict[tuple[str, str | None], float]


class RecordedGauge:
    """A gauge that keeps its values."""

    def __init__(self, name: str, values: Values) -> None:
        self.name, self.values = name, values

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags["run"] == "r"
        self.values[self.name, tags.get("domain")] = value


@pytest.fixture
def values() -> Values:
    return {}


def made(values: Values, domains: int = 2, **read: int) -> Gauges:
    domain_tokens = {chr(97 + at) if at < 26 else f"d{at}": 100 * (at + 1) for at in range(domains)}
    return Gauges(
        "r", domain_tokens, read=read, make=lambda metric: RecordedGauge(metric.name, values)
    )


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 3.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 50 * step,
        "tokens_per_s": 1000.0,
        "data_wait": 0.01,
        "mixture_version": 2,
        "shares": {"a": 0.75, "b": 0.25},
        "counts": {"a": 40, "b": 10},
        "domain_loss": {"a": 3.0, "b": None},
        **more,
    }


def test_a_step_sets_all_that_it_knows(values: Values) -> None:
    run_gauges = made(values, a=60)
    run_gauges.step(line(1))
    run_gauges.evaluation({"a": {"loss": 2.5, "tokens": 9}, "b": {"loss": None}})
    assert {name for name, _ in values} == {metric.name for metric in METRICS}
    assert values["raymix_step", None] == 1
    assert values["raymix_share", "b"] == 0.25
    assert values["raymix_domain_tokens", "a"] == 100
    assert values["raymix_domain_epochs", "a"] == 1.0
    assert values["raymix_domain_epochs", "b"] == 0.05
    assert values["raymix_heldout_loss", "a"] == 2.5
    assert ("raymix_domain_loss", "b") not in values


def test_steps_in_quick_succession_are_counted_not_told(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(gauges.time, "monotonic", lambda: now)
    run_gauges = made(values)
    for step in range(1, 11):
        run_gauges.step(line(step))
    assert values["raymix_step", None] == 1
    now = 102.0
    run_gauges.step(line(11))
    assert values["raymix_step", None] == 11
    assert values["raymix_domain_tokens", "a"] == 11 * 40


def test_more_domains_than_labels_can_take_are_left_out(values: Values) -> None:
    made(values, domains=101).step(line(1))
    assert {name for name, _ in values} == {m.name for m in METRICS if not m.by_domain}


def test_without_a_cluster_there_are_none() -> None:
    assert cluster_gauges("r", {"a": 1}, read={}) is None


# The dashboard.


def expressions(node: Any) -> Iterator[str]:
    """Yield what a dashboard asks Prometheus."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in {"expr", "query", "definition"} and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def test_the_dashboard_draws_every_gauge_and_no_other() -> None:
    named = set(re.findall(r"\bray_(\w+)", " ".join(expressions(DASHBOARD["panels"]))))
    assert named == {metric.name for metric in METRICS}
    templated = set(re.findall(r"\bray_(\w+)", " ".join(expressions(DASHBOARD["templating"]))))
    assert templated <= named


def by_name(name: str) -> Metric:
    return next(metric for metric in METRICS if metric.name == name)


def test_the_dashboard_is_bound_to_no_data_source_and_picks_runs() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert set(variables) == {"datasource", "run", "domain"}
    uids = re.findall(r'"uid": "([^"]+)"', json.dumps(DASHBOARD))
    assert set(uids) == {"${datasource}", DASHBOARD["uid"]}
    assert "id" not in DASHBOARD, "a number that another dashboard may have"
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        for query in expressions(panel["targets"]):
            metric = by_name(re.findall(r"ray_(\w+)", query)[0])
            assert 'run=~"$run"' in query
            assert ('domain=~"$domain"' in query) == metric.by_domain
            assert ("by (run, domain)" in query) == metric.by_domain


def test_panels_lie_side_by_side() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"])
               for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & own, panel["title"]
        cells |= own
