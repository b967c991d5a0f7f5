"""Shared column spaces of several matrices, without the large SVD.

The left singular vectors of [D_1 | ... | D_K] are the eigenvectors of G = sum_k D_k D_k^T (m, m),
which is accumulated task by task: no stack of K matrices, no right factor. Squaring the condition
number costs little, since directions below the rank tolerance are dropped; but eigenvectors of
nearly equal eigenvalues are ill-conditioned for all solvers, so G is summed and solved in fp64
whatever the precision of the merge (see the figures in `raymix.merging`). Shapes: K tasks, (m, n)
matrices, r directions of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.methods.eigen import eigh
from raymix.merging.registry import Deltas, LazyTensors, as_deltas

Decomposition = Literal["gram", "svd", "gram_fp32", "svd_fp32", "randomized"]

# Columns converted to fp64 at a time: a buffer of m x 2048 instead of a copy of the matrix.
_CHUNK_COLUMNS = 2048
# Rows per block of the lower triangle; small enough that little of the upper one is computed.
_BLOCK_ROWS = 192
# Halko, Martinsson and Tropp recommend 5 to 10 directions beyond the rank and 1 or 2 iterations.
_OVERSAMPLING = 10
_POWER_ITERATIONS = 2


class TransposedDeltas(LazyTensors):
    """Transposed views of matrices that are read one at a time."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self._matrices = as_deltas(matrices)
        self.shape = self._matrices.shape[::-1]
        self.dtype, self.device = self._matrices.dtype, self._matrices.device

    def iter_buffered(self) -> Iterator[Tensor]:
        """Yield read-only matrices; each is valid until the next one is requested."""
        return (matrix.T for matrix in self._matrices.iter_buffered())

    def __len__(self) -> int:
        return len(self._matrices)

    def compute(self, index: int) -> Tensor:
        """See `LazyTensors`."""
        return self._matrices[index].T


def as_readable(matrices: Sequence[Tensor]) -> Deltas | TransposedDeltas:
    """Return the matrices as a sequence with `shape` and `iter_buffered`."""
    return matrices if isinstance(matrices, TransposedDeltas) else as_deltas(matrices)


