"""Attention over four ranks: what each computes of shared documents is what one would of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from raymix.context_parallel import (
    ContextParallelGroups,
    DocumentPart,
    LocalShards,
    attention,
    local_positions,
    register,
)
from raymix.context_parallel.local_shards import ExchangeName
from raymix.recipe import ConfigModel, TrainConfig
from raymix.schedule import CostModel, Layout, Placement, Schedule, plan_batch
from raymix.streaming.batches.step_batch import DocumentBatch, LocalDocument
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.loss import IGNORED, PackedLoss
from raymix.training.model.parallel import Replica, World, full_tensors, place_model
from raymix.training.step.documents import ContextParallel, document_micro_steps
from raymix.training.step.metrics import StepMetrics
from tests.support.attention import Case, dense_attention, random_case
from tests.support.ranks import on_ranks, results_of_ranks

RANKS = 4
CASES = 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
LENGTHS = (57, 3, 17, 1, 29, 8, 2, 12)
FACTS = CorpusFacts(61, 60, 64)
MODEL = ConfigModel(
    config={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
STEPS: list[tuple[str, ExchangeName, str, torch.dtype]] = [
    ("ddp", "gather", "by hand", torch.float32),
    ("ddp", "gather", "by hand", torch.float64),
    ("fsdp2", "gather", "by hand", torch.float32),
    ("fsdp2", "gather", "by hand", torch.float64),
    ("ddp", "ulysses", "by hand", torch.float64),
    ("fsdp2", "ulysses", "refine", torch.float32),
    ("ddp", "gather", "refine", torch.float64),
    ("ddp", "gather", "default", torch.float64),
    ("fsdp2", "gather", "packed", torch.float64),
]


def own_tokens(case: Case, shards: LocalShards, mine: list[int], rank: int) -> tuple[Any, Any]:
    """Return which tokens of all documents are in this rank's row, and which are no padding."""
    tokens, real = [], []
    for at in (mine[place] for place in shards.order):
        positions = local_positions(DocumentPart(case.lengths[at], case.teams[at]), rank)
        last = case.lengths[at] - 1
        tokens.append(case.begins()[at] + np.minimum(positions, last))
        real.append(positions <= last)
    if not tokens:
        return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.bool_)
    return np.concatenate(tokens), np.concatenate(real)


def errors(
    case: Case, exchange: ExchangeName, dtype: torch.dtype, rank: int, teams: ContextParallelGroups
) -> torch.Tensor:
    """Return the largest errors of output and gradients on this rank, shape (4,)."""
    mine = [at for at, team in enumerate(case.teams) if rank in team]
    parts = [DocumentPart(case.lengths[at], case.teams[at]) for at in mine]
    shards = LocalShards(parts, rank, teams, exchange=exchange)
    rows, grad = case.rows(dtype)
    for part in rows:
        part.requires_grad_()
    expected = dense_attention(rows, case.lengths)
    expected_grads = torch.autograd.grad(expected, rows, grad)
    tokens, real = own_tokens(case, shards, mine, rank)
    own = tuple(part.detach()[tokens].requires_grad_() for part in rows)
    out = attention(*own, shards)
    # What is padding has no part in any loss.
    grads = torch.autograd.grad(out, own, grad[tokens] * torch.from_numpy(real)[:, None, None])
    pairs = [(out, expected), *zip(grads, expected_grads, strict=True)]
    largest = [
        (left - right[tokens])[real].abs().max() if real.any() else 0.0 for left, right in pairs
    ]
    return torch.tensor([float(error) for error in largest])


def documents() -> list[LocalDocument]:
    """Return a batch of documents of very unequal lengths, of some only the answers learned."""
    generator = np.random.default_rng(7)
    batch = []
    for number, length in enumerate(LENGTHS):
        loss_mask = generator.random(length) < 0.4 if number % 2 else None
        tokens = generator.integers(0, FACTS.vocab_size, length).astype(np.uint16)
        batch.append(LocalDocument(number % 3, (0,), tokens, loss_mask))
    return batch


def planned(name: str) -> Schedule:
    """Return a schedule by a planner; or one by hand, in which rank 3 has nothing at all."""
    layout, lengths = Layout(2, 2), np.array(LENGTHS)
    cost = CostModel(quadratic_s=1e-2, linear_s=1.0, memory_tokens=40)
    if name != "by hand":
        return plan_batch(lengths, layout, cost, name)
    micro, first, width = np.array(
        [(0, 0, 2), (0, 1, 1), (1, 0, 1), (2, 2, 1), (1, 0, 2), (0, 2, 1), (0, 0, 1), (1, 0, 1)]
    ).T
    return Schedule.build(name, lengths, Placement(micro, first, width), layout, cost)


