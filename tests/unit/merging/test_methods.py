"""Entry-wise, spherical and spectral merges against their definitions written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.methods.drm import KnotsOptions, knots
from raymix.merging.methods.order_statistics import (
    kth_largest_magnitude,
    order_statistics,
    zero_above,
    zero_below,
)
from raymix.merging.methods.sign_election import agreeing_mean
from raymix.merging.methods.spectral import orthogonalized
from raymix.merging.registry import Deltas, Factors, Merged, get_method

F64 = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def merged(name: str, deltas: Sequence[Tensor], **options: Any) -> Tensor:
    return outcome(name, deltas, **options).delta


def outcome(name: str, deltas: Sequence[Tensor], **options: Any) -> Merged:
    method = get_method(name)
    result = method.function(None, deltas, method.options.model_validate(options))
    return result if isinstance(result, Merged) else Merged(result)


def close(result: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return float((result - expected).norm()) <= tolerance * max(1e-30, float(expected.norm()))


def tasks(k: int = 3, m: int = 10, n: int = 14) -> list[Tensor]:
    return [random(m, n, seed=i) for i in range(k)]


def test_linear_and_task_arithmetic() -> None:
    a, b = tasks(2)
    assert close(merged("linear", [a, b], weight=[1, 3]), (a + 3 * b) / 4)
    assert close(merged("linear", [a, b], weight=[1, 3], normalize=False), a + 3 * b)
    assert close(merged("task_arithmetic", [a, b], weight=[1, 3]), a + 3 * b)
    options = {"weight": [1, 3], "normalize": True, "lambda": 0.5}
    assert close(merged("task_arithmetic", [a, b], **options), (a + 3 * b) / 8)


def by_hand(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return TIES' merge by its definition."""
    surviving = []
    for delta in deltas:
        count = max(1, int(density * delta.numel()))
        lowest = delta.abs().flatten().sort(descending=True).values[count - 1]
        surviving.append(torch.where(delta.abs() >= lowest, delta, 0.0))
    weighted = torch.stack([w * d for w, d in zip(weights, surviving, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agreeing = weighted.sign() == sign
    divisor = (torch.tensor(weights, dtype=F64)[:, None, None] * agreeing).sum(0)
    return (weighted * agreeing).sum(0) / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.001])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 1.2, 0.5), (1.0, -0.4, 0.7)])
def test_ties_is_its_definition(density: float, weights: tuple[float, ...]) -> None:
    deltas = tasks()
    result = outcome("ties", deltas, weight=weights, density=[density])
    assert close(result.delta, by_hand(deltas, weights, density))
    if density < 1:
        assert result.density == pytest.approx(max(1, int(density * 140)) / 140)


def test_ties_keeps_all_ties_and_says_how_many() -> None:
    delta = torch.tensor([[3.0, -2.0, 2.0, 2.0, 1.0, 0.0]], dtype=F64)
    result = outcome("ties", [delta], density=[0.4])
    assert torch.equal(result.delta, torch.tensor([[3.0, -2.0, 2.0, 2.0, 0.0, 0.0]], dtype=F64))
    assert result.density == pytest.approx(4 / 6)
    assert not merged("ties", [delta], density=[0.0]).any()


def test_one_task_of_full_density_is_itself() -> None:
    (delta,) = tasks(1)
    for name in ("ties", "dare_ties", "dare_linear", "della", "breadcrumbs", "task_arithmetic"):
        assert torch.equal(merged(name, [delta]), delta)
    assert torch.equal(merged("linear", [delta], weight=[2]), delta)
    assert torch.equal(merged("multislerp", [delta]), delta)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_random_drops_are_unbiased_and_repeatable(name: str) -> None:
    delta = random(300, 400)
    options: dict[str, Any] = {"density": [0.4], "rescale_to": "density"}
    if name == "della_linear":
        options["epsilon"] = [0.0001]
    result = outcome(name, [delta], **options)
    assert result.density is not None
    assert abs(result.density - 0.4) < 0.01
    surviving = result.delta != 0
    assert close(result.delta[surviving], delta[surviving] / 0.4)
    assert torch.equal(result.delta, merged(name, [delta], **options))
    assert not torch.equal(result.delta, merged(name, [delta], seed=1, **options))


def test_rescaling_to_the_l1_norm() -> None:
    delta = random(30, 40)
    for name in ("dare_linear", "della_linear"):
        result = merged(name, [delta], density=[0.5])
        assert float(result.abs().sum()) == pytest.approx(float(delta.abs().sum()))
    plain = merged("dare_linear", [delta], density=[0.5], rescale=False)
    assert torch.equal(plain, torch.where(plain != 0, delta, 0.0))


def test_della_keeps_large_entries_more_often() -> None:
    delta = random(400, 100)
    surviving = merged("della_linear", [delta], density=[0.5], epsilon=[0.4]) != 0
    rank = delta.abs().argsort(dim=1).argsort(dim=1)
    assert float(surviving[rank >= 90].double().mean()) > 0.8
    assert float(surviving[rank < 10].double().mean()) < 0.2
    assert not merged("della_linear", [delta], density=[0.0], epsilon=[0.0]).any()


