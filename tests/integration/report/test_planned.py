"""What a run foresaw, in its report: schedules made again from lengths, a law beside the losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raymix.errors import RecipeError
from raymix.laws import MixtureTable, fit_law, save_law
from raymix.recipe import Recipe
from raymix.report import write_report
from raymix.report.data.predictions import schedule_of
from raymix.schedule import Layout, training_planner
from raymix.training.api import train
from raymix.training.run.rundir import read_metrics
from tests.support.loops import train_corpus
from tests.support.runs import write_run
from tests.support.scheduling import PLAIN
from tests.support.searches import search_document


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in document mode, of 20 steps."""
    folder = tmp_path_factory.mktemp("documents")
    corpus = train_corpus(folder / "corpus", {"a": 30_000, "b": 20_000})
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "name": "docs",
            "corpus": {"path": corpus.path},
            "data": {"mode": "documents", "sequence_length": 64, "tokens_per_step": 1500},
            "model": {"config": shape},
            "train": {"steps": 20, "micro_batch_rows": 2},
            "eval": {"rows_per_domain": 1},
            "cluster": {"workers": 0},
            "run": {"dir": str(folder / "docs"), "tensorboard": False},
        }
    )
    train(recipe, report=False)
    return folder / "docs"


def report(*runs: Path, out: Path) -> tuple[str, list[dict[str, Any]]]:
    page = write_report(runs, out)
    return page.read_text(), json.loads(page.with_suffix(".json").read_text())["runs"]


def test_a_run_keeps_what_its_schedules_follow_from(documents: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (documents / "schedule.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 8, 16]
    counts = {line["step"]: line["counts"] for line in read_metrics(documents / "metrics.jsonl")
              if "counts" in line}  # fmt: skip
    for line in lines:
        assert sum(line["lengths"]) == sum(counts[line["step"]].values())
    page, (run,) = report(documents, out=tmp_path / "r.html")
    assert [planned["step"] for planned in run["schedules"]] == [1, 4, 8, 16]
    for planned in run["schedules"]:
        assert f"Schedule of step {planned['step']}, by refine" in page
        assert schedule_of(planned).seconds == planned["planned_s"]
        assert planned["measured_s"] > 0
        assert planned["documents"] == len(planned["lengths"])
    assert run["schedules"][0]["micro_steps"] == schedule_of(lines[0]).micro_steps


def scheduled(run: Path, *lengths: list[int]) -> None:
    layout = {"groups": 2, "context": 4, "barrier": "none", "widths": [1, 2, 4]}
    line = {"planner": "refine", "layout": layout, "cost": PLAIN.document()}
    text = [json.dumps({**line, "step": 2**at, "lengths": some}) for at, some in enumerate(lengths)]
    (run / "schedule.jsonl").write_text("".join(f"{one}\n" for one in text))


def test_schedules_of_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two", "packed")]
    for at, run in enumerate(runs[:2]):
        scheduled(run, [5, 9, 2, 7, 40 + at], [3] * 30)
    page, data = report(*runs, out=tmp_path / "r.html")
    assert "Schedule of step 1, by refine: one" in page
    assert "Schedule of step 2, by refine: two" in page
    assert data[2]["schedules"] == []
    again = training_planner("refine").plan([5, 9, 2, 7, 41], Layout(2, 4, barrier="none",
                                            widths=(1, 2, 4)), PLAIN)  # fmt: skip
    made = schedule_of(data[1]["schedules"][0])
    assert (made.placement.first_K == again.placement.first_K).all()
    assert (made.placement.width_K == again.placement.width_K).all()


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"step": 1, "lengths": []}', '{"step": 1, "lengths": [1e99]}', '"x"',
     '{"step": 1, "lengths": [5], "planner": "x", "layout": {}, "cost": {}}', "null"],
)  # fmt: skip
def test_damaged_schedules_are_left_out(line: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    scheduled(run, [5, 9, 2])
    with (run / "schedule.jsonl").open("a") as file:
        file.write(line + "\n")
    _, (data,) = report(run, out=tmp_path / "r.html")
    assert len(data["schedules"]) == 1
    assert any("schedule.jsonl" in note for note in data["notes"])


def law_file(folder: Path, domains: tuple[str, ...] = ("books", "code", "maths")) -> Path:
    random = np.random.default_rng(0)
    share_RD = random.dirichlet(np.ones(3), 40)
    step_R = np.tile([20.0, 60.0], 20)
    loss_RV = 4 + 3.6 * (step_R[:, None] + 1) ** -0.4 - 0.2 * share_RD
    table = MixtureTable(
        domains=domains,
        targets=domains,
        runs=tuple(f"r{at}" for at in range(40)),
        share_RD=share_RD,
        loss_RV=loss_RV,
        step_R=step_R,
    )
    save_law(folder / "law.json", *fit_law(table, law="additive"))
    return folder / "law.json"


def test_the_law_of_a_search_stands_beside_what_came(tmp_path: Path) -> None:
    law_file(tmp_path)
    run = write_run(tmp_path / "mix-001")
    page, (data,) = report(run, out=tmp_path / "r.html")
    assert data["law"]["kind"] == "additive"
    assert data["law"]["step"] == [20, 40, 60]
    assert set(data["law"]["loss"]) == {"books", "code", "maths"}
    assert "Dashed: the prediction of the search" in page
    assert f"off by {data['law']['error']:.2%} at the end" in page


def test_a_law_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    changing = write_run(
        tmp_path / "changing", pieces=[(0, [0.5, 0.25, 0.25]), (30, [0.2, 0.4, 0.4])]
    )
    other = write_run(tmp_path / "other", domains=("x", "y", "z"))
    law = law_file(tmp_path)
    page, data = report(changing, other, out=tmp_path / "r.html")
    assert [run["law"] for run in data] == [None, None]
    assert "Dashed" not in page
    law.write_text("{")
    _, (run,) = report(write_run(tmp_path / "run"), out=tmp_path / "r.html")
    assert any("law.json" in note for note in run["notes"])


def test_the_directory_of_a_search_is_drawn_as_such(tmp_path: Path) -> None:
    sizes = {"a": 9000, "b": 6000, "c": 3000}
    document = search_document(train_corpus(tmp_path / "corpus", sizes))
    search = tmp_path / "search"
    search.mkdir()
    (search / "tune.json").write_text(json.dumps(document))
    page = write_report(search)
    assert page == search / "report.html"
    assert "What the law is worth" in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text()) == document
    for damage in ("{", "[]", "{}", json.dumps({**document, "runs": 5})):
        (search / "tune.json").write_text(damage)
        with pytest.raises(RecipeError, match=r"tune\.json is damaged"):
            write_report(search)


def test_a_run_that_is_a_search_too_is_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "tune.json").write_text("{")
    assert "run" in yaml.safe_load((run / "resolved.yaml").read_text())["name"]
    assert "The run in pictures" in write_report(run).read_text()
