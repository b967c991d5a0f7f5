"""Reports: the JSON twin says what the files say, the page stands alone, damage is survived."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.errors import RecipeError
from raymix.report import write_report
from raymix.report.data.losses import RECENT_STEPS
from raymix.report.data.read import read_run
from raymix.report.data.summary import summarize
from raymix.report.data.training_curves import training_curves
from raymix.report.figures.progress import progress_axis
from tests.support.runs import ENTROPY, LENGTH, ROWS, write_run


class References(HTMLParser):
    """Collects resources that a browser would fetch, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"link", "img", "iframe", "object"}:
            self.references.append(tag)
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""
        self.references += [
            f"{name}={value}"
            for name, value in attrs
            if name in {"src", "href", "xlink:href"} and not (value or "").startswith("#")
        ]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def data_of(page: Path) -> list[dict[str, Any]]:
    return json.loads(page.with_suffix(".json").read_text())["runs"]


def undrawn(run: Path) -> dict[str, Any]:
    """Return the twin's data of one run without drawing it."""
    return json.loads(json.dumps(summarize(read_run(run)), allow_nan=False))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pieces = [(0, [0.7, 0.2, 0.1]), (30, [0.1, 0.3, 0.6])]
    return write_run(tmp_path_factory.mktemp("runs") / "curriculum", pieces=pieces)


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_report([run])


def test_the_twin_says_what_the_metrics_say(run: Path, page: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval" in line]
    (data,) = data_of(page)
    assert page == run / "report.html"
    assert data["state"] == "finished: 60 steps"
    assert data["training"]["loss"] == pytest.approx([line["loss"] for line in steps])
    assert data["heldout"]["step"] == [0, 20, 40, 60]
    assert data["heldout"]["tokens"] == [step * ROWS * LENGTH for step in (0, 20, 40, 60)]
    total = steps[-1]["tokens"]
    for name, row in data["domains"].items():
        tokens = sum(line["counts"].get(name, 0) for line in steps)
        mean_share = sum(line["shares"][name] for line in steps) / len(steps)
        assert row["tokens"] == tokens
        assert row["share_realised"] == pytest.approx(tokens / total)
        assert row["share_asked"] == pytest.approx(mean_share)
        assert row["loss_first"] == pytest.approx(evaluations[0]["eval"][name]["loss"])
        assert row["loss_last"] == pytest.approx(evaluations[-1]["eval"][name]["loss"])
        assert row["unigram_entropy"] == ENTROPY
    assert data["domains"]["code"]["epochs"] == pytest.approx(
        data["domains"]["code"]["tokens"] / (40_000 // LENGTH * LENGTH)
    )
    assert data["weights"]["step"] == [0, 30]
    assert data["weights"]["shares"]["maths"] == [0.1, 0.6]
    assert data["header"]["parameters"] == 1_050_000
    assert data["notes"] == []


def test_the_page_stands_alone(page: Path) -> None:
    html = page.read_text()
    parser = References()
    parser.feed(html)
    assert parser.references == []
    assert parser.open == []
    assert "://" not in html.replace("http://www.w3.org/", "")
    assert not re.search(r"url\((?!#)|@import", html)
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html


def test_the_page_runs_its_own_script_and_no_other(page: Path) -> None:
    parser = References()
    parser.feed(page.read_text())
    (script,) = parser.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in parser.policy
    assert "default-src 'none'" in parser.policy
    assert not re.search(r" on[a-z]+=|javascript:", page.read_text())


def test_names_of_others_are_text_in_the_page(tmp_path: Path) -> None:
    names = ('<img src=x onerror="alert(1)">', "'\"><script>alert(2)</script>", "a|b & c")
    run = write_run(tmp_path / "r<b>un", domains=names, steps=6)
    html = write_report(run, tmp_path / "page.html").read_text()
    parser = References()
    parser.feed(html)
    assert parser.references == []
    assert len(parser.scripts) == 1
    assert parser.open == []
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(svg)


def test_legends_name_the_series_of_their_charts(page: Path) -> None:
    html = page.read_text()
    figures = {
        title: figure
        for figure in re.findall(r"<figure.*?</figure>", html, re.DOTALL)
        for title in re.findall(r"<h3>([^<]*)", figure)
    }
    for title in ("Training loss per domain", "Mixture over time"):
        toggles = re.findall(r'data-toggle="([\w-]+)"', figures[title])
        series = re.findall(r'data-series="([\w-]+)"><title>(\w+)', figures[title])
        assert sorted(toggles) == ["domain-0", "domain-1", "domain-2"]
        assert set(series) == {("domain-0", "books"), ("domain-1", "code"), ("domain-2", "maths")}
    # One run needs no legend.
    assert "data-toggle" not in figures["Training loss and learning rate"]


def test_every_picture_is_sound_and_takes_its_colors_from_the_theme(page: Path) -> None:
    html = page.read_text()
    svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(svgs) == 7 + 3
    names = [name for svg in svgs for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(names) == len(set(names))
    for svg in svgs:
        ET.fromstring(svg)
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", svg)) <= set()
    for title in (
        "Mixture over time",
        "Training loss",
        "Throughput",
        "Read against asked",
        "Gradient norm",
        "Training loss per domain",
    ):
        assert title in html
    for unit in ("nats per token", "share of tokens asked, %", "read minus asked, rows"):
        assert unit in html


def test_writing_again_gives_the_same_bytes(page: Path, run: Path) -> None:
    before = page.read_bytes(), page.with_suffix(".json").read_bytes()
    write_report(run)
    assert before == (page.read_bytes(), page.with_suffix(".json").read_bytes())


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", steps=20)
    text = (whole / "metrics.jsonl").read_text()
    (torn := tmp_path / "torn").mkdir()
    for name in ("resolved.yaml", "environment.json", "mixture_log.jsonl"):
        (torn / name).write_text((whole / name).read_text())
    (torn / "metrics.jsonl").write_text(text + '{"step": 21, "loss": 4.')
    (data,) = data_of(write_report([torn]))
    assert data["training"] == undrawn(whole)["training"]
    assert data["notes"] == ["metrics.jsonl: the last line was cut off and is left out."]
    assert "cut off" in (torn / "report.html").read_text()


def test_damage_is_noted_and_the_rest_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "damaged", steps=20)
    (run / "environment.json").unlink()
    (run / "mixture_log.jsonl").write_text('{"version": 0}\n{"version": 1}\n')
    (run / "resolved.yaml").write_text("a: [")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:40]
    lines[5] = '"words"'
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    data = undrawn(run)
    assert len(data["training"]["step"]) == 18
    notes = "\n".join(data["notes"])
    for words in (
        "lines 4, 6 damaged",
        "environment.json is missing",
        "mixture_log.jsonl is damaged",
        "resolved.yaml is damaged",
    ):
        assert words in notes
    # The weights then come from the metrics.
    assert data["domains"]["books"]["share_asked"] == pytest.approx(1 / 3)


def test_a_run_that_has_only_been_scored_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "young", steps=1, finished=False)
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (run / "metrics.jsonl").write_text(first + "\n")
    (data,) = data_of(write_report([run]))
    assert data["state"] == "unfinished: 0 of 2 steps"
    assert data["domains"]["books"]["loss_last"] is not None