def test_breadcrumbs_cuts_both_ends() -> None:
    delta = torch.arange(1.0, 101.0, dtype=F64)[None, :]
    result = merged("breadcrumbs", [delta], density=[0.5], gamma=[0.1])
    assert torch.equal(result.nonzero()[:, 1], torch.arange(40, 90))
    few = merged("breadcrumbs", [delta], density=[0.95], gamma=[0.1])
    assert torch.equal(few.nonzero()[:, 1], torch.arange(0, 95))
    assert not merged("breadcrumbs_ties", [delta], density=[0.0]).any()


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.data())
@settings(max_examples=60)
def test_thresholds_are_exact(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    count = data.draw(st.integers(1, len(values)))
    lowest, at_least = kth_largest_magnitude(Deltas([tensor]), 0, count)
    magnitudes = sorted((abs(v) for v in tensor.tolist()), reverse=True)
    assert lowest == magnitudes[count - 1]
    assert at_least == sum(m >= lowest for m in magnitudes)
    expected = torch.where(tensor.abs() >= lowest, tensor, 0.0)
    assert torch.equal(zero_below(tensor, lowest), expected)
    capped = torch.where(tensor.abs() <= lowest, tensor, 0.0)
    assert torch.equal(zero_above(tensor, lowest), capped)
    assert order_statistics(tensor.clone(), 0, -1) == [min(values), max(values)]


def test_deltas_read_by_chunks_are_whole() -> None:
    parts = [random(700, 300, seed=k, dtype=torch.float32).bfloat16() for k in range(3)]
    deltas = Deltas(parts[1:], parts[0])
    for k in (0, 1):
        whole = deltas[k]
        assert torch.equal(whole, parts[k + 1].float() - parts[0].float())
        chunks = list(deltas.chunks())
        assert len(chunks) > 2
        assert torch.equal(torch.cat([deltas.chunk(k, rows) for rows in chunks]), whole)
    stack = Deltas([part.view(7, 100, 300) for part in parts[1:]], parts[0].view(7, 100, 300))
    assert torch.equal(next(stack.unstack())[1], deltas[1][:100])


def test_exact_cancellation_takes_the_majoritys_sign() -> None:
    x = [torch.tensor([[1.0, 2.0, 5.0, 0.0]]), torch.tensor([[-1.0, 2.0, 4.0, 0.0]])]
    out = torch.empty(1, 4)
    agreeing_mean(lambda k, rows: x[k][rows], [slice(0, 1)], out, [1.0, 1.0])
    assert out.tolist() == [[1.0, 2.0, 4.5, 0.0]]
    agreeing_mean(lambda k, rows: -x[k][rows], [slice(0, 1)], out, [1.0, 1.0])
    assert out.tolist() == [[-1.0, -2.0, -4.5, 0.0]]


def test_slerp_walks_the_arc() -> None:
    a, b = random(8, 8), random(8, 8, seed=1)
    assert close(merged("slerp", [a, b], t=0), a)
    assert close(merged("slerp", [a, b], t=1), b)
    unit = [x / x.norm() for x in (a, b)]
    middle = merged("slerp", unit, t=0.5)
    assert float(middle.norm()) == pytest.approx(1)
    assert float((middle * unit[0]).sum()) == pytest.approx(float((middle * unit[1]).sum()))
    assert close(merged("slerp", [a, 2 * a], t=0.25), 1.25 * a)
    assert not merged("slerp", [0 * a, 0 * a], t=0.25).any()


def test_multislerp_of_two_is_slerp() -> None:
    a, b = random(6, 9), random(6, 9, seed=1)
    unit = [x / x.norm() for x in (a, b)]
    assert close(merged("multislerp", unit), merged("slerp", unit, t=0.5), 1e-6)
    assert close(merged("multislerp", [a, a, a]), a, 1e-6)
    assert close(merged("multislerp", [a, -a]), 0 * a)
    with pytest.raises(MergeError, match="cancel"):
        merged("multislerp", [a, -a, a, -a])


def test_model_stock_is_its_ratio() -> None:
    deltas = tasks(3)
    flat = torch.stack([d.flatten() for d in deltas])
    cosines = [
        float(torch.cosine_similarity(flat[i], flat[j], dim=0)) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    cosine = sum(cosines) / 3
    expected = 3 * cosine / (1 + 2 * cosine) * flat.mean(0).view(10, 14)
    assert close(merged("model_stock", deltas), expected)
    (delta,) = tasks(1)
    assert close(merged("model_stock", [delta, delta]), delta)
    assert not merged("model_stock", [delta, -delta], filter_wise=True).any()
    rows = merged("model_stock", deltas, filter_wise=True)
    first = merged("model_stock", [d[:1] for d in deltas])
    assert close(rows[:1], first)


def test_iso_c_flattens_the_sums_spectrum() -> None:
    deltas = tasks(3)
    u, sigma, vh = torch.linalg.svd(sum(deltas[1:], deltas[0]), full_matrices=False)
    assert close(merged("iso_c", deltas), sigma.mean() * u @ vh, 1e-9)
    values = torch.linalg.svdvals(merged("iso_c", deltas, **{"lambda": 2}))
    assert torch.allclose(values, 2 * sigma.mean().expand(10))


def test_iso_cts_keeps_common_and_own_directions() -> None:
    deltas = tasks(2, 20, 30)
    values = torch.linalg.svdvals(merged("iso_cts", deltas, common=0.8))
    assert torch.allclose(values, values[0].expand(20))
    assert close(merged("iso_cts", deltas, common=1.0), merged("iso_c", deltas), 1e-9)


def test_tsv_keeps_each_tasks_largest_directions() -> None:
    (delta,) = tasks(1)
    assert close(merged("tsv", [delta]), delta, 1e-9)
    # Tasks in orthogonal spaces on both sides do not disturb each other.
    u, _ = torch.linalg.qr(random(12, 6))
    v, _ = torch.linalg.qr(random(15, 6, seed=1))
    parts = [(u[:, k : k + 3] * torch.tensor([3.0, 2, 1])) @ v[:, k : k + 3].T for k in (0, 3)]
    assert close(merged("tsv", parts), parts[0] + parts[1], 1e-9)


def test_tsv_is_its_definition() -> None:
    deltas = tasks(2, 9, 12)
    surviving = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    u = torch.cat([part[0][:, :4] for part in surviving], dim=1)
    s = torch.cat([part[1][:4] for part in surviving])
    v = torch.cat([part[2][:4] for part in surviving]).T
    p, _, q = torch.linalg.svd(u, full_matrices=False)
    x, _, y = torch.linalg.svd(v, full_matrices=False)
    assert close(merged("tsv", deltas), (p @ q) @ torch.diag(s) @ (x @ y).T, 1e-9)


def test_orthogonalized_columns() -> None:
    columns = random(20, 6)
    result = orthogonalized(columns)
    assert close(result.T @ result, torch.eye(6, dtype=F64))
    dependent = torch.cat([columns, columns[:, :2]], dim=1)
    result = orthogonalized(dependent)
    assert torch.isfinite(result).all()
    assert int(torch.linalg.matrix_rank(result)) == 6


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts"])
def test_spectral_merges_turn_with_their_tasks(name: str) -> None:
    deltas = tasks(2, 10, 14)
    left, _ = torch.linalg.qr(random(10, 10, seed=7))
    right, _ = torch.linalg.qr(random(14, 14, seed=8))
    turned = merged(name, [left @ d @ right for d in deltas])
    assert close(turned, left @ merged(name, deltas) @ right, 1e-8)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "task_arithmetic", "linear"])
