"""Whole runs in this process: exact resume, checkpoints, the run directory, export."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymix.errors import CorpusError, RecipeError, TrainingError
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.evaluate.export import export
from raymix.training.evaluate.held_out import Evaluator
from raymix.training.evaluate.score import score
from raymix.training.job import Job
from raymix.training.launch.local import run_in_process
from raymix.training.loop import LoopEnd
from raymix.training.run.checkpoint import newest_checkpoint, read_state
from raymix.training.run.rundir import RunDirectory, cut_metrics, open_run, read_metrics
from raymix.training.step.metrics import PendingMetrics, StepSums
from raymix.training.summary import summary
from tests.support.loops import train_corpus
from tests.support.streams import TokensMixer

STEPS = 8
DOMAINS = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


def recipe(corpus: Corpus, directory: Path, **changes: Any) -> Recipe:
    document: dict[str, Any] = {
        "name": "run",
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 32, "rows_per_step": 6},
        "mixer": {"kind": "static", "weights": DOMAINS},
        "model": {
            "type": "llama",
            "config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                # Dropout, so that a resumed run must also draw the same random numbers.
                "attention_dropout": 0.1,
            },
        },
        "train": {"steps": STEPS, "lr": 0.01, "checkpoint_every": 3},
        "eval": {"every": 4, "rows_per_domain": 2},
        "cluster": {"workers": 0},
        "run": {"dir": str(directory / "{name}"), "tensorboard": False},
    }
    for path, value in changes.items():
        node = document
        *parents, leaf = path.split("__")
        for key in parents:
            node = node[key]
        node[leaf] = value
    return Recipe.model_validate(document)


def job(used: Recipe, *, micro_batch_rows: int = 4) -> Job:
    run = open_run(used, "resume")
    run.write_recipe(used)
    return Job(
        recipe=used,
        run=run,
        steps=used.train.steps or 0,
        micro_batch_rows=micro_batch_rows,
        on_gpu=False,
        threads=1,
        session="test",
    )


def train(used: Recipe, *, stop_requested: Callable[[], bool] = lambda: False) -> LoopEnd:
    torch.manual_seed(
        np.random.default_rng().integers(2**31).item()
    )  # what was before is no matter
    return run_in_process(job(used), stop_requested=stop_requested)


def numbers(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the metrics without what a clock says, and when checkpoints were written."""
    clocks = {"seconds", "tokens_per_s", "data_wait"}
    return [
        {key: value for key, value in line.items() if key not in clocks}
        for line in read_metrics(run.metrics)
        if "checkpoint" not in line
    ]


def at(directory: Path, used: Recipe) -> RunDirectory:
    return RunDirectory(directory / used.name)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Recipe]:
    directory = tmp_path_factory.mktemp("whole")
    used = recipe(corpus, directory)
    train(used)
    return at(directory, used), used


def test_metrics_say_what_was_done(whole: tuple[RunDirectory, Recipe]) -> None:
    lines = list(read_metrics(whole[0].metrics))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval" in line] == [0, 4, STEPS]
    assert [line["tokens"] for line in steps] == [192 * n for n in range(1, STEPS + 1)]
    assert all(sum(line["counts"].values()) == 192 for line in steps)
    assert all(line["shares"] == DOMAINS for line in steps)
    for line in steps:
        labels = line["domain_loss"].values()
        assert min(labels) <= line["loss"] <= max(labels)
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_stopped_run_goes_on_bit_for_bit(
    stop_after: int, whole: tuple[RunDirectory, Recipe], corpus: Corpus, tmp_path: Path
) -> None:
    used = recipe(corpus, tmp_path)
    end = train(used, stop_requested=after(at(tmp_path, used), stop_after))
    assert end.stopped
    assert stop_after <= end.step < STEPS
    again = train(used)
    assert (again.stopped, again.step) == (False, STEPS)
    assert numbers(at(tmp_path, used)) == numbers(whole[0])
    assert weights(at(tmp_path, used)) == weights(whole[0])