def labels_of(document: LocalDocument) -> int:
    loss_mask = (
        np.ones(len(document.tokens), np.bool_)
        if document.loss_mask is None
        else document.loss_mask
    )
    return int(loss_mask[1:].sum())


def model_of(dtype: torch.dtype, parallel: str, world: World) -> Replica:
    model = build_model(MODEL, FACTS, seed=3)
    model.set_attn_implementation(register() if world.size > 1 else "sdpa")
    loss = PackedLoss(model.to(dtype), linear_head=True)
    config = TrainConfig.model_validate({"steps": 2, "parallel": parallel})
    return place_model(loss, config, world, bf16=False)


def alone(dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one process that sees one document after the other."""
    replica = model_of(dtype, "ddp", World())
    labels, nats = sum(map(labels_of, documents())), 0.0
    for document in documents():
        tokens = torch.from_numpy(document.tokens.astype(np.int64))[None]
        following = torch.full_like(tokens, IGNORED)
        following[:, :-1] = tokens[:, 1:]
        if document.loss_mask is not None:
            following[:, :-1][:, ~document.loss_mask[1:]] = IGNORED
        loss, _ = replica.module(tokens, torch.arange(tokens.shape[1])[None], following)
        (loss / labels).backward()
        nats += float(loss.detach())
    named = replica.model.model.named_parameters()
    return nats, {name: p.grad for name, p in named if p.grad is not None}


def step_error(
    world: World, teams: ContextParallelGroups, case: tuple[str, ExchangeName, str, torch.dtype]
) -> Any:
    """Return the errors of loss, gradients and labels of one step on all ranks."""
    parallel, exchange, planner, dtype = case
    replica = model_of(dtype, parallel, world)
    every, schedule = documents(), planned(planner)
    mine = tuple(
        tuple(replace(every[k], ranks=(world.rank,)) for k in micro.local)
        + tuple(replace(every[shard.sequence], ranks=shard.ranks) for shard in micro.sharded)
        for micro in schedule.micro_batches(world.rank)
    )
    batch = DocumentBatch(0, 0, np.zeros(3), np.zeros(3, np.int64), None, mine)
    how = ContextParallel(world.rank, teams, exchange)
    metrics, count = StepMetrics(3, world), len(mine)
    labels = sum(map(labels_of, every))
    for index, one in enumerate(document_micro_steps(batch, how, world.device)):
        with replica.accumulating(last=index == count - 1), one.attending():
            micro = one.micro
            nats, each = replica.module(micro.tokens_BL, micro.positions_BL, micro.labels_BL)
            (nats * (replica.gradient_scale / labels)).backward()
        metrics.add(micro, one.domains, each)
    sums = metrics.start(checkpoint=False, stop=False).result()
    named = dict(replica.model.model.named_parameters())
    gradients = full_tensors(
        {name: p.grad for name, p in named.items() if p.grad is not None}, world
    )
    if not world.is_writer:
        return None
    nats, expected = alone(dtype)
    assert gradients.keys() == expected.keys()
    worst = max(float((gradients[name] - expected[name]).abs().max()) for name in expected)
    by_domain = [sum(labels_of(d) for d in every if d.domain == at) for at in range(3)]
    return worst, sums.loss - nats, sums.labels_D.tolist() == by_domain


def on_each_rank(world: World, directory: Path) -> dict[Any, Any]:
    teams = ContextParallelGroups.of(Layout(1, RANKS, widths=(2,)))
    results: dict[Any, Any] = {}
    for dtype in TOLERANCE:
        for exchange in get_args(ExchangeName):
            for seed in range(CASES):
                worst = errors(random_case(seed, RANKS), exchange, dtype, world.rank, teams)
                torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
                results[str(dtype), exchange, seed] = float(worst.max())
    for case in STEPS:
        results[case] = step_error(world, teams, case)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, float]:
    return results_of_ranks(
        "tests.integration.context_parallel.test_context_parallel", tmp_path_factory.mktemp("ranks")
    )


@pytest.mark.parametrize("exchange", get_args(ExchangeName))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_shared_documents_are_attended_to_as_if_whole(
    exchange: ExchangeName, dtype: torch.dtype, results: dict[Any, float]
) -> None:
    worst = {seed: results[str(dtype), exchange, seed] for seed in range(CASES)}
    assert max(worst.values()) < TOLERANCE[dtype], worst


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_any_schedule_gives_the_gradient_of_one_process(case: Any, results: dict[Any, Any]) -> None:
    gradients, nats, labels = results[case]
    exact = case[-1] == torch.float64
    assert gradients < (1e-10 if exact else 1e-5)
    assert abs(nats) < 1e-3
    assert labels


if __name__ == "__main__":
    on_ranks(RANKS, on_each_rank)
