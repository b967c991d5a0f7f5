"""Gradient statistics on one process and on two ranks over gloo (DDP, FSDP2), without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from raymix.recipe import ConfigModel, TrainConfig
from raymix.signals import (
    GradientProbe,
    GradientSums,
    adam_preconditioner,
    gradient_sums,
    order_by_piece,
    statistics,
)
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.loss import IGNORED, PackedLoss
from raymix.training.model.optim import build_optimizer
from raymix.training.model.parallel import Replica, World, full_tensors, place_model
from tests.support.ranks import on_two_ranks, results_of_ranks

K, LENGTH, VOCAB = 4, 24, 128
MODEL = ConfigModel(
    config={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
)
# Experts and attention sinks: their modules run again in the backward pass.
EXPERTS = ConfigModel(
    type="gpt_oss",
    config={
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
)
CASES = ("ddp", "fsdp2", "fsdp2 checkpointed")
EXPERT_CASES = ("ddp experts", "fsdp2 experts checkpointed")
FIELDS = ("loss_K", "tokens_K", "norm2_K", "noise_K", "gram_KK")


def rows_of(rank: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return a rank's rows, unevenly many per piece, and their pieces."""
    generator = torch.Generator().manual_seed(rank)
    piece_B = torch.cat([torch.arange(2 * K), torch.arange(rank, 2 * K, 3), torch.tensor([-1])])
    piece_B = piece_B[order_by_piece(piece_B)]
    shape = len(piece_B), LENGTH
    tokens = torch.randint(0, 12, shape, generator=generator)
    tokens = (tokens + 9 * (piece_B % K)[:, None]) % VOCAB
    labels = functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    return (tokens, torch.arange(LENGTH).repeat(len(tokens), 1), labels), piece_B


def one_case(world: World, case: str, rank: int) -> dict[str, Any]:
    """Return what each way of measuring found on this rank, and gradients of two ways."""
    parallel, *options = case.split()
    config = TrainConfig.model_validate({"steps": 1, "parallel": parallel})
    kind = EXPERTS if "experts" in options else MODEL
    loss = PackedLoss(
        build_model(kind, CorpusFacts(VOCAB, VOCAB - 1, LENGTH), seed=3), linear_head=True
    )
    if "checkpointed" in options:
        loss.model.gradient_checkpointing_enable({"use_reentrant": False})
    replica = place_model(loss, config, world, bf16=False)
    batch, piece_B = rows_of(rank)
    scale = replica.gradient_scale / 100
    plain, _ = gradients(replica, batch, None, piece_B, scale)
    results: dict[str, Any] = {}
    probes = {
        mode: GradientProbe(replica.module, n_groups=K, mode=mode)
        for mode in ("exact", "backward", "last_layer")
    }
    for mode, probe in probes.items():
        (results[mode],) = probe.measure(*batch, piece_B)
        if any(parameter.grad is not None for parameter in replica.model.parameters()):
            raise AssertionError(f"{mode} left gradients behind")
    results["by_backward"] = probes["exact"].by_backward
    results["passes"] = probes["exact"].measure(*batch, piece_B, passes=2)
    ours, results["recorded"] = gradients(replica, batch, probes["exact"], piece_B, scale)
    results["gradients"] = {name: (ours[name], plain[name]) for name in plain}
    for parameter in replica.model.parameters():
        parameter.grad = torch.ones_like(parameter) * 1e-3
    optimizer = build_optimizer(replica.model, config, sharded=replica.sharded)
    optimizer.step()
    optimizer.zero_grad()
    for mode in ("exact", "backward"):
        metric = adam_preconditioner(optimizer)
        probe = GradientProbe(replica.model, n_groups=K, mode=mode, precondition=metric)
        (results[f"adam {mode}"],) = probe.measure(*batch, piece_B)
    return results


def gradients(
    replica: Replica,
    batch: tuple[torch.Tensor, ...],
    probe: GradientProbe | None,
    piece_B: torch.Tensor,
    scale: float,
) -> tuple[dict[str, torch.Tensor], Any]:
    with replica.accumulating(last=True):
        if probe is None:
            (replica.module(*batch)[0] * scale).backward()
            pieces = None
        else:
            with probe.recording(piece_B, scale=scale) as recording:
                (replica.module(*batch)[0] * scale).backward()
            pieces = recording.pieces
    named = dict(replica.model.named_parameters())
    whole = full_tensors({name: p.grad for name, p in named.items() if p.grad is not None}, World())
    whole = {name: gradient.clone() for name, gradient in whole.items()}
    replica.model.zero_grad(set_to_none=True)
    return whole, pieces


def added(sums: GradientSums) -> GradientSums:
    """Return the sums over ranks, through one vector."""
    vector = torch.from_numpy(sums.vector())
    torch.distributed.all_reduce(vector)
    return GradientSums.from_vector(vector.numpy(), K)


def on_each_rank(world: World, directory: Path) -> dict[str, Any]:
    results = {}
    for case in (*CASES, *EXPERT_CASES):
        results[case] = one_case(world, case, world.rank)
        results[case]["added"] = {
            mode: statistics(added(gradient_sums(results[case][mode])))
            for mode in ("recorded", "backward")
        }
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    two = results_of_ranks("tests.integration.signals.test_ranks", tmp_path_factory.mktemp("ranks"))
    return {**two, "one": one_case(World(), "ddp", 0)}


def assert_same(ours: Any, theirs: Any) -> None:
    for name in FIELDS:
        actual, expected = getattr(ours, name), getattr(theirs, name)
        if name == "gram_KK":  # nearly at right angles: as exact as the lengths are
            length_K = np.sqrt(np.abs(theirs.norm2_K))
            scale = np.maximum(np.abs(expected), np.outer(length_K, length_K))
            np.testing.assert_array_less(np.abs(actual - expected) / scale, 1e-5)
        else:
            np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", ["one", *CASES, *EXPERT_CASES])
def test_exact_equals_backward(case: str, results: dict[str, Any]) -> None:
    expected = statistics(results[case]["backward"])
    for way in ("exact", "recorded"):
        assert_same(statistics(results[case][way]), expected)
    assert_same(statistics(results[case]["adam exact"]), statistics(results[case]["adam backward"]))


@pytest.mark.parametrize("case", [*CASES, *EXPERT_CASES])
def test_ranks_add_up_to_the_same_statistics(case: str, results: dict[str, Any]) -> None:
    assert_same(results[case]["added"]["recorded"], results[case]["added"]["backward"])
    alone = statistics(results[case]["backward"])
    assert (results[case]["added"]["backward"].tokens_K > alone.tokens_K).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["backward", "last_layer", "passes"])
def test_sharding_changes_nothing(case: str, way: str, results: dict[str, Any]) -> None:
    ours, theirs = (statistics(results[which][way]) for which in (case, "one"))
    np.testing.assert_allclose(ours.noise_K, theirs.noise_K, rtol=1e-4)
    np.testing.assert_allclose(ours.loss_K, theirs.loss_K, rtol=1e-5)


@pytest.mark.parametrize("case", ["one", *CASES, *EXPERT_CASES])
def test_gradients_come_out_as_always(case: str, results: dict[str, Any]) -> None:
    assert len(results[case]["gradients"]) > 30
    assert len(results[case]["by_backward"]) == (10 if case in EXPERT_CASES else 0)
    for ours, plain in results[case]["gradients"].values():
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    on_two_ranks(on_each_rank)
