"""Symmetric fp64 eigendecomposition on a CPU, by the separate steps of LAPACK's `dsyevd`.

Householder reduction to tridiagonal form (`dsytrd`), divide and conquer (`dstevd`), then the back
transformation as products of matrices instead of `dormtr`. The first two steps call scipy's
OpenBLAS at the addresses that `scipy.linalg.cython_lapack` publishes for compiled callers: scipy's
own wrappers hold the GIL, so that the workers of a merge would wait for each other.

Axes: n rows, b reflections of a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raymix._utils.compat.native import lapack_function

MIN_STEPWISE_ROWS = 1024
"""Number of rows from which this is faster than `torch.linalg.eigh`: 25 % less time at 2048."""

# Reflections per product: fewer make the matrix products inefficient; more cost extra work, as
# the triangular factor T grows with the square.
_REFLECTION_BLOCK = 192
# Columns that dsytrd reduces between two updates of the remaining matrix (ILAENV's block size); the
# size of its workspace is n times this.
_PANEL_COLUMNS = 32


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Limit scipy's BLAS to one thread in this process until the end of the block.

    scipy bundles its own OpenBLAS, which torch.set_num_threads does not reach; its sums depend on
    the number of threads.
    """
    from threadpoolctl import threadpool_limits  # a merge without matrices does not need it

    lapack_function("dsytrd")  # loads OpenBLAS: threadpoolctl limits loaded libraries only
    with threadpool_limits(1, user_api="blas"):
        yield


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,), ascending, and eigenvectors (n, n), one per column.

    Args:
        matrix: Shape (n, n), symmetric; its lower triangle is read. It may be overwritten.

    Raises:
        LinAlgError: If LAPACK does not converge, as for matrices with NaN or Inf.
    """
    if matrix.device.type != "cpu":
        values_n, vectors_nn = torch.linalg.eigh(matrix, UPLO="L")
        return values_n, vectors_nn
    if matrix.dtype == torch.float64 and len(matrix) >= MIN_STEPWISE_ROWS:
        return eigh_in_steps(matrix)
    # The transposed matrix is column-major, LAPACK's layout, so torch does not copy it. Its upper
    # triangle is the lower one of `matrix`; the vectors overwrite it.
    vectors_nn, values_n = matrix.mT, matrix.new_empty(len(matrix))
    torch.linalg.eigh(vectors_nn, UPLO="U", out=(values_n, vectors_nn))
    return values_n, vectors_nn


def eigh_in_steps(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return `eigh` of an fp64 matrix of two or more rows on the CPU, by the steps above."""
    reflections = matrix.contiguous()
    values_n, off_diagonal_n, factor_n = _tridiagonal(reflections)
    rows_nn = _tridiagonal_vectors(values_n, off_diagonal_n)
    # dstevd can return status 0 and NaN for a matrix with NaN or Inf.
    if not torch.isfinite(values_n).all():
        raise torch.linalg.LinAlgError("eigh: the matrix holds NaN or Inf")
    _reflect(rows_nn, reflections, factor_n)
    return values_n, rows_nn.T


def _tridiagonal(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return diagonal, off-diagonal and factors of the reflections, shape (n,) each.

    The reflections overwrite the matrix. LAPACK is column-major: the lower triangle of a row-major
    matrix is its upper one.
    """
    n = len(matrix)
    diagonal_n, off_diagonal_n, factor_n = (matrix.new_empty(n) for _ in range(3))
    workspace = matrix.new_empty(n * _PANEL_COLUMNS)
    addresses = [_address(t) for t in (diagonal_n, off_diagonal_n, factor_n, workspace)]
    _call_lapack("dsytrd", b"U", n, _address(matrix), n, *addresses, workspace.numel())
    return diagonal_n, off_diagonal_n, factor_n


def _tridiagonal_vectors(diagonal_n: Tensor, off_diagonal_n: Tensor) -> Tensor:
    """Return eigenvectors (n, n), one per row; eigenvalues overwrite the diagonal."""
    n = len(diagonal_n)
    rows_nn = diagonal_n.new_empty(n, n)
    # The sizes of LAPACK's documentation of dstevd for JOBZ = "V".
    workspace = diagonal_n.new_empty(1 + 4 * n + n * n)
    int_workspace = torch.empty(3 + 5 * n, dtype=torch.int32)
    addresses = [_address(t) for t in (diagonal_n, off_diagonal_n, rows_nn)]
    workspaces = [
        _address(workspace),
        workspace.numel(),
        _address(int_workspace),
        int_workspace.numel(),
    ]
    _call_lapack("dstevd", b"V", n, *addresses, n, *workspaces)
    return rows_nn


def _reflect(rows_nn: Tensor, reflections: Tensor, factor_n: Tensor) -> None:
    """Apply the reflections to the rows in place, first to last, in blocks.

    Reflection j is I - f v v^T with v = (row j + 1 of `reflections` up to j, 1, 0, ...). A block
    of them, V (b, n), is I - V^T T V with the upper triangular T^-1 = diag(1 / f) and V V^T above
    the diagonal (Schreiber and Van Loan 1989, in the form of Puglisi 1992).
    """
    n = len(reflections)
    for start in range(0, n - 1, _REFLECTION_BLOCK):
        end = min(n - 1, start + _REFLECTION_BLOCK)
        factor_b = factor_n[start:end]
        # f = 0 is the identity, which has no 1 / f: its row of V is zeroed instead.
        active_b = factor_b != 0
        block = reflections[start + 1 : end + 1, :end].tril(start - 1)
        block.diagonal(start).fill_(1)
        block.mul_(active_b[:, None])
        inverse = (block @ block.T).triu_(1)
        inverse.diagonal().copy_(torch.where(active_b, 1 / factor_b, 1.0))
        scaled = torch.linalg.solve_triangular(inverse, block, upper=True)
        rows_nn[:, :end].addmm_(rows_nn[:, :end] @ block.T, scaled, alpha=-1)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _call_lapack(name: str, *arguments: bytes | int | ctypes.c_void_p) -> None:
    """Call a LAPACK routine; Fortran takes all arguments by reference.

    Raises:
        LinAlgError: If the routine reports a status other than 0.
    """
    status = ctypes.c_int()
    lapack_function(name)(*map(_by_reference, arguments), ctypes.byref(status))
    if status.value:
        raise torch.linalg.LinAlgError(f"eigh: {name} did not converge ({status.value})")


def _by_reference(argument: bytes | int | ctypes.c_void_p) -> Any:
    if isinstance(argument, bytes):
        return ctypes.byref(ctypes.c_char(argument))
    return ctypes.byref(ctypes.c_int(argument)) if isinstance(argument, int) else argument
