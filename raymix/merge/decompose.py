"""Shared column spaces of several matrices, without the large SVD.

The left singular vectors of [D_1 | ... | D_K] are the eigenvectors of G = sum_k D_k D_k^T (m, m),
which is accumulated task by task: no stack of K matrices, no right factor. Squaring the condition
number costs little, since directions below the rank tolerance are cut; but eigenvectors of nearly
equal eigenvalues are ill-conditioned for every solver, so G is summed and solved in fp64 whatever
the precision of the merge (see the figures in `raymix.merge`). Shapes: K tasks, (m, n) matrices, r
directions kept, p directions asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from raymix.errors import MergeError, problem

Decomposition = Literal["gram", "svd", "gram_fp32", "svd_fp32", "randomised"]

# Columns converted to fp64 at a time, and rows per block of the lower triangle.
_COLUMNS = 2048
_ROWS = 192
_OVERSAMPLING = 10
_POWER_ITERATIONS = 2


class Transposed(Sequence[Tensor]):
    """The same matrices transposed, still read one at a time."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self._matrices = matrices

    def __len__(self) -> int:
        return len(self._matrices)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [matrix.T for matrix in self._matrices[index]]
        return self._matrices[index].T


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
            reference; `gram_fp32`, `svd_fp32`: the same in fp32; `randomised`: a range finder
            (Halko, Martinsson and Tropp 2011) for matrices known to be of low rank.
        tolerance: Directions with sigma <= tolerance * sigma_1 are cut.
        rank: Directions that `randomised` looks for.

    Returns:
        U (m, r) in the matrices' dtype and sigma (r,) in fp64, descending.

    Raises:
        MergeError: If `randomised` is not told a rank.
    """
    first = matrices[0]
    if decomposition == "randomised":
        u, sigma = _randomised(matrices, rank)
    elif decomposition in ("svd", "svd_fp32"):
        work = torch.float64 if decomposition == "svd" else torch.float32
        stacked = torch.cat([matrices[k].to(work) for k in range(len(matrices))], dim=1)
        u, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
    else:
        work = torch.float64 if decomposition == "gram" else torch.float32
        return _by_gram(matrices, work, tolerance)
    count = _rank(sigma, tolerance)
    return u[:, :count].to(first.dtype), sigma[:count].double()


def gram(matrices: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return sum_k D_k D_k^T, shape (m, m), in `dtype`; only its lower triangle is filled."""
    first = matrices[0]
    m, n = first.shape
    total = torch.zeros(m, m, dtype=dtype, device=first.device)
    for k in range(len(matrices)):
        matrix = matrices[k]
        for start in range(0, n, _COLUMNS):
            part = matrix[:, start : start + _COLUMNS].to(dtype)
            for row in range(0, m, _ROWS):
                end = min(m, row + _ROWS)
                total[row:end, :end].addmm_(part[row:end], part[:end].T)
    return total


def _rank(sigma: Tensor, tolerance: float) -> int:
    """Return how many of the descending values are above the tolerance."""
    largest = float(sigma[0]) if sigma.numel() else 0.0
    if largest == 0:
        return 0
    return int((sigma > tolerance * largest).sum()) if tolerance > 0 else sigma.numel()


def _by_gram(
    matrices: Sequence[Tensor], dtype: torch.dtype, tolerance: float
) -> tuple[Tensor, Tensor]:
    m, n = matrices[0].shape
    out = matrices[0].dtype
    if m <= len(matrices) * n:
        vectors, sigma = _eigh(gram(matrices, dtype))
        count = _rank(sigma, tolerance)
        # Cut before turning around: at this size each copy counts.
        return vectors[:, m - count :].to(out).flip(1), sigma[:count].double()
    # More rows than columns in all: the same within the span of the columns.
    stacked = torch.cat([matrices[k].to(dtype) for k in range(len(matrices))], dim=1)
    q, r = torch.linalg.qr(stacked)
    u, sigma = _descending(r @ r.T)
    count = _rank(sigma, tolerance)
    return (q @ u[:, :count]).to(out), sigma[:count].double()


def _eigh(gram_matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvectors (ascending) in the place of the matrix, and sigma descending.

    The transposed matrix is column-major, as LAPACK wants it, so it is not copied.
    """
    if gram_matrix.device.type != "cpu":
        eigenvalues, vectors = torch.linalg.eigh(gram_matrix, UPLO="L")
        return vectors, eigenvalues.flip(0).clamp_min(0).sqrt()
    vectors = gram_matrix.mT
    eigenvalues = torch.empty_like(gram_matrix[0])
    torch.linalg.eigh(vectors, UPLO="U", out=(eigenvalues, vectors))
    return vectors, eigenvalues.flip(0).clamp_min(0).sqrt()


def _descending(gram_matrix: Tensor) -> tuple[Tensor, Tensor]:
    vectors, sigma = _eigh(gram_matrix)
    return vectors.flip(1), sigma


def _randomised(matrices: Sequence[Tensor], rank: int | None) -> tuple[Tensor, Tensor]:
    if rank is None:
        advice = "Set rank to at least the rank of all tasks together"
        raise MergeError(problem("parameters.rank", rank, "randomised needs a rank", advice))
    m, n = matrices[0].shape
    size = min(m, n * len(matrices), rank + _OVERSAMPLING)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(m, size, generator=generator).to(matrices[0])
    for _ in range(_POWER_ITERATIONS + 1):
        basis = torch.linalg.qr(y)[0]
        y = torch.zeros_like(basis)
        for k in range(len(matrices)):
            matrix = matrices[k]
            y += matrix @ (matrix.T @ basis)
    basis = torch.linalg.qr(y)[0]
    small = [basis.T @ matrices[k] for k in range(len(matrices))]
    u, sigma = _descending(gram(small))
    found = min(rank, size)
    return (basis.double() @ u)[:, :found], sigma[:found]
