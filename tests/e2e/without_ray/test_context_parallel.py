"""Attention over four ranks: what each computes of shared documents is what one would of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from raymix.parallel import Held, Part, Teams, attention, held_positions
from raymix.parallel.held import ExchangeName
from raymix.schedule import Layout
from raymix.train.parallel import World
from tests.attending import Case, dense_attention, random_case
from tests.ranks import found_by_ranks, on_ranks

RANKS = 4
CASES = 12
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def own_tokens(case: Case, held: Held, mine: list[int], rank: int) -> tuple[Any, Any]:
    """Return which tokens of all documents are in this rank's row, and which are no padding."""
    tokens, real = [], []
    for at in (mine[place] for place in held.order):
        positions = held_positions(Part(case.lengths[at], case.teams[at]), rank)
        last = case.lengths[at] - 1
        tokens.append(case.begins()[at] + np.minimum(positions, last))
        real.append(positions <= last)
    if not tokens:
        return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.bool_)
    return np.concatenate(tokens), np.concatenate(real)


def errors(
    case: Case, exchange: ExchangeName, dtype: torch.dtype, rank: int, teams: Teams
) -> torch.Tensor:
    """Return the largest errors of output and gradients on this rank, shape (4,)."""
    mine = [at for at, team in enumerate(case.teams) if rank in team]
    parts = [Part(case.lengths[at], case.teams[at]) for at in mine]
    held = Held(parts, rank, teams, exchange=exchange)
    rows, grad = case.rows(dtype)
    for part in rows:
        part.requires_grad_()
    expected = dense_attention(rows, case.lengths)
    expected_grads = torch.autograd.grad(expected, rows, grad)
    tokens, real = own_tokens(case, held, mine, rank)
    own = tuple(part.detach()[tokens].requires_grad_() for part in rows)
    out = attention(*own, held)
    # What is padding has no part in any loss.
    grads = torch.autograd.grad(out, own, grad[tokens] * torch.from_numpy(real)[:, None, None])
    pairs = [(out, expected), *zip(grads, expected_grads, strict=True)]
    found = [
        (left - right[tokens])[real].abs().max() if real.any() else 0.0 for left, right in pairs
    ]
    return torch.tensor([float(error) for error in found])


def on_each_rank(world: World, directory: Path) -> dict[Any, float]:
    teams = Teams.of(Layout(1, RANKS, widths=(2,)))
    found = {}
    for dtype in TOLERANCE:
        for exchange in get_args(ExchangeName):
            for seed in range(CASES):
                worst = errors(random_case(seed, RANKS), exchange, dtype, world.rank, teams)
                torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
                found[str(dtype), exchange, seed] = float(worst.max())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, float]:
    return found_by_ranks(
        "tests.e2e.without_ray.test_context_parallel", tmp_path_factory.mktemp("ranks")
    )


@pytest.mark.parametrize("exchange", get_args(ExchangeName))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_shared_documents_are_attended_to_as_if_whole(
    exchange: ExchangeName, dtype: torch.dtype, found: dict[Any, float]
) -> None:
    worst = {seed: found[str(dtype), exchange, seed] for seed in range(CASES)}
    assert max(worst.values()) < TOLERANCE[dtype], worst


if __name__ == "__main__":
    on_ranks(RANKS, on_each_rank)
