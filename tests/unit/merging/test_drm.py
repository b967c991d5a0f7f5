"""DRM against what is known in closed form, and against the published steps written out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymix.merging.methods.decompose import left_basis
from raymix.merging.methods.drm import DrmOptions, KnotsOptions, drm, knots
from raymix.merging.methods.entrywise import TiesOptions, ties
from raymix.merging.registry import Factors, Merged, get_method

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def separated(m: int, n: int, seed: int) -> Tensor:
    """Return a matrix with distinct singular values between 1 and 0.2."""
    u, _ = torch.linalg.qr(random(m, min(m, n), seed=seed))
    v, _ = torch.linalg.qr(random(n, min(m, n), seed=seed + 1000))
    return (u * torch.linspace(1, 0.2, min(m, n), dtype=F64)) @ v.T


def tasks(m: int = 12, n: int = 20, k: int = 3, seed: int = 0) -> list[Tensor]:
    return [separated(m, n, seed=seed + 10 * i) for i in range(k)]


def merged(deltas: Sequence[Tensor], **options: object) -> Tensor:
    result = drm(None, deltas, DrmOptions.model_validate({"rank_tolerance": 0.0, **options}))
    assert isinstance(result, Merged)
    return result.delta


def close(result: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    scale = max(1e-30, float(expected.norm()))
    return float((result - expected).norm()) <= tolerance * scale


def published(deltas: Sequence[Tensor], drop: float, tolerance: float = 1e-2) -> Tensor:
    """Return DRM-H by the steps of the paper: stack, SVD, split, renorm, prune, elect, average."""
    n = deltas[0].shape[1]
    u, sigma, vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    keep = sigma > tolerance * sigma[0]
    u, sigma, vh = u[:, keep], sigma[keep], vh[keep]
    blocks = vh.split(n, dim=1)
    norms = [block.norm(dim=1, keepdim=True) for block in blocks]
    unit = torch.stack([block / norm for block, norm in zip(blocks, norms, strict=True)])
    total = unit.numel()
    place = total - round(total * (1 - drop))
    lowest = unit.abs().flatten().kthvalue(place).values if place else torch.tensor(0.0)
    unit = unit * (unit.abs() >= lowest)
    x = torch.stack([(sigma[:, None] * norm) * v for norm, v in zip(norms, unit, strict=True)])
    sign = x.sum(0).sign()
    x = x * (x.sign() == sign)
    return u @ (x.sum(0) / (x != 0).sum(0).clamp_min(1))


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_01_identical_deltas_merge_to_themselves(direction: str) -> None:
    (delta,) = tasks(k=1)
    assert close(merged([delta] * 4, drop=0, direction=direction), delta, 1e-14)
    scaled = merged([delta] * 4, drop=0, direction=direction, weight=[0.3])
    assert close(scaled, 0.3 * delta, 1e-14)
    # Of 4 x 144 entries and of 144, the same are kept: no entry is tied at the threshold.
    pruned = merged([delta] * 4, drop=0.5, direction=direction)
    assert close(pruned, merged([delta], drop=0.5, direction=direction))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15), (40, 5)])
def test_02_one_task_without_drop_is_itself(shape: tuple[int, int]) -> None:
    delta = random(*shape)
    assert close(merged([delta], drop=0), delta)
    assert close(merged([delta], drop=0, direction="vertical"), delta)


def test_03_frozen_tasks_leave_their_budget_to_the_others() -> None:
    (delta,) = tasks(k=1)
    frozen = torch.zeros_like(delta)
    assert close(merged([delta, frozen, frozen], drop=0.5), delta)
    alone = merged([delta], drop=1 - 3 * (1 - 0.8))
    assert close(merged([delta, frozen, frozen], drop=0.8), alone, 2e-2)
    assert torch.isfinite(merged([frozen, delta, frozen], drop=0.8)).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_04_orthogonal_column_spaces_add_up(rank: int) -> None:
    u, _ = torch.linalg.qr(random(16, 3 * rank))
    sigma = torch.linspace(2, 1, rank, dtype=F64)
    deltas = [
        (u[:, k * rank : (k + 1) * rank] * sigma * (1 + k / 7)) @ random(rank, 24, seed=k + 1)
        for k in range(3)
    ]
    total = deltas[0] + deltas[1] + deltas[2]
    assert close(merged(deltas, drop=0, rank_tolerance=1e-2), total, 1e-11)
    assert not close(merged(deltas, drop=0, direction="vertical"), total, 0.1)
    single = [delta.float() for delta in deltas]
    assert close(merged(single, drop=0, rank_tolerance=1e-2).double(), total, 1e-5)


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.8])
def test_05_a_delta_and_its_opposite_cancel_exactly(drop: float) -> None:
    delta = random(12, 20)
    assert not merged([delta, -delta], drop=drop).any()
    assert not merged([delta.float(), -delta.float()], drop=drop).any()


@pytest.mark.parametrize("drop", [0.0, 0.7])
def test_06_equivariance(drop: float) -> None:
    deltas = tasks()
    plain = merged(deltas, drop=drop)
    rotation, _ = torch.linalg.qr(random(12, 12, seed=5))
    assert close(merged([rotation @ d for d in deltas], drop=drop), rotation @ plain, 1e-11)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert close(merged([d[:, order] for d in deltas], drop=drop), plain[:, order], 1e-11)
    flips = random(20, seed=9).sign()
    assert close(merged([d * flips for d in deltas], drop=drop), plain * flips, 1e-11)
    turned, _ = torch.linalg.qr(random(20, 20, seed=6))
    assert not close(merged([d @ turned for d in deltas], drop=drop), plain @ turned, 0.1)


@pytest.mark.parametrize("drop", [0.0, 0.7])
def test_07_duality_homogeneity_coefficients_and_order(drop: float) -> None:
    deltas = tasks()
    plain = merged(deltas, drop=drop)
    dual = merged([d.T for d in deltas], drop=drop, direction="vertical").T
    assert close(dual, plain)
    assert close(merged([2.5 * d for d in deltas], drop=drop), 2.5 * plain)
    assert close(merged(deltas, drop=drop, weight=[0.4] * 3), 0.4 * plain)
    assert close(merged(deltas[::-1], drop=drop), plain)


def test_08_of_one_row_it_is_ties_on_normalized_entries() -> None:
    deltas = [random(1, 50, seed=k) * (k + 1) for k in range(3)]
    unit = torch.stack([d / d.norm() for d in deltas])
    place = 150 - round(150 * (1 - 0.6))
    lowest = unit.abs().flatten().kthvalue(place).values
    trimmed = [d * (v.abs() >= lowest) for d, v in zip(deltas, unit, strict=True)]
    result = ties(None, trimmed, TiesOptions())
    assert isinstance(result, Merged)
    assert close(merged(deltas, drop=0.6), result.delta)


def test_08_without_drop_it_is_knots_of_density_one() -> None:
    deltas = tasks()
    result = knots(None, deltas, KnotsOptions(rank_tolerance=0.0))
    assert isinstance(result, Merged)
    assert close(merged(deltas, drop=0), result.delta)


def test_09_renormalizing_changes_only_what_is_pruned() -> None:
    deltas = tasks()
    assert torch.equal(merged(deltas, drop=0), merged(deltas, drop=0, renorm=False))
    assert not close(merged(deltas, drop=0.7), merged(deltas, drop=0.7, renorm=False), 0.01)


@pytest.mark.parametrize("drop", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("renorm", [True, False])
def test_09_the_kept_fraction_is_what_was_asked(drop: float, renorm: bool) -> None:
    deltas = tasks()
    result = drm(None, deltas, DrmOptions(drop=drop, renorm=renorm, rank_tolerance=0.0))
    assert isinstance(result, Merged)
    assert result.density is not None
    assert abs(result.density - (1 - drop)) <= 1.5 / (3 * 12 * 20)
    assert result.rank == 12


@pytest.mark.parametrize("direction", ["horizontal", "vertical", "auto"])
@pytest.mark.parametrize("name", ["drm", "knots"])
def test_10_factored_is_dense(direction: str, name: str) -> None:
    ranks = (4, 3, 5)
    factors = [
        Factors(random(30, r, seed=i), random(r, 22, seed=50 + i)) for i, r in enumerate(ranks)
    ]
    method = get_method(name)
    options = method.options.model_validate({"direction": direction})
    assert method.factored is not None
    low = method.factored(factors, options)
    dense = method.function(None, [f.dense() for f in factors], options)
    assert isinstance(dense, Merged)
    assert close(low.dense(), dense.delta, 1e-10)
    assert low.left.shape[1] == low.right.shape[0] <= sum(ranks)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (40, 6)])
@pytest.mark.parametrize("drop", [0.0, 0.8])
def test_11_gram_is_svd_is_the_published_algorithm(shape: tuple[int, int], drop: float) -> None:
    deltas = tasks(*shape)
    by_gram = merged(deltas, drop=drop, rank_tolerance=1e-2)
    assert close(
        by_gram, merged(deltas, drop=drop, rank_tolerance=1e-2, decomposition="svd"), 1e-10
    )
    assert close(by_gram, published(deltas, drop), 1e-10)
    across = published([d.T for d in deltas], drop).T
    assert close(
        merged(deltas, drop=drop, rank_tolerance=1e-2, direction="vertical"), across, 1e-10
    )


def test_12_a_layer_frozen_in_all_tasks_stays() -> None:
    frozen = [torch.zeros(6, 9, dtype=F64)] * 3
    assert not merged(frozen, drop=0.8).any()
    assert not merged(frozen, drop=0.0, direction="vertical").any()


def test_election_can_be_switched_off_for_matrices() -> None:
    deltas = tasks()
    mean = sum(deltas[1:], deltas[0]) / 3
    assert close(merged(deltas, drop=0, elect=False), mean)
    assert not close(merged(deltas, drop=0), mean, 0.01)


def test_coefficients_and_signs_count_without_drop() -> None:
    deltas = tasks(k=2)
    weighed = merged(deltas, drop=0, weight=[1.0, 0.0])
    assert not close(weighed, merged(deltas, drop=0), 0.01)
    # A task of weight 0 still votes, and is not counted in the mean.
    assert not close(weighed, deltas[0], 1e-3)


def test_a_tiny_drop_of_a_small_matrix() -> None:
    deltas = tasks(3, 4, k=2)
    assert close(merged(deltas, drop=1e-6), merged(deltas, drop=0))


def test_auto_takes_the_cheaper_side() -> None:
    wide, tall = tasks(8, 14), tasks(14, 8)
    assert torch.equal(merged(wide, direction="auto"), merged(wide, direction="horizontal"))
    assert torch.equal(merged(tall, direction="auto"), merged(tall, direction="vertical"))


def test_randomized_is_right_for_low_rank_only() -> None:
    low = [random(30, 3, seed=k) @ random(3, 40, seed=9 + k) for k in range(3)]
    exact = merged(low, rank_tolerance=1e-2)
    result = merged(low, decomposition="randomized", rank=9, rank_tolerance=1e-2)
    assert close(result, exact, 1e-8)
    full = [random(30, 40, seed=k) for k in range(3)]
    assert not close(merged(full, decomposition="randomized", rank=9), merged(full), 0.3)


@given(
    m=st.integers(1, 9), n=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 10_000),
    drop=st.floats(0, 1), rows=st.booleans(),
)  # fmt: skip
@settings(max_examples=60)
def test_any_shape_gives_finite_results_within_the_tasks_span(
    m: int, n: int, k: int, seed: int, drop: float, rows: bool
) -> None:
    deltas = [random(m, n, seed=seed + i) for i in range(k)]
    deltas[0][seed % m] = 0
    direction = "vertical" if rows else "horizontal"
    result = merged(deltas, drop=drop, direction=direction)
    assert torch.isfinite(result).all()
    # The mean over agreeing tasks has at most the largest coordinate of any task.
    assert float(result.norm()) <= sum(float(d.norm()) for d in deltas) * (1 + 1e-9)


def test_the_basis_spans_the_columns() -> None:
    deltas = tasks()
    u, sigma = left_basis(deltas)
    exact = torch.linalg.svdvals(torch.cat(deltas, dim=1))
    assert torch.allclose(sigma, exact, rtol=1e-10)
    assert close(u @ (u.T @ deltas[1]), deltas[1], 1e-10)
