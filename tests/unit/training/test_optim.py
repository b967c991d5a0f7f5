"""Learning rates in closed form, decay groups, clipping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raymix.recipe import TrainConfig
from raymix.training.model.learning_rate import learning_rate
from raymix.training.model.optim import (
    build_optimizer,
    clip_gradients,
    decay_groups,
)

STEPS = 100


def config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"steps": STEPS, "lr": 0.01} | changes)


def rates(recipe: TrainConfig, steps: int = STEPS) -> list[float]:
    return [learning_rate(step, steps=steps, config=recipe) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    learning_rates = rates(config(warmup_ratio=0.1, schedule="constant"))
    assert learning_rates[:10] == pytest.approx([0.001 * (step + 1) for step in range(10)])
    assert learning_rates[10:] == [0.01] * 90


def test_cosine_follows_the_formula_to_the_lowest() -> None:
    learning_rates = rates(config(warmup_ratio=0.1, min_lr_ratio=0.2))
    assert learning_rates[9] == pytest.approx(0.01)
    middle = 0.01 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert learning_rates[54] == pytest.approx(middle)
    assert learning_rates[-1] == pytest.approx(0.002)


def test_wsd_holds_then_falls_in_a_straight_line() -> None:
    learning_rates = rates(
        config(schedule="wsd", warmup_ratio=0.05, decay_ratio=0.2, min_lr_ratio=0.0)
    )
    assert learning_rates[5:80] == [0.01] * 75
    fall = [0.01 * (1 - (step + 1) / 20) for step in range(20)]
    assert learning_rates[80:] == pytest.approx(fall)


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    steps=st.integers(1, 400),
    warmup=st.floats(0, 0.9),
    decay=st.floats(0.01, 1),
    low=st.floats(0, 1),
)
def test_rates_stay_between_lowest_and_peak_and_fall_after_the_warmup(
    schedule: str, steps: int, warmup: float, decay: float, low: float
) -> None:
    recipe = config(
        schedule=schedule,
        warmup_ratio=warmup,
        decay_ratio=decay * (1 - warmup),
        min_lr_ratio=low,
        steps=steps,
    )
    learning_rates = rates(recipe, steps)
    peak = learning_rates.index(max(learning_rates))
    assert all(0 <= rate <= recipe.lr * (1 + 1e-9) for rate in learning_rates)
    assert learning_rates[: peak + 1] == sorted(learning_rates[: peak + 1])
    assert learning_rates[peak:] == sorted(learning_rates[peak:], reverse=True)
    if schedule != "constant" and math.ceil(warmup * steps) < steps:
        assert learning_rates[-1] == pytest.approx(recipe.lr * low, abs=1e-12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


def test_biases_and_norms_do_not_decay() -> None:
    net = Net()
    decayed, undecayed = decay_groups(net, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert undecayed["weight_decay"] == 0.0
    assert decayed["params"] == [net.embedding.weight, net.linear.weight]
    assert undecayed["params"] == [net.linear.bias, net.norm.weight, net.norm.bias]


def test_a_step_of_adamw_is_the_formula() -> None:
    net = Net()
    recipe = config(weight_decay=0.5, betas=(0.9, 0.99), eps=1e-6)
    optimizer = build_optimizer(net, recipe, sharded=False)
    before = net.linear.weight.detach().clone()
    grad = torch.linspace(-1, 1, 16).view(4, 4)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    net.linear.weight.grad = grad
    optimizer.step()
    # First step: both moments are bias-corrected to the gradient and its square.
    expected = before * (1 - 0.01 * 0.5) - 0.01 * grad / (grad.abs() + 1e-6)
    torch.testing.assert_close(net.linear.weight.detach(), expected)


@pytest.mark.parametrize(("limit", "expected"), [(None, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_clipping_returns_the_norm_before(limit: float | None, expected: float) -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert float(clip_gradients([first, second], limit)) == pytest.approx(5.0)
    norm = math.hypot(float(first.grad), float(second.grad))
    assert norm == pytest.approx(expected, rel=1e-5)
