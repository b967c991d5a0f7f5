"""Runs with other optimizers: they resume bit for bit, and a run keeps its optimizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raymix.errors import RecipeError
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.run.rundir import RunDirectory, open_run
from tests.integration.training.test_run import job, numbers, recipe, train
from tests.support.loops import train_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 3000, "b": 2000, "c": 1500})


class Counting(torch.optim.SGD):
    """Descends more slowly with each step, by numbers in its groups and in its state."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch has overloads
        for group in self.param_groups:
            group["done"] = group.get("done", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["rate"] = 0.5 * state.get("rate", group["lr"])
                parameter.data.add_(parameter.grad, alpha=-state["rate"] / group["done"])


def used(corpus: Corpus, directory: Path, optimizer: str, options: dict[str, Any]) -> Recipe:
    named = {"optimizer": optimizer, "optimizer_options": options}
    changes = {"steps": 4, "lr": 0.01, "checkpoint_every": 2, **named}
    return recipe(corpus, directory, train=changes, eval={"rows_per_domain": 1})


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("muon", {}),
        ("torch.optim:NAdam", {}),
        ("torch.optim:SGD", {"momentum": 0.9}),
        ("torch.optim:SGD", {}),
        (f"{__name__}:Counting", {}),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    optimizer: str, options: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    made = used(corpus, tmp_path, optimizer, options)
    train(made)
    run = RunDirectory(tmp_path / made.name)
    before = numbers(run)
    last = run.checkpoints / "step-00000004"
    weights = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    train(made)
    assert numbers(run) == before
    assert (last / "model.safetensors").read_bytes() == weights


def test_a_run_keeps_its_optimizer(corpus: Corpus, tmp_path: Path) -> None:
    made = used(corpus, tmp_path, "muon", {})
    job(made)
    for optimizer, options in (("adamw", {}), ("muon", {"momentum": 0.9})):
        with pytest.raises(RecipeError, match=r"differs in train\.optimizer"):
            open_run(used(corpus, tmp_path, optimizer, options), "resume")