def after(run: RunDirectory, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        return any(line["step"] >= step for line in read_metrics(run.metrics) if "loss" in line)

    return reached


def weights(run: RunDirectory) -> bytes:
    checkpoint = newest_checkpoint(run.checkpoints)
    assert checkpoint is not None
    return (checkpoint[0] / "model.safetensors").read_bytes()


def test_a_killed_run_forgets_what_came_after_the_checkpoint(
    whole: tuple[RunDirectory, Recipe], corpus: Corpus, tmp_path: Path
) -> None:
    """As after kill -9: metrics run ahead of the checkpoint, and their last line is torn."""
    used = recipe(corpus, tmp_path)
    train(used)
    run = at(tmp_path, used)
    shutil.rmtree(run.checkpoints / f"step-{STEPS:08d}")
    with run.metrics.open("a") as file:
        file.write('{"step": 99, "lo')
    train(used)
    assert numbers(run) == numbers(whole[0])


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    whole: tuple[RunDirectory, Recipe], corpus: Corpus, tmp_path: Path
) -> None:
    used = recipe(corpus, tmp_path)
    train(used)
    run = at(tmp_path, used)
    shutil.rmtree(run.checkpoints)
    cut_metrics(run.metrics, 2)
    train(used)
    assert numbers(run) == numbers(whole[0])