def test_low_rank_tasks_merge_as_factors(name: str) -> None:
    factors = [Factors(random(30, r, seed=r), random(r, 24, seed=9 + r)) for r in (3, 4)]
    method = get_method(name)
    options = method.options.model_validate({"weight": [0.7, 0.7]})
    assert method.factored is not None
    low = method.factored(factors, options)
    dense = method.function(None, [f.dense() for f in factors], options)
    expected = dense.delta if isinstance(dense, Merged) else dense
    assert close(low.dense(), expected, 1e-8)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "drm", "knots"])
def test_spectral_merges_of_nothing(name: str) -> None:
    frozen = [torch.zeros(5, 8, dtype=F64)] * 2
    assert not merged(name, frozen).any()
    (delta,) = tasks(1)
    assert torch.isfinite(merged(name, [delta, 0 * delta])).all()


def test_knots_prunes_each_task_by_itself() -> None:
    deltas = tasks(2)
    loud = [deltas[0], 100 * deltas[1]]
    result = knots(None, loud, KnotsOptions(density=(0.3,)))
    assert isinstance(result, Merged)
    assert result.density == pytest.approx(0.3, abs=0.01)
    half = merged("knots", deltas, **{"lambda": 0.5})
    assert close(half, 0.5 * merged("knots", deltas))
    flipped = merged("knots", [d.T for d in deltas], density=[0.3], direction="vertical").T
    assert close(flipped, merged("knots", deltas, density=[0.3]), 1e-10)


def test_options_have_one_value_per_model() -> None:
    with pytest.raises(MergeError, match="2 values for 3 models"):
        merged("ties", tasks(3), weight=[1, 2])
    with pytest.raises(MergeError, match="different shapes"):
        merged("ties", [random(2, 3), random(3, 2)])
    with pytest.raises(MergeError, match="no task"):
        merged("ties", [])


def test_the_gram_path_agrees_with_svd_on_dense_spectra() -> None:
    """What the docs say of realistic deltas: noise of full rank over a decaying part."""
    deltas = []
    for k in range(3):
        left = random(160, 12, seed=k) * torch.logspace(0, -1.5, 12, dtype=F64)
        deltas.append(
            left @ random(12, 240, seed=9 + k) * 0.2 + random(160, 240, seed=20 + k) * 0.3
        )
    single = [delta.float() for delta in deltas]
    exact = merged("drm", single, decomposition="svd")
    assert close(merged("drm", single), exact, 1e-3)
    assert close(merged("drm", deltas), merged("drm", deltas, decomposition="svd"), 1e-9)
    assert math.isfinite(float(np.float32(exact.norm())))
