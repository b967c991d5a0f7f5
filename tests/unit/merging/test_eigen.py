"""Eigenvectors of symmetric matrices: LAPACK's steps one by one against what is known of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymix.merging.methods.eigen import (
    MIN_STEPWISE_ROWS,
    eigh,
    eigh_in_steps,
    single_threaded_blas,
)

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def check(matrix: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Assert that the vectors are orthonormal and the matrix's own, to rounding, in order."""
    n, scale = len(matrix), float(matrix.norm())
    rounding = 1e-15 * (10 + n**0.5)
    assert values.shape == (n,)
    assert bool((values.diff() >= 0).all())
    assert float((vectors.T @ vectors - torch.eye(n, dtype=F64)).norm()) <= rounding * n**0.5
    assert float((matrix @ vectors - vectors * values).norm()) <= rounding * scale


def wilkinson(size: int, count: int) -> Tensor:
    """Return blocks whose largest eigenvalues agree in pairs to the last digit."""
    away = torch.arange(size, dtype=F64).sub(size // 2).abs()
    beside = torch.ones(size - 1, dtype=F64)
    block = torch.diag(away) + torch.diag(beside, 1) + torch.diag(beside, -1)
    return torch.block_diag(*[block] * count)


@pytest.mark.parametrize(
    "matrix",
    [
        random(300, 5) @ random(300, 5).T,
        torch.block_diag(torch.zeros(90, 90, dtype=F64), random(200, 9) @ random(200, 9).T),
        torch.diag(random(250)[:, None].abs().flatten()),
        torch.eye(200, dtype=F64),
        torch.zeros(193, 193, dtype=F64),
        torch.ones(260, 260, dtype=F64),
        wilkinson(21, 12),
        1e-150 * torch.ones(30, 30, dtype=F64),
        1e150 * torch.ones(30, 30, dtype=F64),
    ],
    ids=["low-rank", "frozen-rows", "diagonal", "eye", "zero", "ones", "pairs", "tiny", "huge"],
)
def test_of_matrices_with_equal_eigenvalues(matrix: Tensor) -> None:
    check(matrix, *eigh_in_steps(matrix.clone()))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 420), st.integers(1, 500), st.integers(0, 99))
def test_of_gram_matrices(n: int, columns: int, seed: int) -> None:
    part = random(n, columns, seed=seed)
    matrix = part @ part.T
    values, vectors = eigh_in_steps(matrix.clone())
    check(matrix, values, vectors)
    exact = torch.linalg.eigvalsh(matrix)
    assert float((values - exact).abs().max()) <= 1e-13 * float(exact[-1])


def test_of_a_large_matrix_it_reads_the_lower_triangle_only() -> None:
    part = random(MIN_STEPWISE_ROWS, 40)
    matrix = part @ part.T + torch.diag(torch.linspace(0, 1, MIN_STEPWISE_ROWS, dtype=F64))
    marked = matrix.tril() + torch.full_like(matrix, torch.nan).triu(1)
    check(matrix, *eigh(marked))


def test_of_a_small_or_single_precision_one_too() -> None:
    matrix = random(12, 30) @ random(12, 30).T
    matrix += matrix.T.clone()
    check(matrix, *eigh(matrix.clone()))
    values, vectors = eigh(matrix.float())
    assert vectors.dtype == torch.float32
    assert torch.allclose(values.double(), torch.linalg.eigvalsh(matrix), rtol=1e-4, atol=1e-4)
    empty_values, empty_vectors = eigh(torch.zeros(0, 0, dtype=F64))
    assert (len(empty_values), empty_vectors.shape) == (0, (0, 0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_has_none(bad: float) -> None:
    matrix = torch.eye(50, dtype=F64)
    matrix[30, 10] = bad
    with pytest.raises(torch.linalg.LinAlgError, match="eigh"):
        eigh_in_steps(matrix)


def test_threads_find_the_same_bits_at_a_time() -> None:
    matrices = [random(200, 250, seed=seed) for seed in range(4)]
    matrices = [part @ part.T for part in matrices]
    with single_threaded_blas(), ThreadPoolExecutor(2) as pool:
        alone = [eigh_in_steps(matrix.clone()) for matrix in matrices]
        together = list(pool.map(lambda matrix: eigh_in_steps(matrix.clone()), matrices))
    for (values, vectors), (own_values, own_vectors) in zip(alone, together, strict=True):
        assert torch.equal(values, own_values)
        assert torch.equal(vectors, own_vectors)
