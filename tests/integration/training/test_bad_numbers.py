"""Gradients and weights that are not finite: left out, never saved, named, and gone back from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymix.errors import RecipeError, TrainingError
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.model.optim import clip_gradients
from raymix.training.run.checkpoint import read_state
from raymix.training.run.rundir import RunDirectory, read_metrics
from raymix.training.step.metrics import PendingMetrics, StepSums
from tests.integration.training.test_run import at, recipe, weights
from tests.support.loops import train_corpus

STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


def poison_gradients(monkeypatch: pytest.MonkeyPatch, steps: Collection[int], value: float) -> None:
    """Put `value` into the gradients of these steps (1-based, of the first start)."""
    step = 0

    def clip(parameters: Any, clip_norm: float | None) -> torch.Tensor:
        nonlocal step
        step += 1
        trained = list(parameters)
        if step in steps:
            trained[0].grad[0, 0] = value
        return clip_gradients(trained, clip_norm)

    monkeypatch.setattr("raymix.training.loop.clip_gradients", clip)


def poison_losses(monkeypatch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """Make the loss of domain b, the second, no number in these steps."""
    result, step = PendingMetrics.result, 0

    def broken(self: PendingMetrics) -> StepSums:
        nonlocal step
        step += 1
        sums = result(self)
        if step not in steps:
            return sums
        return replace(sums, loss=float("nan"), nats_D=sums.nats_D * [1.0, float("nan"), 1.0])

    monkeypatch.setattr(PendingMetrics, "result", broken)


@pytest.mark.parametrize("optimizer", ["adamw", "torch.optim:NAdam"])
def test_a_step_with_such_a_gradient_is_left_out(
    optimizer: str,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fused AdamW decides on the device, other optimizers on the host."""
    used = recipe(corpus, tmp_path, train__optimizer=optimizer, train__checkpoint_every=1)
    used = used.model_copy(update={"train": used.train.model_copy(update={"keep_checkpoints": 9})})
    poison_gradients(monkeypatch, {3, 4}, float("nan"))
    document = train(used, report=False)
    run = at(tmp_path, used)
    saved = [(path / "model.safetensors").read_bytes() for path in checkpoints(run)]
    assert saved[1] == saved[2] == saved[3] != saved[4]
    assert all(tensor.isfinite().all() for tensor in tensors(checkpoints(run)[-1]).values())
    lines = [line for line in read_metrics(run.metrics) if "batch_hash" in line]
    assert [line["step"] for line in lines if "skipped" in line] == [3, 4]
    assert all("loss" in line for line in lines)  # the losses themselves were finite
    assert document["skipped_steps"] == 2
    assert document["steps"] == STEPS
    said = capsys.readouterr().out
    assert "step 3 was left out: its gradient norm is nan" in said
    assert "2 steps were left out" in said


def test_too_many_in_a_row_end_the_run_before_anything_is_saved(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = recipe(corpus, tmp_path, train__checkpoint_every=4)
    used = used.model_copy(update={"train": used.train.model_copy(update={"max_skipped_steps": 1})})
    # Two, but not in a row; then two that are, as rows of b have no finite loss.
    poison_gradients(monkeypatch, {1, 3, 6, 7}, float("inf"))
    poison_losses(monkeypatch, {6, 7})
    with pytest.raises(TrainingError) as error:
        train(used, report=False)
    said = str(error.value)
    assert said.startswith("train.max_skipped_steps = 1: 2 steps in a row were left out, the last")
    assert "step 7: its gradient norm is inf, the loss of b is not finite." in said
    assert "--from-step" in said
    assert error.value.exit_code == 1
    run = at(tmp_path, used)
    assert [path.name for path in checkpoints(run)] == ["step-00000004"]
    line = list(read_metrics(run.metrics))[-1]
    assert (line["step"], list(line["domain_loss"])) == (6, ["a", "c"])
    assert "loss" not in line


def test_weights_that_are_not_finite_are_not_saved(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update that overflows, although its gradient did not."""
    used = recipe(corpus, tmp_path)
    step = torch.optim.AdamW.step

    def overflow(self: torch.optim.AdamW) -> None:
        step(self)
        self.param_groups[0]["params"][0].data[0, 0] *= float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(TrainingError, match=r"not written: 1 of \d+ tensors, such as .*embed"):
        train(used, report=False)
    assert checkpoints(at(tmp_path, used)) == []


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    directory = tmp_path_factory.mktemp("finished")
    used = recipe(corpus, directory, train__checkpoint_every=2)
    used = used.model_copy(update={"train": used.train.model_copy(update={"keep_checkpoints": 9})})
    train(used, report=False)
    return directory, used


def test_a_poisoned_checkpoint_is_named_and_gone_back_from(
    finished: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, used = finished
    run = at(directory, used)
    before, lines = weights(run), steps(run)
    # Of a version that saved it: the last is removed, as the run stopped before.
    newest, last = run.checkpoints / "step-00000006", run.checkpoints / "step-00000008"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    poisoned = {name: tensor * float("nan") for name, tensor in tensors(newest).items()}
    save_file(poisoned, newest / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"step-00000006': poisoned: (\d+) of \1 tensors"):
        train(used, report=False)
    with pytest.raises(RecipeError, match=r"from_step = 1: .*It has those of steps 2, 4, 6\."):
        train(used, from_step=1, report=False)
    run.mixture_log.write_text(run.mixture_log.read_text() + '{"version": 9, "torn')
    train(used, from_step=5, report=False)
    assert "going on from step 4 of 8" in capsys.readouterr().out
    aside = run.checkpoints / "after-step-00000004" / "step-00000006"
    assert read_state(aside).step == 6
    assert (weights(run), steps(run)) == (before, lines)
    assert len(run.mixture_log.read_text().splitlines()) == 1


def steps(run: RunDirectory) -> list[tuple[int, float, str]]:
    lines = [line for line in read_metrics(run.metrics) if "loss" in line]
    return [(line["step"], line["loss"], line["batch_hash"]) for line in lines]


def checkpoints(run: RunDirectory) -> list[Path]:
    return sorted(run.checkpoints.glob("step-*"))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")
