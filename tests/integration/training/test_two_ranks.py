"""Two ranks over gloo, without Ray: any split of a batch gives the same gradient and update."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raymix._utils.sharded import is_sharded
from raymix.recipe import ConfigModel, TrainConfig
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.finite import non_finite, step_if_finite
from raymix.training.model.hf_model import build_model
from raymix.training.model.loss import PackedLoss
from raymix.training.model.optim import build_optimizer, clip_gradients
from raymix.training.model.parallel import World, full_tensors, place_model
from raymix.training.run.checkpoint import TrainingState
from raymix.training.run.checkpoint_writer import save_checkpoint
from raymix.training.run.optimizer_state import load_optimizer
from raymix.training.step.batches import count_micro_batches, max_rows_per_rank, micro_batches
from raymix.training.step.metrics import StepMetrics
from tests.support.ranks import on_two_ranks, results_of_ranks

ROWS, LENGTH = 5, 32
FACTS = CorpusFacts(61, 60, LENGTH)
MODEL = ConfigModel(
    config={
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
)
# How the five rows are split: parallelism, and rows per forward pass.
CASES = [("ddp", 5), ("ddp", 1), ("fsdp2", 5), ("fsdp2", 1)]


def rows_of_rank(rank: int, world_size: int) -> tuple[SimpleNamespace, int]:
    """Return a rank's rows of one batch, and the labels of the whole batch."""
    generator = np.random.default_rng(4)
    tokens = generator.integers(0, 61, (ROWS, LENGTH)).astype(np.uint16)
    starts = [np.unique(generator.integers(0, LENGTH, 3)) for _ in range(ROWS)]
    labels = sum(LENGTH - 1 - int((row > 0).sum()) for row in starts)
    part = slice(ROWS * rank // world_size, ROWS * (rank + 1) // world_size)
    offsets = np.cumsum([0, *(len(row) for row in starts[part])])
    row_starts = offsets, np.concatenate(starts[part])
    own = SimpleNamespace(tokens=tokens[part], row_starts=row_starts)
    return own, labels


def one_step(
    world: World, parallel: str, micro_batch_rows: int, directory: Path, optimizer: str = "adamw"
) -> dict[str, Any]:
    """Return gradients, clipped norm, updated weights and loss sums of one step."""
    config = TrainConfig.model_validate(
        {"steps": 2, "parallel": parallel, "lr": 0.01, "optimizer": optimizer}
    )
    loss = PackedLoss(build_model(MODEL, FACTS, seed=3), linear_head=True)
    replica = place_model(loss, config, world, bf16=False)
    trained = build_optimizer(replica.model, config, sharded=replica.sharded)
    metrics = StepMetrics(2, world)
    rows, labels = rows_of_rank(world.rank, world.size)
    count = count_micro_batches(max_rows_per_rank(ROWS, world.size), micro_batch_rows)
    for index, micro in enumerate(micro_batches(rows, count, world.device)):
        with replica.accumulating(last=index == count - 1):
            nats, each = replica.module(micro.tokens_BL, micro.positions_BL, micro.labels_BL)
            (nats * (replica.gradient_scale / labels)).backward()
        metrics.add(micro, np.zeros(len(rows.tokens), dtype=np.int32), each)
    sums = metrics.start(checkpoint=world.rank == 0, stop=world.rank == 1).result()
    norm = clip_gradients(replica.model.parameters(), 0.05)
    named = dict(replica.model.model.named_parameters())
    gradients = full_tensors(
        {name: p.grad for name, p in named.items() if p.grad is not None}, world
    )
    trained.step()
    save_checkpoint(
        directory, replica, trained, state(world), tokenizer_path="no/tokenizer", keep=1
    )
    restored = build_optimizer(replica.model, config, sharded=replica.sharded)
    if world.size > 1:
        torch.distributed.barrier()
    load_optimizer(directory / "step-00000001", replica, restored)
    moments = {
        f"{name}.{key}": restored.state[parameter][key] - value
        for name, parameter in named.items()
        for key, value in trained.state[parameter].items()
    }
    return {
        "gradients": gradients,
        "weights": full_tensors(named, world),
        "moment_errors": full_tensors(moments, world),
        "norm": norm,
        "sums": (sums.loss, sums.labels_D.tolist(), sums.checkpoint, sums.stop),
    }


def poisoned_step(world: World, parallel: str) -> dict[str, Any]:
    """Return what a step with a NaN in rank 1's loss alone does, and what a NaN in its weights."""
    config = TrainConfig.model_validate({"steps": 2, "parallel": parallel, "lr": 0.01})
    loss = PackedLoss(build_model(MODEL, FACTS, seed=3), linear_head=True)
    replica = place_model(loss, config, world, bf16=False)
    trained = build_optimizer(replica.model, config, sharded=replica.sharded)
    named = dict(replica.model.model.named_parameters())
    before = full_tensors(named, world)
    rows, labels = rows_of_rank(world.rank, world.size)
    (micro,) = micro_batches(rows, 1, world.device)
    nats, _ = replica.module(micro.tokens_BL, micro.positions_BL, micro.labels_BL)
    scale = float("nan") if world.rank == 1 else 1.0
    (nats * (scale * replica.gradient_scale / labels)).backward()
    step_if_finite(trained, clip_gradients(replica.model.parameters(), 1.0))
    after = full_tensors(named, world)
    healthy = non_finite(named, world)
    if world.rank == 1:
        with torch.no_grad():
            tensor = own_part(named["model.norm.weight"])
            tensor[-1] = float("nan")
    bad = non_finite(named, world)
    return {
        "unchanged": all(torch.equal(before[name], after[name]) for name in before),
        "healthy": healthy,
        "bad": bad,
    }


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter that this rank has."""
    return parameter.to_local() if is_sharded(parameter) else parameter


def state(world: World) -> TrainingState:
    return TrainingState(
        step=1,
        sampler={},
        controller=None,
        corpus_fingerprint="",
        recipe_hash="",
        world_size=world.size,
        micro_batch_rows=1,
        seed=0,
        tokens={},
        window={},
    )


def on_each_rank(world: World, directory: Path) -> dict[Any, Any]:
    results: dict[Any, Any] = {
        (parallel, rows): one_step(world, parallel, rows, directory / f"{parallel}{rows}")
        for parallel, rows in CASES
    }
    for parallel in ("ddp", "fsdp2"):
        results["muon", parallel] = one_step(world, parallel, 5, directory / parallel, "muon")
        results["poisoned", parallel] = poisoned_step(world, parallel)
    return {**results, "agreed": world.broadcast({"rank": world.rank})}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return results_of_ranks(
        "tests.integration.training.test_two_ranks", tmp_path_factory.mktemp("ranks")
    )


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return one_step(World(), "ddp", ROWS, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_split_gives_one_gradient_and_update(
    case: tuple[str, int], two_ranks: dict[Any, Any], one_rank: dict[str, Any]
) -> None:
    actual = two_ranks[case]
    for what in ("gradients", "weights"):
        assert actual[what].keys() == one_rank[what].keys()
        for name, expected in one_rank[what].items():
            torch.testing.assert_close(actual[what][name], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual["norm"], one_rank["norm"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_and_wishes_reach_every_rank(
    case: tuple[str, int], two_ranks: dict[Any, Any], one_rank: dict[str, Any]
) -> None:
    loss, labels, checkpoint, stop = two_ranks[case]["sums"]
    assert loss == pytest.approx(one_rank["sums"][0], abs=1e-4)
    assert labels == one_rank["sums"][1]
    assert (checkpoint, stop) == (True, False)  # rank 1 may wish what it likes


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_muon_orthogonalizes_whole_matrices_where_they_are_sharded(
    parallel: str, two_ranks: dict[Any, Any], tmp_path: Path
) -> None:
    before = build_model(MODEL, FACTS, seed=3)
    expected = one_step(World(), "ddp", ROWS, tmp_path, "muon")["weights"]
    for name, weight in before.named_parameters():
        update = expected[name] - weight.detach()
        error = two_ranks["muon", parallel]["weights"][name] - expected[name]
        # Muon multiplies in bfloat16, so ranks that add in another order differ by some percent.
        assert error.norm() <= 0.1 * update.norm()


@pytest.mark.parametrize("case", [*CASES, ("muon", "ddp"), ("muon", "fsdp2")], ids=str)
def test_optimizer_state_survives_sharding(
    case: tuple[str, int], two_ranks: dict[Any, Any]
) -> None:
    assert all(not error.any() for error in two_ranks[case]["moment_errors"].values())


def test_rank_0_speaks_for_all(two_ranks: dict[Any, Any]) -> None:
    assert two_ranks["agreed"] == {"rank": 0}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_what_is_not_finite_on_one_rank_is_seen_by_all(
    parallel: str, two_ranks: dict[Any, Any]
) -> None:
    seen = two_ranks["poisoned", parallel]
    assert seen == {"unchanged": True, "healthy": [], "bad": ["model.norm.weight"]}


if __name__ == "__main__":
    on_two_ranks(on_each_rank)
