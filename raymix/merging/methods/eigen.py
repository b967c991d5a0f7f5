"""Eigenvectors of symmetric fp64 matrices on a CPU, by LAPACK's steps one by one.

Householder reflections to tridiagonal form, divide and conquer there, and the reflections applied
to its vectors as products of matrices. The first two steps are those of scipy's OpenBLAS, called
at the addresses that `scipy.linalg.cython_lapack` publishes for compiled callers: scipy's own
wrappers of them hold Python's lock, so that the workers of a merge would wait for each other.
Shapes: n rows, b reflections at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raymix._utils.compat.native import lapack_function

LARGE = 1024
"""Rows from which this takes less time than `torch.linalg.eigh`: at 2048 a quarter less."""

# Reflections per product: with fewer the kernels are slow, more cost work of their own.
_BLOCK = 192
# Columns that dsytrd reduces between two updates of the rest.
_PANEL = 32


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep scipy's BLAS to one thread in this process until the end of the block.

    It has a setting of its own besides torch's, and with other threads sums come out otherwise.
    """
    from threadpoolctl import threadpool_limits

    lapack_function("dsytrd")  # what is not loaded cannot be limited
    with threadpool_limits(1, user_api="blas"):
        yield


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,), ascending, and eigenvectors (n, n), one per column.

    Args:
        matrix: Shape (n, n), symmetric; its lower triangle is read. It may be overwritten.

    Raises:
        LinAlgError: If nothing is found, as where the matrix holds NaN or Inf.
    """
    if matrix.device.type != "cpu":
        values_n, vectors_nn = torch.linalg.eigh(matrix, UPLO="L")
        return values_n, vectors_nn
    if matrix.dtype == torch.float64 and len(matrix) >= LARGE:
        return eigh_in_steps(matrix)
    # The transposed matrix is column-major, as LAPACK wants it, so it is not copied.
    vectors_nn, values_n = matrix.mT, matrix.new_empty(len(matrix))
    torch.linalg.eigh(vectors_nn, UPLO="U", out=(values_n, vectors_nn))
    return values_n, vectors_nn


def eigh_in_steps(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same of an fp64 matrix on the CPU, two rows or more, as the module says."""
    reflections = matrix.contiguous()
    values_n, beside_n, factor_n = _tridiagonal(reflections)
    rows_nn = _tridiagonal_vectors(values_n, beside_n)
    if not torch.isfinite(values_n).all():
        raise torch.linalg.LinAlgError("eigh: the matrix holds NaN or Inf")
    _reflect(rows_nn, reflections, factor_n)
    return values_n, rows_nn.T


def _tridiagonal(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return diagonal, what lies beside it, and the factors of the reflections, (n,) each.

    The reflections take the matrix's place. LAPACK goes by columns: to it the lower triangle of
    rows is the upper one.
    """
    n = len(matrix)
    diagonal_n, beside_n, factor_n = (matrix.new_empty(n) for _ in range(3))
    space = matrix.new_empty(n * _PANEL)
    places = [_at(one) for one in (diagonal_n, beside_n, factor_n, space)]
    _called("dsytrd", b"U", n, _at(matrix), n, *places, space.numel())
    return diagonal_n, beside_n, factor_n


def _tridiagonal_vectors(diagonal_n: Tensor, beside_n: Tensor) -> Tensor:
    """Return eigenvectors (n, n), one per row; their eigenvalues take the diagonal's place."""
    n = len(diagonal_n)
    rows_nn = diagonal_n.new_empty(n, n)
    space = diagonal_n.new_empty(1 + 4 * n + n * n)
    whole = torch.empty(3 + 5 * n, dtype=torch.int32)
    places = [_at(one) for one in (diagonal_n, beside_n, rows_nn)]
    counts = [_at(space), space.numel(), _at(whole), whole.numel()]
    _called("dstevd", b"V", n, *places, n, *counts)
    return rows_nn


def _reflect(rows_nn: Tensor, reflections: Tensor, factor_n: Tensor) -> None:
    """Apply the reflections to the rows, in place, first to last.

    Reflection j is I - f v v^T with v = (row j + 1 of `reflections` up to j, 1, 0, ...). A block
    of them, V (b, n), is I - V^T T V with the upper triangular T^-1 = diag(1 / f) and V V^T above
    the diagonal (Schreiber and Van Loan 1989, in the form of Puglisi 1992).
    """
    n = len(reflections)
    for start in range(0, n - 1, _BLOCK):
        end = min(n - 1, start + _BLOCK)
        factor_b = factor_n[start:end]
        moves_b = factor_b != 0  # one that does nothing has no 1 / f
        block = reflections[start + 1 : end + 1, :end].tril(start - 1)
        block.diagonal(start).fill_(1)
        block.mul_(moves_b[:, None])
        inverse = (block @ block.T).triu_(1)
        inverse.diagonal().copy_(torch.where(moves_b, 1 / factor_b, 1.0))
        scaled = torch.linalg.solve_triangular(inverse, block, upper=True)
        rows_nn[:, :end].addmm_(rows_nn[:, :end] @ block.T, scaled, alpha=-1)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _called(name: str, *arguments: bytes | int | ctypes.c_void_p) -> None:
    """Call a function of LAPACK, to which everything is passed by its address."""
    status = ctypes.c_int()
    lapack_function(name)(*map(_passed, arguments), ctypes.byref(status))
    if status.value:
        raise torch.linalg.LinAlgError(f"eigh: {name} did not converge ({status.value})")


def _passed(argument: bytes | int | ctypes.c_void_p) -> Any:
    if isinstance(argument, bytes):
        return ctypes.byref(ctypes.c_char(argument))
    return ctypes.byref(ctypes.c_int(argument)) if isinstance(argument, int) else argument
