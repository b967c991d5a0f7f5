"""A step that takes far longer than usual is told, with what each rank does meanwhile."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.run.stalls import StallReport, StallReports, describe
from tests.integration.training.test_run import recipe
from tests.support.loops import train_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


def test_a_late_step_is_told_once(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(
        corpus,
        tmp_path,
        train__steps=32,
        train__optimizer="tests.support.late_optimizer:LateAdam",
        run__stall_seconds=1,
    )
    train(made, report=False)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "has taken" in line)
    assert line.startswith("step 30 has taken ")
    assert f": rank 0 ({socket.gethostname()}) in its forward and backward passes. " in line
    report = json.loads((Path(made.run_dir) / "stalls" / "rank-00000.json").read_text())
    assert "late_optimizer.py" in report["stack"][-1]
    # The next start begins without it.
    train(recipe(corpus, tmp_path, name="another", run__stall_seconds=0), report=False)
    assert not (tmp_path / "another" / "stalls").exists()


def test_the_rank_that_the_others_wait_for_comes_first(tmp_path: Path) -> None:
    waiting = StallReport(0, "node-a", 124, "in its forward and backward passes", 95.2, 0.21, [])
    late = replace(waiting, rank=5, host="node-b", activity="reading a batch", seconds=96.4)
    ranks = [replace(waiting, rank=rank) for rank in (0, 1, 2, 3, 4, 6)]
    assert describe([*ranks, late], tmp_path) == (
        "step 124 has taken 96 s, where 0.21 s are usual: rank 5 (node-b) reading a batch; "
        "ranks 0 (node-a), 1 (node-a), 2 (node-a), 3 (node-a) and 2 more in its forward and "
        f"backward passes. Stacks: {tmp_path}"
    )


def test_old_and_broken_reports_are_no_news(tmp_path: Path) -> None:
    reports = StallReports(tmp_path)
    (tmp_path / "rank-00000.json").write_text("{")
    (tmp_path / "rank-00001.json").write_text('{"rank": 1}')
    old = {"rank": 2, "host": "a", "step": 3, "activity": "x", "seconds": 9.0, "usual_s": None}
    (tmp_path / "rank-00002.json").write_text(json.dumps(old | {"stack": []}))
    until = time.monotonic() + 4
    while time.monotonic() < until:
        assert reports.poll(last_step=3) is None
        time.sleep(0.5)
