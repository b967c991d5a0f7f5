"""What a person sees of a run, read from its metrics while they are written and cut back."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from raymix.errors import TrainingError
from raymix.training.launch.watch import watch
from raymix.training.run.progress import (
    MetricsTail,
    RunProgress,
    evaluation_line,
    shares_text,
    step_line,
)
from raymix.training.run.rundir import RunDirectory, cut_metrics, read_metrics


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 4.5,
        "lr": 1e-3,
        "seconds": 0.5,
        "tokens_per_s": 2000.0,
        "data_wait": 0.01,
        "shares": {"a": 0.75, "b": 0.25},
        **more,
    }


def append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(item) + "\n" for item in lines)


def test_tail_reads_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, line(1))
    tail = MetricsTail(path)
    assert tail.read() == ([], False)
    append(path, line(2))
    with path.open("a") as file:
        file.write('{"step": 3,')
    assert [item["step"] for item in tail.read()[0]] == [2]
    with path.open("a") as file:
        file.write(' "loss": 1}\n')
    assert [item["step"] for item in tail.read()[0]] == [3]


def test_tail_follows_a_file_that_was_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, *(line(step) for step in range(1, 6)))
    tail = MetricsTail(path)
    cut_metrics(path, 3)
    # Longer than what was cut off, and the steps are the same ones again.
    append(path, *(line(step, note="x" * 40) for step in range(4, 9)))
    lines, begun_anew = tail.read()
    assert begun_anew
    assert [item["step"] for item in lines] == [4, 5, 6, 7, 8]


def test_tail_of_a_run_that_begins_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    cut_metrics(path, 0)
    append(path, line(1))
    lines, begun_anew = tail.read()
    assert ([item["step"] for item in lines], begun_anew) == ([1], False)


def test_the_metrics_of_a_long_run_are_never_in_memory_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    counts = {f"domain {n}": n for n in range(200)}
    append(path, *(line(step, counts=counts) for step in range(1, 1001)))
    assert path.stat().st_size > 3_000_000
    tracemalloc.start()
    try:
        tail = MetricsTail(path)
        assert max(item["step"] for item in read_metrics(path)) == 1000
        cut_metrics(path, 990)
        assert tail.read() == ([], True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert [item["step"] for item in read_metrics(path)] == list(range(1, 991))


def test_a_step_in_words() -> None:
    text = step_line(line(7, mfu=0.412), steps=1200, tokens_per_s=24_100, eta_s=125)
    assert text == (
        "step     7/1,200  train loss 4.5000  lr 1.00e-03  24.1k tok/s  mfu 41.2%  wait 1.0%  "
        "2:05 to go  a 75% b 25%"
    )


def test_a_first_step_says_how_long_it_took_and_promises_nothing(tmp_path: Path) -> None:
    path, stream = tmp_path / "metrics.jsonl", io.StringIO()
    with RunProgress(path, steps=9, stream=stream) as progress:
        append(path, line(1, seconds=41.25), line(2))
        progress.poll()
    first, second = stream.getvalue().splitlines()
    assert "took 41.2 s" in first
    assert "to go" not in first
    assert "tok/s" not in first
    assert "tok/s" in second
    assert "to go" in second


def test_many_shares_are_cut_short() -> None:
    shares = {f"d{n}": (n + 1) / 55 for n in range(10)}
    assert shares_text(shares) == "d9 18.2% d8 16.4% d7 14.5% d6 12.7% +6"


def test_an_evaluation_in_words() -> None:
    few = {"a": {"loss": 1.0}, "b": {"loss": 2.0}}
    assert evaluation_line(5, few) == "held-out loss after 5 steps: mean 1.5000; a 1.000, b 2.000"
    many = {f"d{n:02}": {"loss": float(n)} for n in range(40)}
    assert "over 40 domains, d00 0.000 to d39 39.000" in evaluation_line(5, many)
    assert "no domain" in evaluation_line(0, {})


def test_without_a_terminal_the_first_and_last_steps_are_lines(tmp_path: Path) -> None:
    path, stream = tmp_path / "metrics.jsonl", io.StringIO()
    with RunProgress(path, steps=50, stream=stream) as progress:
        append(path, {"step": 0, "eval": {"a": {"loss": 3.0}}}, *(line(n) for n in range(1, 51)))
        progress.poll()
    text = stream.getvalue().splitlines()
    steps = [row.split("/")[0] for row in text if row.startswith("step")]
    assert steps == ["step  1", "step  2", "step  3", "step 50"]
    assert text[0].startswith("held-out loss after 0 steps")


def test_a_restart_is_said(tmp_path: Path) -> None:
    path, stream = tmp_path / "metrics.jsonl", io.StringIO()
    with RunProgress(path, steps=9, stream=stream) as progress:
        append(path, line(1), line(2))
        progress.poll()
        cut_metrics(path, 1)
        append(path, line(2, seconds=0.75))
        progress.poll()
    assert "restarted" in stream.getvalue()


def test_watch_raises_what_the_work_raised(tmp_path: Path) -> None:
    def work() -> None:
        raise TrainingError("no")

    run = RunDirectory(tmp_path)
    with (
        RunProgress(run.metrics, steps=1, stream=io.StringIO()) as progress,
        pytest.raises(TrainingError, match="no"),
    ):
        watch(work, run, progress, starting="it")


def test_watch_raises_what_the_check_raises_while_the_work_goes_on(tmp_path: Path) -> None:
    def check() -> None:
        raise TrainingError("it is gone")

    run, over = RunDirectory(tmp_path), threading.Event()
    with (
        RunProgress(run.metrics, steps=1, stream=io.StringIO()) as progress,
        pytest.raises(TrainingError, match="it is gone"),
    ):
        watch(lambda: over.wait(60), run, progress, starting="it", check=check)
    over.set()


def interrupt_soon() -> None:
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_asks_for_a_clean_stop_and_waits(tmp_path: Path) -> None:
    run, stream = RunDirectory(tmp_path), io.StringIO()
    append(run.metrics, line(1))

    def work() -> None:
        append(run.metrics, line(2))
        while not run.stop_request.exists():
            time.sleep(0.01)

    with RunProgress(run.metrics, steps=9, stream=stream) as progress:
        threading.Timer(0.5, interrupt_soon).start()
        watch(work, run, progress, starting="it")
    assert "Stopping with a checkpoint" in stream.getvalue()


def test_ctrl_c_before_the_first_step_does_not_wait(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    before = signal.getsignal(signal.SIGINT)  # ignored where the shell put us in the background
    with RunProgress(run.metrics, steps=9, stream=io.StringIO()) as progress:
        threading.Thread(target=interrupt_soon).start()
        with pytest.raises(KeyboardInterrupt):
            watch(lambda: time.sleep(5), run, progress, starting="it")
    assert signal.getsignal(signal.SIGINT) is before
