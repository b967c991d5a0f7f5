"""Shared column spaces of several matrices, without the large SVD.

The left singular vectors of [D_1 | ... | D_K] are the eigenvectors of G = sum_k D_k D_k^T (m, m),
which is accumulated task by task: no stack of K matrices, no right factor. Squaring the condition
number costs little, since directions below the rank tolerance are cut; but eigenvectors of nearly
equal eigenvalues are ill-conditioned for every solver, so G is summed and solved in fp64 whatever
the precision of the merge (see the figures in `raymix.merge`). Shapes: K tasks, (m, n) matrices, r
directions kept, p directions asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.methods.eigen import eigh
from raymix.merging.registry import Deltas, FactoredDelta, as_deltas

Decomposition = Literal["gram", "svd", "gram_fp32", "svd_fp32", "randomized"]

# Columns converted to fp64 at a time, and rows per block of the lower triangle.
_COLUMNS = 2048
_ROWS = 192
_OVERSAMPLING = 10
_POWER_ITERATIONS = 2


class Transposed(FactoredDelta):
    """The same matrices transposed, still read one at a time."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self._matrices = as_deltas(matrices)
        self.shape = self._matrices.shape[::-1]
        self.dtype, self.device = self._matrices.dtype, self._matrices.device

    def in_turn(self) -> Iterator[Tensor]:
        """Yield the matrices to be read; each lasts until the next is asked for."""
        return (matrix.T for matrix in self._matrices.in_turn())

    def __len__(self) -> int:
        return len(self._matrices)

    def make(self, index: int) -> Tensor:
        """See `FactoredDelta`."""
        return self._matrices[index].T


def to_read(matrices: Sequence[Tensor]) -> Deltas | Transposed:
    """Return the matrices as what has a shape before they are read, and gives them in turn."""
    return matrices if isinstance(matrices, Transposed) else as_deltas(matrices)


def left_basis(
    matrices: Sequence[Tensor],
    *,
    decomposition: Decomposition = "gram",
    tolerance: float = 1e-2,
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return orthonormal directions (m, r) of the matrices' joint column space and their sigma.

    Args:
        matrices: K matrices, shape (m, n) each, in the precision of the result.
        decomposition: `gram`: fp64 Gram matrix and eigh; `svd`: fp64 SVD of the stack, the
            reference; `gram_fp32`, `svd_fp32`: the same in fp32; `randomized`: a range finder
            (Halko, Martinsson and Tropp 2011) for matrices known to be of low rank.
        tolerance: Directions with sigma <= tolerance * sigma_1 are cut.
        rank: Directions that `randomized` looks for.

    Returns:
        U (m, r) in the matrices' dtype and sigma (r,) in fp64, descending.

    Raises:
        MergeError: If `randomized` is not told a rank.
    """
    tasks = to_read(matrices)
    if decomposition == "randomized":
        u, sigma = _randomized(tasks, rank)
    elif decomposition in ("svd", "svd_fp32"):
        work = torch.float64 if decomposition == "svd" else torch.float32
        u, sigma, _ = torch.linalg.svd(_stacked(tasks, work), full_matrices=False)
    else:
        work = torch.float64 if decomposition == "gram" else torch.float32
        return _by_gram(tasks, work, tolerance)
    count = _rank(sigma, tolerance)
    return u[:, :count].to(tasks.dtype), sigma[:count].double()


def basis_size(
    m: int,
    n: int,
    k_tasks: int,
    decomposition: Decomposition,
    *,
    rank: int | None,
    itemsize: int,
) -> tuple[int, int]:
    """Return how many directions `left_basis` may return, and about how many bytes it takes."""
    columns = k_tasks * n
    r = min(m, columns)
    if decomposition == "randomized":
        r = min(r, (rank or r) + _OVERSAMPLING)
        return r, itemsize * 4 * m * r
    work = 4 if decomposition.endswith("fp32") else 8
    entries = 4 * r**2
    if decomposition.startswith("svd"):
        entries += 2 * m * columns + r * (m + columns)
    elif m > columns:
        entries += 2 * m * r
    return r, work * entries


def gram(matrices: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return sum_k D_k D_k^T, shape (m, m), in `dtype`; only its lower triangle is filled."""
    tasks = to_read(matrices)
    m, n = tasks.shape
    total = torch.zeros(m, m, dtype=dtype, device=tasks.device)
    buffer: Tensor | None = None
    for matrix in tasks.in_turn():
        for start in range(0, n, _COLUMNS):
            part = matrix[:, start : start + _COLUMNS]
            if part.dtype != dtype:
                if buffer is None or buffer.shape != part.shape:
                    buffer = torch.empty_like(part, dtype=dtype)
                part = buffer.copy_(part)
            for row in range(0, m, _ROWS):
                end = min(m, row + _ROWS)
                total[row:end, :end].addmm_(part[row:end], part[:end].T)
    return total


def _stacked(tasks: Deltas | Transposed, dtype: torch.dtype) -> Tensor:
    """Return [D_1 | ... | D_K], shape (m, K n)."""
    m, n = tasks.shape
    stack = torch.empty(m, len(tasks) * n, dtype=dtype, device=tasks.device)
    for part, matrix in zip(stack.split(n, dim=1), tasks.in_turn(), strict=True):
        part.copy_(matrix)
    return stack


def _rank(sigma: Tensor, tolerance: float) -> int:
    """Return how many of the descending values are above the tolerance."""
    largest = float(sigma[0]) if sigma.numel() else 0.0
    if largest == 0:
        return 0
    return int((sigma > tolerance * largest).sum()) if tolerance > 0 else sigma.numel()


def _by_gram(
    tasks: Deltas | Transposed, dtype: torch.dtype, tolerance: float
) -> tuple[Tensor, Tensor]:
    m, n = tasks.shape
    if m <= len(tasks) * n:
        eigenvalues, vectors = eigh(gram(tasks, dtype))
        sigma = _sigma(eigenvalues)
        count = _rank(sigma, tolerance)
        # Cut before turning around: at this size each copy counts.
        return vectors[:, m - count :].to(tasks.dtype).flip(1), sigma[:count].double()
    # More rows than columns in all: the same within the span of the columns.
    q, r = torch.linalg.qr(_stacked(tasks, dtype))
    u, sigma = _descending(r @ r.T)
    count = _rank(sigma, tolerance)
    return (q @ u[:, :count]).to(tasks.dtype), sigma[:count].double()


def _sigma(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.flip(0).clamp_min(0).sqrt()


def _descending(gram_matrix: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues, vectors = eigh(gram_matrix)
    return vectors.flip(1), _sigma(eigenvalues)


def _randomized(tasks: Deltas | Transposed, rank: int | None) -> tuple[Tensor, Tensor]:
    if rank is None:
        raise MergeError.at(
            "parameters.rank",
            rank,
            "randomized needs a rank",
            fix="Set rank to at least the rank of all tasks together",
        )
    m, n = tasks.shape
    size = min(m, n * len(tasks), rank + _OVERSAMPLING)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(m, size, generator=generator).to(tasks.device, tasks.dtype)
    for _ in range(_POWER_ITERATIONS + 1):
        basis = torch.linalg.qr(y)[0]
        y = torch.zeros_like(basis)
        for matrix in tasks.in_turn():
            y += matrix @ (matrix.T @ basis)
    basis = torch.linalg.qr(y)[0]
    small = [basis.T @ matrix for matrix in tasks.in_turn()]
    u, sigma = _descending(gram(small))
    found = min(rank, size)
    return (basis.double() @ u)[:, :found], sigma[:found]