def left_basis(
    matrices: Sequence[Tensor],
    *,
    decomposition: Decomposition = "gram",
    tolerance: float = 1e-2,
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis (m, r) of the joint column space, and its singular values (r,).

    Args:
        matrices: K matrices, shape (m, n) each, in the precision of the result.
        decomposition: `gram`: fp64 Gram matrix and eigh; `svd`: fp64 SVD of the stack, the
            reference; `gram_fp32`, `svd_fp32`: the same in fp32; `randomized`: a range finder
            (Halko, Martinsson and Tropp 2011) for matrices known to be of low rank.
        tolerance: Directions with sigma <= tolerance * sigma_1 are dropped.
        rank: Number of directions that `randomized` computes.

    Returns:
        U (m, r) in the matrices' dtype and sigma (r,) in fp64, descending.

    Raises:
        MergeError: If `rank` is missing for `randomized`.
    """
    tasks = as_readable(matrices)
    if decomposition == "randomized":
        u, sigma = _randomized(tasks, rank)
    elif decomposition in ("svd", "svd_fp32"):
        work = torch.float64 if decomposition == "svd" else torch.float32
        u, sigma, _ = torch.linalg.svd(_stacked(tasks, work), full_matrices=False)
    else:
        work = torch.float64 if decomposition == "gram" else torch.float32
        return _by_gram(tasks, work, tolerance)
    count = _numerical_rank(sigma, tolerance)
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
    """Return the largest r that `left_basis` can return, and its memory in bytes, estimated."""
    columns = k_tasks * n
    r = min(m, columns)
    if decomposition == "randomized":
        r = min(r, (rank or r) + _OVERSAMPLING)
        return r, itemsize * 4 * m * r
    work_itemsize = 4 if decomposition.endswith("fp32") else 8
    # The Gram matrix (or R of the stack), its vectors and LAPACK's workspaces.
    entries = 4 * r**2
    if decomposition.startswith("svd"):
        entries += 2 * m * columns + r * (m + columns)
    elif m > columns:
        entries += 2 * m * r
    return r, work_itemsize * entries


def gram(matrices: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return sum_k D_k D_k^T, shape (m, m), in `dtype`; only its lower triangle is filled."""
    tasks = as_readable(matrices)
    m, n = tasks.shape
    total = torch.zeros(m, m, dtype=dtype, device=tasks.device)
    buffer: Tensor | None = None
    for matrix in tasks.iter_buffered():
        for start in range(0, n, _CHUNK_COLUMNS):
            part = matrix[:, start : start + _CHUNK_COLUMNS]
            if part.dtype != dtype:
                if buffer is None or buffer.shape != part.shape:
                    buffer = torch.empty_like(part, dtype=dtype)
                part = buffer.copy_(part)
            # Half of the work of a full product; the solvers read the lower triangle only.
            for row in range(0, m, _BLOCK_ROWS):
                end = min(m, row + _BLOCK_ROWS)
                total[row:end, :end].addmm_(part[row:end], part[:end].T)
    return total


def _stacked(tasks: Deltas | TransposedDeltas, dtype: torch.dtype) -> Tensor:
    """Return [D_1 | ... | D_K], shape (m, K n)."""
    m, n = tasks.shape
    stack = torch.empty(m, len(tasks) * n, dtype=dtype, device=tasks.device)
    for part, matrix in zip(stack.split(n, dim=1), tasks.iter_buffered(), strict=True):
        part.copy_(matrix)
    return stack


def _numerical_rank(sigma: Tensor, tolerance: float) -> int:
    """Return the number of descending singular values above `tolerance` times the largest."""
    largest = float(sigma[0]) if sigma.numel() else 0.0
    if largest == 0:
        return 0
    # Tolerance 0 means all directions, those of sigma 0 included.
    return int((sigma > tolerance * largest).sum()) if tolerance > 0 else sigma.numel()


def _by_gram(
    tasks: Deltas | TransposedDeltas, dtype: torch.dtype, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return basis and singular values by the eigenvectors of the Gram matrix."""
    m, n = tasks.shape
    if m <= len(tasks) * n:
        eigenvalues, vectors = eigh(gram(tasks, dtype))
        sigma = _singular_values(eigenvalues)
        count = _numerical_rank(sigma, tolerance)
        # Truncate before `flip`, which copies: (m, m) in fp64 is the largest array here.
        return vectors[:, m - count :].to(tasks.dtype).flip(1), sigma[:count].double()
    # More rows than columns in total: G has rank K n at most, so solve R R^T of size K n instead.
    q, r = torch.linalg.qr(_stacked(tasks, dtype))
    u, sigma = _eigh_descending(r @ r.T)
    count = _numerical_rank(sigma, tolerance)
    return (q @ u[:, :count]).to(tasks.dtype), sigma[:count].double()


def _singular_values(eigenvalues: Tensor) -> Tensor:
    # Rounding makes eigenvalues that should be 0 slightly negative.
    return eigenvalues.flip(0).clamp_min(0).sqrt()


def _eigh_descending(gram_matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvectors and the square roots of the eigenvalues, descending."""
    eigenvalues, vectors = eigh(gram_matrix)
    return vectors.flip(1), _singular_values(eigenvalues)


def _randomized(tasks: Deltas | TransposedDeltas, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return `rank` directions and singular values by a randomized range finder."""
    if rank is None:
        raise MergeError.at(
            "parameters.rank",
            rank,
            "randomized needs a rank",
            fix="Set rank to at least the rank of all tasks together",
        )
    m, n = tasks.shape
    size = min(m, n * len(tasks), rank + _OVERSAMPLING)
    # A fixed seed, drawn on the CPU: the result must not depend on the device or the order of jobs.
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(m, size, generator=generator).to(tasks.device, tasks.dtype)
    for _ in range(_POWER_ITERATIONS + 1):
        # Without it the columns of y would all turn towards the leading direction.
        basis = torch.linalg.qr(y)[0]
        y = torch.zeros_like(basis)
        for matrix in tasks.iter_buffered():
            y += matrix @ (matrix.T @ basis)
    basis = torch.linalg.qr(y)[0]
    projected = [basis.T @ matrix for matrix in tasks.iter_buffered()]
    u, sigma = _eigh_descending(gram(projected))
    count = min(rank, size)
    return (basis.double() @ u)[:, :count], sigma[:count]
