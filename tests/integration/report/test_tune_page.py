"""The pages of a search and of a comparison of planners: what they say, whole and sound."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from raymix.report.figures.tuning import main_charts, slice_panels
from raymix.report.pages.schedule import schedule_page
from raymix.report.pages.tuning import MAX_PANELS, tuning_page
from raymix.schedule import Layout, compare_planners
from tests.support.loops import train_corpus
from tests.support.scheduling import PLAIN
from tests.support.searches import Change, changed, search_document, unverified


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sizes = {"a": 9000, "b": 6000, "c": 3000}
    return search_document(train_corpus(tmp_path_factory.mktemp("corpus"), sizes))


# The page of a search.


def test_the_page_of_a_search_stands_alone(searched: dict[str, Any]) -> None:
    page = tuning_page(searched)
    assert page.count("<svg") == 3 + 3 + 3
    assert "://" not in page.replace("http://www.w3.org/", "")
    visible = re.sub(r"<(style|script)>.*?</\1>|<meta[^>]*>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bnan\b|None", visible)
    assert "A &lt;search&gt;: shares found by 6 small runs" in page
    assert "<search>" not in page
    for words in ("Predicted and measured", "What the law is worth", "The small runs"):
        assert words in page
    assert "Runs that failed" not in page
    assert "outside the limits" not in page
    lowest = min(row["measured"]["mean"] for row in searched["verified"].values())
    assert set(re.findall(r'<td class="best">([\d.]+)', page)) == {f"{lowest:.4f}"}


def test_differences_are_colored_only_where_they_leave_out_zero(searched: dict[str, Any]) -> None:
    def differ(role: str, low: float, high: float) -> Change:
        difference = {"mean": (low + high) / 2, "low": low, "high": high, "seeds": 2}
        return lambda d: d["verified"][role].update(against={"uniform": difference})

    document = changed(
        searched,
        differ("optimum", -0.3, -0.1),
        differ("best observed", 0.1, 0.3),
        differ("runner-up", -0.1, 0.3),
        lambda d: d["verified"]["uniform"].update(allowed=False),
    )
    page = tuning_page(document)
    assert '<td class="good">-0.2000 [-0.3000, -0.1000]</td>' in page
    assert '<td class="warn">+0.2000 [+0.1000, +0.3000]</td>' in page
    assert "<td>+0.1000 [-0.1000, +0.3000]</td>" in page
    # A reference need not be a mixture that is allowed.
    assert "uniform (outside the limits)" in page
    assert page.count("outside the limits") == 1


def test_a_search_without_verification_is_drawn(searched: dict[str, Any]) -> None:
    page = tuning_page(changed(searched, unverified, lambda d: d.update(slices={})))
    assert "not verified" in page
    assert page.count("<svg") == 3 + 3


def test_one_horizon_has_no_path(searched: dict[str, Any]) -> None:
    short = changed(searched, lambda d: d.update(path=d["path"][:1]))
    assert [chart.title for chart in main_charts(short)] == [
        "Predicted against measured",
        "Shares",
    ]


def test_runs_without_an_end_are_listed_last(searched: dict[str, Any]) -> None:
    def stop(document: dict[str, Any]) -> None:
        document["runs"][0] |= {"state": "stopped", "step": 20}
        document["runs"][1] |= {"state": "failed", "step": 0, "value": None}
        document["problems"] = {"mix-001": "the loss is <nan>"}

    page = tuning_page(changed(searched, stop))
    table = page[page.index("The small runs") :]
    named = re.findall(r">(mix-\d+)</span></th>", table)
    assert sorted(named) == [f"mix-{at:03d}" for at in range(6)]
    assert named[-1] == "mix-001"
    assert "<td>20 (stopped)</td>" in table
    assert "<td>0 (failed)</td>" in table
    assert "mix-001: the loss is &lt;nan&gt;" in table


def test_of_many_domains_some_panels_are_drawn(searched: dict[str, Any]) -> None:
    names = [f"domain{at}" for at in range(MAX_PANELS + 6)]

    def grow(document: dict[str, Any]) -> None:
        share = dict.fromkeys(names, 1 / len(names))
        document["domains"] = names
        document["optimum"]["shares"] = share
        document["slices"] = dict.fromkeys(names, document["slices"]["a"])
        document["path"] = [{**spot, "shares": share} for spot in document["path"]]
        for row in document["verified"].values():
            row["shares"] = share

    many = changed(searched, grow)
    assert len(slice_panels(many)) == len(names)
    page = tuning_page(many)
    assert page.count("<svg") == 3 + MAX_PANELS + 3
    assert re.search(r"\d+ others", page)


# The page of a comparison of planners.


@pytest.fixture(scope="module")
def planned() -> tuple[dict[str, Any], dict[str, Any]]:
    lengths = np.array([90, 40, 30, 20, 150, 10, 60, 5])
    comparison = compare_planners(
        lengths, Layout(2, 2), PLAIN, batch=8, steps=1, seed=0,
        planners=("packed", "hdp", "sorted", "skrull"),
    )  # fmt: skip
    totals = comparison.totals.items()
    schedules = {name: total.last_schedule for name, total in totals if total.last_schedule}
    return {"source": "a <name>", **comparison.document()}, schedules


def test_the_page_of_planners_has_a_row_for_each(planned: tuple[Any, Any]) -> None:
    document, schedules = planned
    page = schedule_page(document, schedules, twin="twin.json")
    assert page.count("<svg") == 4 + 2
    assert f"Planning a &lt;name&gt;: {len(document['planners'])} planners compared" in page
    for name, row in document["planners"].items():
        first = f"<td>{row['speedup_over_default']:.2f}x</td>"
        assert f'<tr><th scope="row"><span class="name">{name}</span></th>{first}' in page
    assert "twin.json, beside this page" in page
    assert "2 groups of 2 ranks, barrier: group" in page
    assert "times by the cost model of unnamed hardware" in page
    # The second time with one left out.
    shortened = {**document, "left_out": {"exact": "over <12> sequences"}}
    again = schedule_page(shortened, schedules, twin="twin.json")
    assert (
        again.replace('<p class="quiet">exact is left out: over &lt;12&gt; sequences</p>\n', "")
        == page
    )
