"""Models that nobody here wrote a rule for: odd uses of parameters, adapters, plain LMs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from raymix.errors import TrainingError
from raymix.signals import CausalLoss, GradientProbe, Mode
from tests.integration.signals.test_families import (
    LENGTH,
    PIECE_B,
    VOCAB,
    K,
    family,
    relative_error,
    rows,
)

WIDTH = 8


def assert_exact(model: nn.Module, *by_backward: str, tolerance: float = 1e-12) -> GradientProbe:
    """Check measured and recorded pieces and the gradients; return the probe."""
    batch = rows()
    (expected,) = GradientProbe(model, n_groups=K, mode="backward").measure(*batch, PIECE_B)
    probe = GradientProbe(model, n_groups=K)
    (measured,) = probe.measure(*batch, PIECE_B)
    assert relative_error(measured, expected) < tolerance
    probe.loss_module(*batch)[0].backward()
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with probe.recording(PIECE_B) as recording:
        probe.loss_module(*batch)[0].backward()
    assert relative_error(recording.pieces, expected) < tolerance
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=tolerance, atol=1e-7)
    model.zero_grad()
    assert probe.by_backward == by_backward
    return probe


class _Square(torch.autograd.Function):
    """A product in a function of its own, as fused kernels are: no mode of torch sees it."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        ctx, x, weight = args
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.flatten(0, 1).t() @ grad.flatten(0, 1)


class Inner(nn.Module):
    """A layer that uses a square matrix as asked."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_BLH: torch.Tensor) -> torch.Tensor:
        how, mix = self.how, self.mix
        flat_NH = x_BLH.flatten(0, 1)
        if how == "einsum":
            return torch.einsum("blh,hk->blk", x_BLH, mix)
        if how == "custom function":
            return _Square.apply(x_BLH, mix)
        if how == "cast":
            return functional.linear(x_BLH, mix.to(torch.float32).double())
        if how == "linear, then einsum":
            return torch.einsum("blh,hk->blk", functional.linear(x_BLH, mix).tanh(), mix)
        if how == "bias twice":
            return functional.linear(x_BLH, mix, self.bias) * (x_BLH @ self.bias)[..., None]
        if how == "number minus":
            return functional.linear(x_BLH, 1.0 - mix)
        if how == "in place":
            return (x_BLH * 2).mul_(mix[0])
        if how == "some tokens":
            return torch.cat([flat_NH[:3], functional.linear(flat_NH[3:], mix)]).view_as(x_BLH)
        if how == "sorted tokens":
            order_N = flat_NH.sum(1).argsort()
            return functional.linear(flat_NH[order_N], mix)[order_N.argsort()].view_as(x_BLH)
        if how == "rows last":
            mixed_LBH = functional.linear(x_BLH.transpose(0, 1), mix)
            return mixed_LBH.transpose(0, 1)
        if how == "dropout":
            return torch.einsum("blh,hk->blk", self.dropout(x_BLH), mix)
        if how == "rows depend":
            return torch.einsum("blh,hk->blk", x_BLH - x_BLH.mean(0), mix)
        raise ValueError(how)


class Logits(nn.Module):
    """A language model of one layer that returns logits in a form of choice."""

    def __init__(self, inner: nn.Module, form: str = "tensor") -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.inner, self.form = inner, form
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        x = self.table(input_ids) + position_ids[..., None].double().cos()
        logits = self.head(x + self.inner(x))
        return {
            "tensor": logits,
            "object": SimpleNamespace(logits=logits),
            "mapping": {"loss": logits.sum(), "logits": logits},
            "tuple": (logits, None),
            "loss": logits.sum(),
        }[self.form]


def logits(how: str = "einsum", form: str = "tensor") -> Logits:
    torch.manual_seed(0)
    return Logits(Inner(how), form).double()


@pytest.mark.parametrize(
    "how",
    [
        "einsum",
        "custom function",
        "linear, then einsum",
        "number minus",
        "in place",
        "sorted tokens",
        "rows last",
    ],
)
def test_what_one_pass_cannot_split_is_measured_by_backward(how: str) -> None:
    assert_exact(logits(how), "inner.mix")


def test_a_parameter_beside_one_whose_module_runs_again_is_measured_so_too() -> None:
    assert_exact(logits("bias twice"), "inner.bias", "inner.mix")


def test_a_cast_of_a_parameter_is_the_parameter() -> None:
    # The reference rounds its gradients to float32.
    assert_exact(logits("cast"), tolerance=1e-6)


@pytest.mark.parametrize("form", ["object", "mapping", "tuple"])
def test_logits_come_in_any_form(form: str) -> None:
    probe = assert_exact(logits(form=form), "inner.mix")
    assert isinstance(probe.loss_module, CausalLoss)


def test_no_logits_is_an_error_that_says_what_to_give() -> None:
    probe = GradientProbe(logits(form="loss"), n_groups=K)
    with pytest.raises(TrainingError, match=r"no logits.*loss per token"):
        probe.measure(*rows(), PIECE_B)


@pytest.mark.parametrize("how", ["dropout", "rows depend", "some tokens"])
def test_a_module_that_gives_other_outputs_again_is_an_error(how: str) -> None:
    probe = GradientProbe(logits(how), n_groups=K)
    with pytest.raises(TrainingError, match=r"'model.inner'.*dropout, or rows that depend"):
        probe.measure(*rows(), PIECE_B)


def test_rows_that_depend_on_each_other_are_not_split() -> None:
    model = logits("einsum")
    model.inner = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(WIDTH), nn.Unflatten(0, (-1, 12)))
    with pytest.raises(TrainingError, match="depend"):
        GradientProbe(model.double(), n_groups=K).measure(*rows(), PIECE_B)


class NoPositions(nn.Module):
    """A model without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(input_ids))