def test_values_that_are_no_numbers_become_null(tmp_path: Path) -> None:
    run = write_run(tmp_path / "odd", steps=8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[2] |= {"loss": None, "tokens_per_s": None}
    lines[3]["data_wait"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (data,) = data_of(write_report([run]))
    assert data["training"]["loss"][1] is None
    assert data["training"]["data_wait"][2] is None
    assert len(data["training"]["step"]) == 8


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, ("not a run directory", "metrics.jsonl")),
        ({"metrics.jsonl": ""}, ("holds no step yet",)),
        ({"metrics.jsonl": "torn"}, ("holds no step yet",)),
        ({"inner/metrics.jsonl": ""}, ("Runs in it: inner",)),
    ],
)
def test_what_is_no_run_is_refused(
    tmp_path: Path, files: dict[str, str], says: tuple[str, ...]
) -> None:
    run = tmp_path / "none"
    run.mkdir()
    for name, text in files.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
    with pytest.raises(RecipeError) as caught:
        write_report([run])
    for words in says:
        assert words in str(caught.value)
    assert not (run / "report.html").exists()


def test_forty_and_more_domains_stay_legible(tmp_path: Path) -> None:
    names = [f"cluster-{at:02d}" for at in range(60)]
    weights = [2 * (60 - at) / (60 * 61) for at in range(60)]
    run = write_run(tmp_path / "many", domains=names, pieces=[(0, weights)], steps=40)
    page = write_report([run])
    (data,) = data_of(page)
    html = page.read_text()
    assert len(data["domains"]) == 60
    assert len(data["weights"]["shares"]) == 10
    assert sum(shares[0] for shares in data["weights"]["shares"].values()) == pytest.approx(1)
    assert "51 others" in data["weights"]["shares"]
    assert len(data["heldout"]["loss"]) == 24
    assert data["heldout"]["left_out"] == 36
    assert html.count("<tr>") == 1 + 40 + 1
    assert "20 others" in html


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", seed=1),
        write_run(tmp_path / "b", domains=("code", "maths", "prose"), seed=2),
    ]
    page = write_report(runs, tmp_path / "both.html")
    one, two = data_of(page)
    assert (one["name"], two["name"]) == ("a", "b")
    html = page.read_text()
    assert html.count("Mixture over time: ") == 2
    assert html.count("<h3>Training loss and learning rate</h3>") == 1
    assert html.count("<h3>Gradient norm</h3>") == 1
    assert len(re.findall(r"<h3>Training loss per domain: [ab]</h3>", html)) == 2
    assert "Held-out loss side by side" in html
    # A panel for each domain of either run.
    assert len(re.findall(r"<svg", html)) == 3 + 4 * 2 + 4