@pytest.mark.parametrize("stop_after", [2, 4, 5])
def test_an_adaptive_mixer_goes_on_bit_for_bit(
    stop_after: int, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first window, at its end and in the second; a window is four steps."""
    for module in ("raymix.training.setup", "raymix.streaming.controller.build"):
        monkeypatch.setattr(f"{module}.build_mixer", lambda config, context: TokensMixer(3))
    runs = []
    for name in ("whole", "stopped"):
        used = recipe(corpus, tmp_path, name=name, train__probe_interval=4, train__steps=16)
        stop_check = after(at(tmp_path, used), stop_after) if name == "stopped" else lambda: False
        assert train(used, stop_requested=stop_check).stopped == (name == "stopped")
        assert train(used).step == 16
        runs.append(at(tmp_path, used))
    assert numbers(runs[1]) == numbers(runs[0])
    shares = {str(line["shares"]) for line in numbers(runs[0]) if "loss" in line}
    assert len(shares) == 3  # two windows begin alike, then each has its own
    log = [json.loads(line) for line in runs[1].mixture_log.read_text().splitlines()]
    assert [entry["first_step"] for entry in log] == [0, 8, 12]


def test_a_damaged_checkpoint_is_passed_over(
    whole: tuple[RunDirectory, Recipe], corpus: Corpus, tmp_path: Path
) -> None:
    used = recipe(corpus, tmp_path)
    train(used)
    run = at(tmp_path, used)
    newest = run.checkpoints / f"step-{STEPS:08d}"
    (newest / "optimizer.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"damaged: optimizer\.safetensors"):
        read_state(newest)
    said: list[str] = []
    checkpoint = newest_checkpoint(run.checkpoints, note=said.append)
    assert checkpoint is not None
    assert checkpoint[1].step == 6
    assert "skipped" in said[0]
    train(used)
    assert numbers(run) == numbers(whole[0])
    assert read_state(newest).step == STEPS


def test_the_last_checkpoints_are_kept(whole: tuple[RunDirectory, Recipe]) -> None:
    names = sorted(path.name for path in whole[0].checkpoints.iterdir())
    assert names == ["step-00000006", "step-00000008"]


def test_a_checkpoint_holds_everything(whole: tuple[RunDirectory, Recipe], corpus: Corpus) -> None:
    checkpoint = newest_checkpoint(whole[0].checkpoints)
    assert checkpoint is not None
    path, state = checkpoint
    assert state.step == state.sampler["step"] == STEPS
    assert state.corpus_fingerprint == corpus.fingerprint
    assert sum(state.tokens.values()) == STEPS * 192
    assert len(state.controller["log"]) == 1 if state.controller else False
    assert (path / "tokenizer.json").is_file()


def test_rounding_does_not_depend_on_micro_batches(
    whole: tuple[RunDirectory, Recipe], corpus: Corpus, tmp_path: Path
) -> None:
    plain = {"model__config": {**whole[1].model.config, "attention_dropout": 0.0}}
    losses = []
    for number, rows in enumerate((6, 1)):
        used = recipe(corpus, tmp_path, name=f"r{number}", **plain)
        run_in_process(job(used, micro_batch_rows=rows), stop_requested=lambda: False)
        losses.append([line["loss"] for line in numbers(at(tmp_path, used)) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_documents_of_several_domains_in_a_row(corpus: Corpus, tmp_path: Path) -> None:
    data = {"mode": "documents", "sequence_length": 64, "tokens_per_step": 300}
    used = recipe(corpus, tmp_path, data=data)
    train(used)
    lines = [line for line in numbers(at(tmp_path, used)) if "loss" in line]
    for line in lines:
        assert sum(line["counts"].values()) >= 300
        assert line["domain_loss"].keys() == line["counts"].keys()
        low, high = min(line["domain_loss"].values()), max(line["domain_loss"].values())
        assert low <= line["loss"] <= high
    document = summary(at(tmp_path, used))
    assert document["tokens"] == sum(sum(line["counts"].values()) for line in lines)


def test_scores_are_those_of_the_last_evaluation(whole: tuple[RunDirectory, Recipe]) -> None:
    last = [line["eval"] for line in read_metrics(whole[0].metrics) if "eval" in line][-1]
    scores = score(whole[0].path)["domains"]
    assert scores.keys() == last.keys() == DOMAINS.keys()
    for name, row in scores.items():
        assert row["loss"] == pytest.approx(last[name]["loss"], abs=1e-6)
        assert row["tokens"] == last[name]["tokens"]
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2) / 3)


def test_summary_has_the_promised_keys(whole: tuple[RunDirectory, Recipe]) -> None:
    document = summary(whole[0])
    assert {"run", "steps", "tokens", "tokens_per_s", "domains"} <= document.keys()
    for name, row in document["domains"].items():
        assert row["share_asked"] == pytest.approx(DOMAINS[name])
        assert row["share_realised"] == pytest.approx(DOMAINS[name], abs=1 / (STEPS * 6))
        assert row["loss_last"] < row["loss_first"]
        assert row.keys() >= {"epochs", "bits_per_byte", "unigram_entropy"}
    json.dumps(document)


def test_an_export_has_the_same_logits_and_a_card(
    whole: tuple[RunDirectory, Recipe], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    done = export(whole[0].path, tmp_path / "out")
    assert "optimizer.safetensors" not in done["files"]
    checkpoint = newest_checkpoint(whole[0].checkpoints)
    assert checkpoint is not None
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
            for path in (checkpoint[0], tmp_path / "out")
        ]
    assert torch.equal(*logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert all(words in card for words in ("| a |", "Licence", "lr: 0.01", "fingerprint"))
    # Paths of this machine are nobody else's.
    assert str(whole[0].path.parent) not in card
    assert str(Path(whole[1].corpus.path).parent) not in card
    with pytest.raises(RecipeError, match="nothing is overwritten"):
        export(whole[0].path, tmp_path / "out")


def test_another_recipe_is_refused_with_its_differences(
    whole: tuple[RunDirectory, Recipe], corpus: Corpus
) -> None:
    directory = whole[0].path.parent
    other = recipe(corpus, directory, train__lr=0.5, data__rows_per_step=12)
    with pytest.raises(RecipeError) as caught:
        open_run(other, "resume")
    said = str(caught.value)
    assert "train.lr: 0.01 -> 0.5" in said
    assert "data.rows_per_step: 6 -> 12" in said
    assert "--if-exists" in said
    # What does not change the run may differ.
    free = recipe(corpus, directory, cluster__workers=3, eval__every=None)
    assert open_run(free, "resume").path == whole[0].path


def test_fail_and_new_never_touch_a_run(whole: tuple[RunDirectory, Recipe]) -> None:
    with pytest.raises(RecipeError, match="a run is here already"):
        open_run(whole[1], "fail")
    assert open_run(whole[1], "new").path == whole[0].path.with_name("run-2")


def test_a_directory_of_something_else_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match="holds files but no run"):
        open_run(recipe(corpus, tmp_path), "resume")


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.locked(), pytest.raises(RecipeError, match="in use by process"), run.locked():
        pass
    with run.locked():
        pass


def test_without_locks_of_the_file_system_a_file_names_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Lustre mounted without flock."""

    def flock(*args: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    run = RunDirectory(tmp_path)
    owner = tmp_path / ".lock-owner"
    with run.locked():
        assert run.in_use() is True
        owned_by = json.loads(owner.read_text())
        with (
            pytest.raises(RecipeError, match=rf"in use by process {owned_by['process']} on"),
            run.locked(),
        ):
            pass
    assert not owner.exists()
    assert run.in_use() is False
    # Dead: of an earlier boot, of a number that another process has now, of none.
    for change in ({"boot": "earlier"}, {"started": "1"}, {"process": 2**22 + 1}):
        owner.write_text(json.dumps({**owned_by, **change}))
        assert run.in_use() is False
        with run.locked():
            assert json.loads(owner.read_text()) == owned_by
    owner.write_text(json.dumps({**owned_by, "host": "elsewhere"}))
    assert run.in_use() is None
    with (
        pytest.raises(RecipeError, match=r"only that machine can tell\. If that process has ended"),
        run.locked(),
    ):
        pass
    assert owner.exists()


def test_a_directory_that_cannot_be_locked_is_not_in_use_by_somebody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    run = RunDirectory(tmp_path)
    with pytest.raises(RecipeError, match="cannot be locked: Input/output"), run.locked():
        pass


def test_cut_keeps_what_a_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [{"step": 0, "eval": {}}, *({"step": n, "loss": 1.0} for n in range(1, 6))]
    path.write_text("".join(json.dumps(line) + "\n" for line in steps) + '{"step": 6, "lo')
    old = path.open("a")  # a worker that outlived its driver
    cut_metrics(path, 3)
    old.write('{"step": 4, "loss": 9.0}\n')
    old.close()
    assert list(read_metrics(path)) == steps[:4]


def test_a_changed_corpus_is_refused(whole: tuple[RunDirectory, Recipe], tmp_path: Path) -> None:
    changed = train_corpus(tmp_path / "corpus", {"a": 9000, "b": 6000, "c": 3000}, seed=1)
    shutil.copytree(whole[0].path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    used = recipe(changed, tmp_path)
    with pytest.raises(CorpusError, match="another corpus"):
        train(used)
    accepted = recipe(changed, tmp_path, data__accept_changed_corpus=True)
    assert train(accepted).step == STEPS


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file-size limit would hit the whole process; the write that fails is safetensors'."""
    import raymix.training.run.checkpoint_writer as module

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    used = recipe(corpus, tmp_path)
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(RecipeError, match="the disk is full"):
        train(used)
    assert list(at(tmp_path, used).checkpoints.iterdir()) == []


def test_gradients_that_are_no_numbers_end_the_run(corpus: Corpus, tmp_path: Path) -> None:
    used = recipe(
        corpus, tmp_path, train__lr=1e30, train__warmup_ratio=0.0, train__max_skipped_steps=3
    )
    with pytest.raises(TrainingError, match="4 steps in a row were left out, the last is step 5"):
        train(used)


def test_a_loss_that_is_no_number_names_its_domain(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = PendingMetrics.result

    def broken(self: PendingMetrics) -> StepSums:
        sums = result(self)
        return replace(sums, loss=float("nan"), nats_D=sums.nats_D * [1.0, float("nan"), 1.0])

    monkeypatch.setattr(PendingMetrics, "result", broken)
    with pytest.raises(TrainingError, match="the loss of b is nan at step 1"):
        train(recipe(corpus, tmp_path))


def test_a_model_that_mixes_documents_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(RecipeError, match="would see each other"):
        train(recipe(corpus, tmp_path, model={"type": "bloom", "config": sizes}))


def test_a_held_out_loss_that_is_no_number_is_one_clear_error(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_all = Evaluator.evaluate

    def broken(self: Evaluator, *args: Any) -> Any:
        table = score_all(self, *args)
        table["b"]["loss"] = float("nan")
        return table

    monkeypatch.setattr(Evaluator, "evaluate", broken)
    with pytest.raises(TrainingError, match=r"train\.lr = 0\.01: the held-out loss of b is nan"):
        train(recipe(corpus, tmp_path))
