"""Optimizers by name: what they update, what they keep, and what is refused before a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raymix.errors import RecipeError
from raymix.recipe import ConfigModel, TrainConfig, load_recipe
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.optim import build_optimizer, set_learning_rate
from raymix.training.model.optimizer_class import check_optimizer, try_optimizer
from tests.support.recipes import document

FACTS = CorpusFacts(vocab_size=61, eos_id=60, sequence_length=32)
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def config(optimizer: str = "adamw", **changes: Any) -> TrainConfig:
    options = changes.pop("options", {})
    named = {"optimizer": optimizer, "optimizer_options": options}
    return TrainConfig.model_validate({"steps": 10, "lr": 0.01, **named, **changes})


def tiny() -> nn.Module:
    return build_model(ConfigModel(config=SHAPE), FACTS, seed=1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_muon_is_torchs_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    ours, theirs = tiny(), tiny()
    named = dict(theirs.named_parameters())
    outer = ("embed_tokens", "lm_head", "norm")
    hidden = [p for name, p in named.items() if not any(part in name for part in outer)]
    tables = [p for name, p in named.items() if "embed_tokens" in name or "lm_head" in name]
    norms = [p for name, p in named.items() if "norm" in name]
    assert len(hidden) == 7
    muon = torch.optim.Muon(
        hidden, lr=0.01, weight_decay=0.2, adjust_lr_fn="match_rms_adamw", momentum=0.8
    )
    adamw = torch.optim.AdamW(
        [{"params": tables}, {"params": norms, "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2, fused=True,
    )  # fmt: skip
    used = config("muon", weight_decay=0.2, options={"momentum": 0.8})
    joined = build_optimizer(ours, used, sharded=False)
    for rate in (0.01, 0.004):
        for part in (joined, muon, adamw):
            set_learning_rate(part, rate)
        step(ours, joined)
        step(theirs, muon)
        adamw.step()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, named[name]), name


def test_any_class_gets_the_rate_the_decay_and_its_options() -> None:
    ours, theirs = tiny(), tiny()
    used = config("torch.optim:SGD", weight_decay=0.0, options={"momentum": 0.7, "nesterov": True})
    joined = build_optimizer(ours, used, sharded=False)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.7, nesterov=True)
    for _ in range(3):
        step(ours, joined)
        step(theirs, sgd)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize(
    ("optimizer", "options", "expected"),
    [
        ("adamw", {}, (8, 8, 8)),
        ("adamw", {"amsgrad": True}, (12, 12, 12)),
        ("muon", {}, (4, 8, 8)),
        ("torch.optim:SGD", {}, (0, 0, 0)),
        ("torch.optim:SGD", {"momentum": 0.9}, (4, 4, 4)),
        # One number per row and one per column are nothing beside the matrix.
        ("torch.optim:Adafactor", {}, (0, 0, 4)),
    ],
)
def test_states_are_counted(
    optimizer: str, options: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    state_bytes = try_optimizer(config(optimizer, options=options)).state_bytes
    assert tuple(state_bytes[role] for role in ("matrix", "table", "vector")) == expected


class Listing(torch.optim.SGD):
    """Keeps in its state what a checkpoint cannot hold."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch has overloads
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = []


@pytest.mark.parametrize(
    ("optimizer", "options", "says"),
    [
        ("torch.optim:Adan", {}, ("train.optimizer = 'torch.optim:Adan'", "'Adam'")),
        ("nowhere.at.all:Adam", {}, ("cannot be imported", "nowhere")),
        ("torch.nn:Linear", {}, ("not a subclass of torch.optim.Optimizer",)),
        ("torch.optim:LBFGS", {}, ("closure",)),
        ("torch.optim:SparseAdam", {}, ("dense gradients",)),
        ("torch.optim:NAdam", {"momentun_decay": 1}, ("momentun_decay = 1", "'momentum_decay'")),
        ("muon", {"momentum": -1}, ("{'momentum': -1}", "Muon refuses", "should be >= 0")),
        (f"{__name__}:Listing", {}, ("'history' is a list",)),
    ],
)
def test_what_cannot_train_is_named(
    optimizer: str, options: dict[str, Any], says: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError) as caught:
        try_optimizer(config(optimizer, options=options))
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": "adam"}, "train.optimizer = 'adam': not the name of an optimizer"),
        ({"optimizer_options": {"betas": [0, 0]}}, "Set train.betas"),
        ({"optimizer_options": {"x": float("inf")}}, "train.optimizer_options.x"),
        ({"optimizer": "muon", "probe": {"precondition": "adam"}}, "train.probe.precondition"),
    ],
)
def test_recipes_that_contradict_themselves(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(document(train={"steps": 1, **changes}))
    assert says in str(caught.value)


def test_what_the_run_needs_of_its_optimizer() -> None:
    factored = config("torch.optim:Adafactor", parallel="fsdp2")
    with pytest.raises(RecipeError, match=r"train\.parallel = 'fsdp2'.*cannot shard"):
        check_optimizer(factored, try_optimizer(factored))
    metric = config("torch.optim:SGD", probe={"precondition": "adam"})
    with pytest.raises(RecipeError, match=r"train\.probe\.precondition.*no second moment"):
        check_optimizer(metric, try_optimizer(metric))
    nadam = config("torch.optim:NAdam", probe={"precondition": "adam"}, parallel="fsdp2")
    check_optimizer(nadam, try_optimizer(nadam))
