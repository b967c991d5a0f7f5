"""Watching a run: what is shown is what the files say, as they grow, start again or are damaged."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.cli.watch import dashboard, headline, sparkline
from raymix.errors import RecipeError
from raymix.report import write_report
from raymix.report.data.live import LiveRun
from raymix.report.data.losses import RECENT_STEPS, recent_losses
from raymix.report.data.read import read_run
from raymix.report.data.summary import summarize
from raymix.report.data.training_curves import training_curves
from raymix.training.run.progress import step_line
from tests.support.runs import LENGTH, ROWS, write_run


def lines_of(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def drawn(run: LiveRun) -> str:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - nothing to close
    console.print(dashboard(run.document(), fancy=False))
    return console.export_text()


def with_seconds(run: Path, **more: Any) -> None:
    """Give each step of a written run its time, and what else a step may say."""
    changed = []
    for text in lines_of(run):
        line = json.loads(text)
        if "loss" in line:
            line |= {"seconds": 0.2, "tokens_per_s": ROWS * LENGTH / 0.2, **more}
        changed.append(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text("".join(changed))


def with_environment(run: Path, steps: int) -> None:
    path = run / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": steps}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = write_run(tmp_path / "run", pieces=[(0, [0.7, 0.2, 0.1]), (30, [0.1, 0.3, 0.6])])
    with_seconds(directory, data_wait=0.25, domain_loss={"books": 3.0, "code": 4.0})
    with_environment(directory, 60)
    return directory


def test_it_says_what_the_report_says(run: Path) -> None:
    watched = LiveRun(run)
    watched.poll()
    now, report = watched.document(), summarize(read_run(run))
    assert now["state"] == "finished"
    assert (now["step"], now["steps"], now["tokens"]) == (60, 60, 60 * ROWS * LENGTH)
    assert now["tokens_per_s"] == pytest.approx(ROWS * LENGTH / 0.2)
    assert now["data_wait"] == pytest.approx(0.25)
    for name, row in report["domains"].items():
        assert now["domains"][name]["tokens"] == row["tokens"]
        assert now["domains"][name]["epochs"] == pytest.approx(row["epochs"], rel=1e-5)
        assert now["domains"][name]["share_realised"] == pytest.approx(
            row["share_realised"], rel=1e-5
        )
        assert now["domains"][name]["heldout_last"] == pytest.approx(row["loss_last"], rel=1e-5)
        assert now["domains"][name]["share_asked_mean"] == pytest.approx(
            row["share_asked"], rel=1e-5
        )
    assert now["domains"]["maths"]["share_asked"] == pytest.approx(0.6)
    assert now["domains"]["books"]["loss"] == pytest.approx(3.0)
    assert now["domains"]["maths"]["loss"] is None


def test_watch_report_and_train_print_one_training_loss(run: Path) -> None:
    live = LiveRun(run)
    live.poll()
    now = live.document()
    record = read_run(run)
    curves = training_curves(record, summarize(record))
    last = json.loads(lines_of(run)[-2])
    assert now["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert now["loss_mean"] == pytest.approx(curves["loss_mean"], rel=1e-5)
    assert now["loss_mean_steps"] == curves["loss_mean_steps"] == RECENT_STEPS
    for name, mean in curves["domain_loss_mean"].items():
        assert now["domains"][name]["loss_mean"] == (mean and pytest.approx(mean, rel=1e-5))
    line = {"lr": 1e-3, "seconds": 0.2, **last}
    trained = step_line(line, steps=60, tokens_per_s=1.0, eta_s=None)
    assert f"loss {now['loss']:.4f}" in trained
    page = write_report(run).read_text()
    mean = f"{now['loss_mean']:.4f}"
    assert f"training loss {now['loss']:.4f}  mean of last 50 {mean}" in headline(now)
    assert f"{now['loss']:.4f} nats per token at step 60" in page
    assert f"mean of the last 50 steps {mean}" in page
    # The curve ends where its label says.
    assert now["loss_curve"][-1] == now["loss_mean"]
    for label in ("training loss", "held-out loss", "nats per token", "after step 60"):
        assert label in drawn(live)


def test_steps_that_are_written_again_count_once(run: Path) -> None:
    path, lines = run / "metrics.jsonl", lines_of(run)
    again = [json.loads(text) for text in lines[-6:-1]]
    path.write_text(
        "".join(lines[:-1]) + "".join(json.dumps(a | {"loss": 9.0}) + "\n" for a in again)
    )
    live, record = LiveRun(run), read_run(run)
    live.poll()
    mean = recent_losses(record.steps).mean()
    assert live.document()["loss"] == 9.0
    assert live.document()["loss_mean"] == pytest.approx(mean, rel=1e-5)


def test_a_poll_reads_the_new_lines(run: Path) -> None:
    path, lines = run / "metrics.jsonl", lines_of(run)
    path.write_text("".join(lines[:20]))
    watched = LiveRun(run)
    assert watched.poll()
    assert watched.document()["state"] == "running"
    assert not watched.poll()
    with path.open("a") as file:
        file.write("".join(lines[20:]) + '{"step": 61, "lo')
    assert watched.poll()
    whole = LiveRun(run)
    whole.poll()
    one, other = watched.document(), whole.document()
    one.pop("silent_s"), other.pop("silent_s")
    assert one == other


def test_a_run_that_starts_again_is_counted_once(run: Path) -> None:
    path, lines = run / "metrics.jsonl", lines_of(run)
    watched = LiveRun(run)
    watched.poll()
    # As training does: the lines up to the checkpoint, in a new file.
    (run / "new").write_text("".join(lines[:30]))
    os.replace(run / "new", path)
    watched.poll()
    with path.open("a") as file:
        file.write("".join(lines[30:]))
    watched.poll()
    assert (
        sum(row["tokens"] for row in watched.document()["domains"].values()) == 60 * ROWS * LENGTH
    )


@pytest.mark.parametrize(
    "damage",
    [b"\x00\xff\n", b"[1, 2]\n", b'{"step": "x"}\n', b'{"step": 5, "loss": "low"}\n',
     b'{"step": 5, "loss": null, "counts": 3, "shares": [], "eval": 7}\n', b"[" * 100_000 + b"\n",
     b'{"step": 61, "loss": NaN, "tokens_per_s": null, "seconds": "long"}\n'],
)  # fmt: skip
def test_damaged_lines_are_passed_over(run: Path, damage: bytes) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(damage + path.read_bytes() + damage)
    watched = LiveRun(run)
    watched.poll()
    assert "books" in drawn(watched)
    assert json.dumps(watched.document(), allow_nan=False)


def test_before_the_first_step_it_waits(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    watched = LiveRun(run)
    assert not watched.poll()
    assert headline(watched.document()) == "run: waiting for the first step"
    assert drawn(watched)


def test_a_run_that_says_nothing_for_long_is_silent(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text("".join(lines_of(run)[:20]))
    os.utime(path, (time.time() - 3600,) * 2)
    watched = LiveRun(run)
    watched.poll()
    assert "silent" in headline(watched.document())
    assert "no new line for 1:00:0" in headline(watched.document())


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a run directory"):
        LiveRun(tmp_path)
    done = CliRunner().invoke(app, ["watch", str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    assert "no such directory" in done.stderr


def test_without_a_terminal_it_prints_lines_until_the_end(run: Path) -> None:
    path, lines = run / "metrics.jsonl", lines_of(run)
    path.write_text("".join(lines[:20]))

    def go_on() -> None:
        time.sleep(0.5)
        with path.open("a") as file:
            file.write("".join(lines[20:]))

    other = threading.Thread(target=go_on)
    other.start()
    done = CliRunner().invoke(app, ["watch", str(run), "--every", "0.1"])
    other.join()
    assert done.exit_code == 0, done.output
    first, last = done.stdout.splitlines()
    assert "running" in first
    assert "finished" in last
    assert "step 60/60" in last


def test_json_is_one_document_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "before")
    done = CliRunner().invoke(app, ["watch", str(run), "--json"])
    assert json.loads(done.stdout)["step"] == 60
    assert sorted(p.name for p in run.iterdir()) == sorted(
        p.name for p in (tmp_path / "before").iterdir()
    )


def test_a_curve_of_any_length_is_kept_short(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", domains=("a",), steps=3000, evaluate_every=3000)
    watched = LiveRun(run)
    watched.poll()
    curve = watched.document()["loss_curve"]
    assert 200 <= len(curve) <= 400
    assert curve[0] > curve[-1]
    assert len(sparkline(curve, 60)) == 60
    assert sparkline([1.0, 1.0], 60) == "▁▁"


def test_signals_of_the_mixture_log_are_watched_and_drawn(run: Path) -> None:
    path = run / "mixture_log.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entries[1]["stats"] = {
        "grad_norm2": [1.5, -0.1, 0.3],
        "grad_noise": [2.0, 1.0, None],
        "alignment": [0.1, -0.2, 0.3],
        "loss": [1, 2, 3],
    }
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    watched = LiveRun(run)
    watched.poll()
    assert watched.document()["domains"]["code"]["grad_norm2"] == -0.1
    assert watched.document()["domains"]["maths"]["grad_noise"] is None
    assert "grad²" in drawn(watched)
    page = write_report(run)
    assert "Gradient signals" in page.read_text()
    data = json.loads(page.with_suffix(".json").read_text())["runs"][0]["signals"]
    assert data["step"] == [30]
    assert data["values"]["alignment"] == {"books": [0.1], "code": [-0.2], "maths": [0.3]}
    assert data["values"]["grad_noise"]["maths"] == [None]


def test_statistics_of_another_shape_are_passed_over(run: Path) -> None:
    path = run / "mixture_log.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entries[0]["stats"] = {"grad_norm2": [1.0], "grad_noise": "much", "alignment": [[1], [2], [3]]}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert summarize(read_run(run))["signals"] is None