def test_runs_of_unequal_steps_share_an_axis_of_tokens(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps=6) for name in ("a", "b")]
    equal = progress_axis([undrawn(run) for run in runs])
    assert equal.label == "step (2,048 tokens each)"
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    lines[2]["tokens"] += 100
    (runs[1] / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    data = [undrawn(run) for run in runs]
    assert progress_axis(data).label == "tokens, millions"
    assert progress_axis(data[1:]).label == "step"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / which / "same", domains=("a",), steps=4) for which in "xy"]
    data = data_of(write_report(runs, tmp_path))
    assert [run["name"] for run in data] == [str(run) for run in runs]


def test_runs_of_other_tokenizers_are_compared_by_bytes(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, domains=("a",), steps=4) for name in "xy"]
    manifest = runs[1] / "corpus" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("t" * 32, "u" * 32))
    html = write_report(runs, tmp_path / "both.html").read_text()
    assert "<small>bits per byte</small>" in html


@settings(max_examples=40)
@given(
    weights=st.lists(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
def test_read_stays_within_the_proved_bound(
    weights: list[list[float]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if data.draw(st.booleans(), label="a domain leaves"):
        weights[-1][0] = 0.0
    pieces = [(5 * at, [w / sum(row) for w in row]) for at, row in enumerate(weights)]
    path = tmp_path_factory.mktemp("run") / "run"
    run = write_run(path, domains=("a", "b", "c", "d"), pieces=pieces, steps=25)
    exactness = undrawn(run)["exactness"]
    assert exactness["unit"] == "rows"
    assert exactness["most_ahead"] <= exactness["bound_ahead"] + 1e-6
    assert exactness["most_behind"] >= exactness["bound_behind"] - 1e-6
    stay = len({tuple(w > 0 for w in row) for row in weights}) == 1
    assert (exactness["bound_ahead"] < 1) == stay


def test_a_domain_at_its_cap_counts_as_due_what_it_gave(tmp_path: Path) -> None:
    weights = [(0, [0.6, 0.2, 0.2])]
    run = write_run(tmp_path / "capped", pieces=weights, steps=40, max_epochs=1.0)
    data = undrawn(run)
    books = data["domains"]["books"]
    assert books["tokens"] == 20_000 // LENGTH * LENGTH
    assert books["share_realised"] < 0.5 * books["share_asked"]
    exactness = data["exactness"]
    assert exactness["most_ahead"] <= exactness["bound_ahead"]
    assert exactness["most_behind"] >= exactness["bound_behind"]
    assert "come and go" in exactness["because"]


def test_whole_documents_are_counted_in_tokens(tmp_path: Path) -> None:
    run = write_run(tmp_path / "documents", steps=10)
    recipe = yaml.safe_load((run / "resolved.yaml").read_text())
    recipe["data"] = {"mode": "documents", "sequence_length": 512, "tokens_per_step": 2048}
    (run / "resolved.yaml").write_text(yaml.safe_dump(recipe))
    data = undrawn(run)
    assert data["exactness"]["unit"] == "tokens"
    assert data["exactness"]["bound_ahead"] == 512
    assert data["exactness"]["bound_behind"] == -512 * 1.5


def test_without_matplotlib_the_extra_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match=r"pip install raymix\[plots\]"):
        write_report([run], tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_old_runs_without_gradient_norms_are_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "old", steps=8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("grad_norm", None)
        line.pop("domain_loss", None)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    html = write_report(run).read_text()
    assert "Gradient norm" not in html
    assert "Training loss per domain" not in html
    assert "Training loss and learning rate" in html


def test_training_curves_are_the_values_of_the_metrics(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    record = read_run(run)
    curves = training_curves(record, summarize(record))
    assert curves["grad_norm"]["grad_norm"] == pytest.approx([line["grad_norm"] for line in steps])
    assert curves["loss_mean_steps"] == RECENT_STEPS
    assert curves["loss_mean"] == pytest.approx(
        np.mean([line["loss"] for line in steps[-RECENT_STEPS:]])
    )
    for name, mean in curves["domain_loss_mean"].items():
        losses = [line["domain_loss"][name] for line in steps if name in line["domain_loss"]]
        assert mean == pytest.approx(np.mean(losses[-RECENT_STEPS:]))
    window = curves["domain_loss"]["smoothing_steps"]
    # A window at the first step holds the step and those after it.
    first = [line["domain_loss"].get("books", np.nan) for line in steps[: (window + 1) // 2]]
    assert curves["domain_loss"]["loss"]["books"][0] == pytest.approx(np.nanmean(first))


@pytest.mark.parametrize("out", ["page.pdf", "page"])
def test_the_page_must_be_html(run: Path, tmp_path: Path, out: str) -> None:
    with pytest.raises(RecipeError, match=r"ends in \.html"):
        write_report([run], tmp_path / out)


def test_the_command_writes_and_says_where(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(page), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "report": str(page),
        "data": str(page.with_suffix(".json")),
    }
    assert page.exists()
    wrong = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert wrong.exit_code == 2
    assert "no such directory" in wrong.stderr