def test_documents_in_one_row_need_positions() -> None:
    probe = GradientProbe(NoPositions().double(), n_groups=K)
    tokens, positions, labels = rows()
    with pytest.raises(ValueError, match="position_ids"):
        probe.measure(tokens, positions, labels, PIECE_B)
    whole = torch.arange(LENGTH).repeat(len(tokens), 1)
    probe.measure(tokens, whole, labels, PIECE_B)
    with pytest.raises(ValueError, match="input_ids"):
        CausalLoss(nn.Linear(2, 2))


class LowRank(nn.Module):
    """A frozen linear layer and a trained low-rank term, as LoRA adds it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_low_rank_adapters_of_a_frozen_model(kind: str) -> None:
    model = family(kind).requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            adapted = LowRank(getattr(layer.self_attn, name)).double()
            setattr(layer.self_attn, name, adapted)
    assert_exact(model)


class Adapted(nn.Module):
    """A frozen matrix with a trained product of matrices added to it, as merged adapters are."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        self.a, self.b = (nn.Parameter(torch.randn(shape)) for shape in ((2, WIDTH), (WIDTH, 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.base + self.b @ self.a)


def test_adapters_that_are_added_to_weights() -> None:
    torch.manual_seed(0)
    assert_exact(Logits(Adapted()).double(), "inner.a", "inner.b")


def test_frozen_experts_are_not_measured() -> None:
    model = family("mixtral")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    assert_exact(model)


def test_tied_experts_count_once() -> None:
    model = family("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    probe = GradientProbe(model, n_groups=K)
    (measured,) = probe.measure(*rows(), PIECE_B)
    (expected,) = GradientProbe(model, n_groups=K, mode="backward").measure(*rows(), PIECE_B)
    assert relative_error(measured, expected) < 1e-12


@pytest.mark.parametrize("untied", [False, True])
def test_a_tied_table_used_in_an_odd_way_too(untied: bool) -> None:
    model = logits("einsum")
    if not untied:
        model.head.weight = model.table.weight

    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * model.table.weight.mean(0)

    model.inner = Mean()
    assert_exact(model, "table.weight")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch warns that an output is a view
@pytest.mark.parametrize(
    ("how", "mode", "message"),
    [
        ("einsum", "exact", "'model.inner.mix'.*only a module sharded by FSDP2"),
        ("custom function", "exact", "no mode of torch intercepts"),
        ("custom function", "backward", "no mode of torch intercepts"),
    ],
)
def test_what_fsdp_forbids_is_an_error(how: str, mode: Mode, message: str, mesh: Any) -> None:
    model = logits(how)
    (expected,) = GradientProbe(model, n_groups=K, mode="backward").measure(*rows(), PIECE_B)
    outer, inner = logits(how), logits(how)
    fully_shard(outer, mesh=mesh)
    (measured,) = GradientProbe(outer, n_groups=K).measure(*rows(), PIECE_B)
    assert relative_error(measured, expected) < 1e-12
    fully_shard(inner.inner, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    with pytest.raises(TrainingError, match=message):
        GradientProbe(inner, n_groups=K, mode=mode).measure(*rows(), PIECE_B)
