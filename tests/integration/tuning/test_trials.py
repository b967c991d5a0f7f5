"""Runs of a comparison without Ray: how the machine is shared, what is found, how a run ends."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from raymix.errors import RecipeError
from raymix.recipe import ClusterConfig, Recipe
from raymix.store import Corpus
from raymix.training.host.machine import Resources
from raymix.training.job import Job
from raymix.training.run.rundir import RunDirectory, read_metrics
from raymix.tuning.runs.planning import (
    disk_problem,
    divide_machine,
    plan_comparison,
    run_stages,
    trial_machine,
)
from raymix.tuning.runs.progress import TrialsProgress
from raymix.tuning.runs.trial_task import RunTrial
from raymix.tuning.runs.variants import Variant, make_variants
from tests.support.loops import train_corpus

STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 6000, "b": 3000})


def machine(cpus: float = 2, gpus: float = 0, gigabytes: float = 8, nodes: int = 1) -> Resources:
    return Resources(
        where="this machine",
        cpus=cpus,
        gpus=gpus,
        memory_bytes=int(gigabytes * 1e9),
        object_store_bytes=10**9,
        nodes=nodes,
    )


def variants(corpus: Corpus, out: Path, mixers: str = "uniform", **train: Any) -> list[Variant]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "corpus": {"path": corpus.path},
            "data": {"sequence_length": 32, "rows_per_step": 4},
            "model": {"type": "llama", "config": {**sizes, **heads}},
            "train": {"steps": STEPS, "lr": 0.01, "checkpoint_every": 2, **train},
            "eval": {"rows_per_domain": 1, "every": 3},
        }
    )
    return make_variants(recipe, mixers, seeds=2, out=str(out))


def trial(variant: Variant) -> RunTrial:
    run = RunDirectory(Path(variant.recipe.run_dir))
    job = Job(variant.recipe, run, STEPS, 4, on_gpu=False, threads=1, session="test")
    return RunTrial(variant.name, job, 1000)


@pytest.mark.parametrize(
    ("has", "runs", "gpu", "oversubscribe", "expected"),
    [
        (machine(2), 18, False, False, (2, 1, 0)),
        (machine(16), 6, False, False, (6, 2, 0)),
        (machine(2.5), 18, False, False, (2, 1, 0)),
        (machine(2), 4, False, True, (4, 0.5, 0)),
        (machine(1), 3, False, True, (3, 0.3333, 0)),
        (machine(64, nodes=8), 2, False, False, (2, 8, 0)),
        (machine(16, gpus=4), 18, True, False, (4, 4, 1)),
        (machine(16, gpus=4), 18, True, True, (4, 4, 1)),
    ],
)
def test_the_machine_is_shared_out(
    has: Resources, runs: int, gpu: bool, oversubscribe: bool, expected: tuple[int, float, int]
) -> None:
    cluster = ClusterConfig(workers=0, gpus_per_worker="auto" if gpu else 0)
    trial_resources = divide_machine(has, runs, cluster, oversubscribe=oversubscribe)
    assert (trial_resources.parallel, trial_resources.cpus, trial_resources.gpus) == expected
    assert trial_resources.threads >= 1
    memory_bytes = trial_machine(has, trial_resources).memory_bytes
    assert trial_resources.parallel * memory_bytes <= has.memory_bytes


def test_fewer_runs_at_once_where_memory_is_short(corpus: Corpus, tmp_path: Path) -> None:
    runs = variants(corpus, tmp_path, "uniform,proportional")
    assert plan_comparison(runs, corpus, machine(4), parallel=None).trial_resources.parallel == 4
    need = plan_comparison(runs, corpus, machine(1), parallel=1).plans["uniform"].memory_bytes
    tight = plan_comparison(runs, corpus, machine(4, gigabytes=need / 1e9), parallel=None)
    assert tight.trial_resources.parallel < 4
    assert tight.plans["uniform"].steps == STEPS


def test_a_mixer_that_cannot_work_names_itself(corpus: Corpus, tmp_path: Path) -> None:
    runs = variants(corpus, tmp_path, "uniform,static(weights={x: 1})")
    with pytest.raises(RecipeError) as caught:
        plan_comparison(runs, corpus, machine(), parallel=1)
    assert all(text.startswith("static(weights={x:1}): ") for text in caught.value.problems)


def test_what_no_mixer_can_do_is_said_once(corpus: Corpus, tmp_path: Path) -> None:
    runs = variants(corpus, tmp_path, "uniform,proportional")
    tiny = machine(gigabytes=1e-6)
    with pytest.raises(RecipeError) as caught:
        plan_comparison(runs, corpus, tiny, parallel=2)
    assert len(caught.value.problems) == len(set(caught.value.problems)) == 1
    assert not caught.value.problems[0].startswith("uniform")


def test_a_run_stops_goes_on_and_is_found_done(corpus: Corpus, tmp_path: Path) -> None:
    runs = variants(corpus, tmp_path)
    plans = plan_comparison(runs, corpus, machine(), parallel=None).plans
    one, other = runs
    metrics = RunDirectory(Path(one.recipe.run_dir)).metrics
    assert trial(one).attempt(stop_requested=lambda: True) == {"state": "stopped"}
    assert run_stages(runs, corpus, plans) == {one.name: "new", other.name: "new"}

    stopped = trial(one).attempt(stop_requested=metrics.exists)
    assert stopped == {"state": "stopped"}
    assert 0 < list(read_metrics(metrics))[-1]["step"] < STEPS
    assert run_stages(runs, corpus, plans)[one.name] == "begun"
    shown = io.StringIO()
    with TrialsProgress({one.name: (metrics, STEPS)}, done=1, stream=shown) as progress:
        progress.update({one.name: "running"}, {})
        assert trial(one).attempt(stop_requested=lambda: False) == {"state": "done"}
        progress.update({one.name: "done"}, {})
    assert run_stages(runs, corpus, plans)[one.name] == "done"
    assert "uniform-seed0: held-out loss after 6 steps: mean" in shown.getvalue()
    about = json.loads((Path(one.recipe.run_dir) / "environment.json").read_text())
    assert (about["steps"], about["parameters"]) == (STEPS, 1000)


def test_what_goes_wrong_is_told(corpus: Corpus, tmp_path: Path) -> None:
    one, other = variants(corpus, tmp_path, lr=1e30, warmup_ratio=0.0)
    result = trial(one).attempt(stop_requested=lambda: False)
    assert result["state"] == "failed"
    assert "steps were left out" in result["problem"]

    (Path(other.recipe.run_dir) / ".lock").mkdir(parents=True)
    result = trial(other).attempt(stop_requested=lambda: False)
    assert "IsADirectoryError" in result["problem"]
    assert "Traceback" in (Path(other.recipe.run_dir) / "error.log").read_text()
    plans = plan_comparison([other], corpus, machine(), parallel=None).plans
    assert run_stages([other], corpus, plans) == {other.name: "new"}


def test_a_run_in_use_is_left_alone(corpus: Corpus, tmp_path: Path) -> None:
    one, _ = variants(corpus, tmp_path)
    with RunDirectory(Path(one.recipe.run_dir)).locked():
        result = trial(one).attempt(stop_requested=lambda: False)
    assert result["state"] == "failed"
    assert "in use by" in result["problem"]


def test_directories_of_something_else_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    one, other = variants(corpus, tmp_path)
    plans = plan_comparison([one], corpus, machine(), parallel=None).plans
    RunDirectory(Path(one.recipe.run_dir)).write_recipe(
        one.recipe.model_copy(update={"seed": 77, "eval": one.recipe.eval.model_copy(
            update={"rows_per_domain": 9})})
    )  # fmt: skip
    (Path(other.recipe.run_dir)).mkdir()
    (Path(other.recipe.run_dir) / "thesis.tex").write_text("")
    with pytest.raises(RecipeError) as caught:
        run_stages([one, other], corpus, plans)
    first, second = caught.value.problems
    for words in ("uniform-seed0 = ", "seed: 77 -> 0", "eval.rows_per_domain: 9 -> 1", "--out"):
        assert words in first
    assert "holds files but no run" in second


def test_the_disk_must_hold_every_run(corpus: Corpus, tmp_path: Path) -> None:
    runs = variants(corpus, tmp_path)
    plan = plan_comparison(runs, corpus, machine(), parallel=None).plans["uniform"]
    assert disk_problem(plan, 2) is None
    assert "checkpoints" in (disk_problem(plan, 10**12) or "")


def test_the_line_says_how_far_all_runs_are(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("one", "two", "three")}
    shown = io.StringIO()
    with TrialsProgress({n: (p, 10) for n, p in paths.items()}, done=2, stream=shown) as progress:
        paths["one"].write_text('{"step": 5, "loss": 1.0}\n')
        progress.update({"one": "running", "two": "failed"}, {"two": "the loss is nan"})
        line = progress._line()
    assert shown.getvalue() == "two: failed: the loss is nan\n"
    assert line.startswith("2 of 5 runs done, 1 running, 1 failed, ")
    assert line.endswith("to go  one 5/10")
