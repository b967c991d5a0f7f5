"""Merging in the singular directions of each task: TSV-M, Iso-C and Iso-CTS.

TSV-M (Gargiulo et al. 2025, arXiv 2412.00081): the top 1/K of each task's directions, made
orthogonal to each other, with their singular values. Iso-C (Marczak et al. 2025, arXiv
2502.04959): the summed deltas with all singular values set to their mean. Iso-CTS: the common
directions of the sum plus each task's own in what is left, with equal values.

All three commute with rotations on both sides, so low-rank deltas are merged as small cores.
Parameters that are no weight matrices get the mean of the deltas. Singular vectors come from the
fp64 Gram matrix of the smaller side. Shapes: K tasks, (m, n) matrices, r directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from raymix.merging.methods.decompose import gram
from raymix.merging.methods.eigen import eigh
from raymix.merging.methods.entrywise import LinearOptions, linear
from raymix.merging.registry import (
    Factors,
    LazyTensors,
    Merged,
    Options,
    Scale,
    ScalePerModel,
    as_deltas,
    broadcast_values,
    merge_method,
)
from raymix.recipe.base import Number

# The Gram matrix squares singular values, so fp64's 1e-16 resolves them down to about this part of
# the largest.
_RESOLUTION = 1e-7

_Core = Callable[[Sequence[Tensor], int, Any], tuple[Tensor, int]]
"""Returns the merged matrix and its rank from K fp64 matrices and min(m, n) of the weight."""


class _WeightedDeltas(LazyTensors):
    """Deltas in fp64, each times its weight."""

    def __init__(self, deltas: Sequence[Tensor], weight_K: Sequence[float]) -> None:
        self._deltas, self._weight_K = deltas, weight_K

    def __len__(self) -> int:
        return len(self._deltas)

    def compute(self, index: int) -> Tensor:
        """See `LazyTensors`."""
        # A plain fp64 tensor would be returned as it is, and then changed in place.
        delta = self._deltas[index].to(torch.float64, copy=True)
        return delta.mul_(self._weight_K[index])


class TsvOptions(Options):
    """Options of `tsv`."""

    weight: ScalePerModel = (1.0,)
    lambda_: Scale = Field(1.0, alias="lambda")
    """Factor of the merged delta."""


class IsoOptions(TsvOptions):
    """Options of `iso_c`."""


class IsoCtsOptions(TsvOptions):
    """Options of `iso_cts`."""

    common: Annotated[Number, Field(gt=0, le=1)] = 0.8
    """Fraction of the directions taken from the sum; the rest is divided among the tasks."""


def _mean(base: Tensor | None, deltas: Sequence[Tensor], options: TsvOptions) -> Tensor:
    """Return the mean of the deltas of a bias, a norm or an embedding, as in the authors' code."""
    weight_K = [weight / len(deltas) for weight in broadcast_values(options.weight, len(deltas))]
    return linear(base, deltas, LinearOptions(weight=tuple(weight_K), normalize=False))


def _merge_dense(deltas: Sequence[Tensor], options: TsvOptions, core: _Core) -> Merged:
    """Return the merge of full matrices, computed in fp64."""
    tasks = as_deltas(deltas)
    matrices = _WeightedDeltas(tasks, broadcast_values(options.weight, len(tasks)))
    merged, rank = core(matrices, min(tasks.shape), options)
    return Merged(merged.mul_(options.lambda_).to(tasks.dtype), rank=rank)


def _merge_factored(factors_K: Sequence[Factors], options: TsvOptions, core: _Core) -> Factors:
    """Return the merge as factors: core matrices merged in bases of the joint spaces."""
    weight_K = broadcast_values(options.weight, len(factors_K))
    q_left, r_left = torch.linalg.qr(torch.cat([f.left for f in factors_K], dim=1))
    q_right, r_right = torch.linalg.qr(torch.cat([f.right.T for f in factors_K], dim=1))
    ranks = [f.left.shape[1] for f in factors_K]
    parts = zip(r_left.split(ranks, dim=1), r_right.split(ranks, dim=1), weight_K, strict=True)
    cores = [(left @ right.T).double() * weight for left, right, weight in parts]
    # The side of the full weight, not of the core: it decides how many directions a task gets.
    side = min(factors_K[0].left.shape[0], factors_K[0].right.shape[1])
    merged, _ = core(cores, side, options)
    return Factors(q_left @ (merged * options.lambda_).to(q_left.dtype), q_right.T)


def _tsv_core(matrices: Sequence[Tensor], side: int, options: TsvOptions) -> tuple[Tensor, int]:
    """Return TSV-M's merge: the leading side / K directions of each task, orthogonalized."""
    n_directions = max(1, side // len(matrices))
    return _join([_leading(_svd(matrix), n_directions) for matrix in matrices], flat=False)


def _iso_core(matrices: Sequence[Tensor], side: int, options: IsoOptions) -> tuple[Tensor, int]:
    """Return Iso-C's merge: the sum with all singular values set to their mean."""
    u, sigma, v = _svd(_sum(matrices))
    return (sigma.mean() * (u @ v.T) if len(sigma) else u @ v.T), len(sigma)


def _iso_cts_core(
    matrices: Sequence[Tensor], side: int, options: IsoCtsOptions
) -> tuple[Tensor, int]:
    """Return Iso-CTS's merge: directions of the sum plus each task's own, of equal values."""
    n_own = int(side * (1 - options.common)) // len(matrices)
    parts = [_leading(_svd(_sum(matrices)), side - n_own * len(matrices))]
    common = parts[0][0]
    for matrix in matrices:
        residual = matrix - common @ (common.T @ matrix)
        # Scaled by the task, not by the residual, which may be rounding error alone.
        svd = _svd(residual, scale=float(torch.linalg.matrix_norm(matrix)))
        parts.append(_leading(svd, n_own))
    return _join(parts, flat=True)


def _leading(parts: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Return copies of the first directions; a view would keep all of them in memory."""
    return tuple(part[..., :count].clone() for part in parts)


def _join(parts: Sequence[tuple[Tensor, ...]], *, flat: bool) -> tuple[Tensor, int]:
    """Return U S V^T and its rank: all parts' directions orthogonalized, S their values or mean."""
    lefts, sigmas, rights = zip(*parts, strict=True)
    sigma = torch.cat(sigmas)
    u, v = orthogonalized(torch.cat(lefts, dim=1)), orthogonalized(torch.cat(rights, dim=1))
    if flat and len(sigma):
        sigma = sigma.mean().expand(len(sigma))
    return (u * sigma) @ v.T, len(sigma)


def orthogonalized(columns: Tensor) -> Tensor:
    """Return the matrix of orthonormal columns nearest to `columns` (m, r): its polar factor.

    Dependent columns lower the rank; no direction outside their span is added.
    """
    eigenvalues, vectors = eigh(columns.T @ columns)
    largest = float(eigenvalues[-1]) if eigenvalues.numel() else 0.0
    # Eigenvalues are squares of singular values, hence the square of the resolution.
    resolved = eigenvalues > _RESOLUTION**2 * largest
    # The clamp keeps rsqrt finite in the branch that `where` does not take.
    inverse = torch.where(resolved, eigenvalues.clamp_min(1e-300).rsqrt(), 0.0)
    return columns @ ((vectors * inverse) @ vectors.T)


def _sum(matrices: Sequence[Tensor]) -> Tensor:
    # By index: a slice of lazy deltas would compute all of them at once.
    total = matrices[0].clone()
    for k in range(1, len(matrices)):
        total += matrices[k]
    return total


def _svd(matrix: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, r), sigma (r,) descending and V (n, r) of the resolved directions, fp64.

    Directions at or below the resolution relative to the largest one, or to `scale`, are dropped.
    """
    # The Gram matrix of the smaller side: the cost is cubic in it.
    if matrix.shape[0] > matrix.shape[1]:
        v, sigma, u = _svd(matrix.T, scale)
        return u, sigma, v
    eigenvalues, vectors = eigh(gram([matrix]))
    sigma = eigenvalues.flip(0).clamp_min(0).sqrt()
    count = int((sigma > _RESOLUTION * (scale or float(sigma[0]))).sum()) if len(sigma) else 0
    u, sigma = vectors.flip(1)[:, :count], sigma[:count]
    return u, sigma, (matrix.T @ u).div_(sigma)


def _method_fields(core: _Core, n_matrices: int) -> dict[str, Any]:
    """Return the fields of `MergeMethod`; `n_matrices`: fp64 copies of (m, n) in memory at once."""

    def working_bytes(shape: tuple[int, int], *_: Any) -> int:
        m, n = shape
        return torch.float64.itemsize * (n_matrices * m * n + 4 * min(m, n) ** 2)

    return {
        "matrix_only": True,
        "working_bytes": working_bytes,
        "fallback": _mean,
        "factored": partial(_merge_factored, core=core),
        # `lambda` applies to matrices only; `weight` scales the fallback, too.
        "scale_option": "weight",
    }


@merge_method("tsv", options=TsvOptions, **_method_fields(_tsv_core, 4))
def tsv(base: Tensor | None, deltas: Sequence[Tensor], options: TsvOptions) -> Merged:
    """Return TSV-M's merge of K weight matrices, shape (m, n)."""
    return _merge_dense(deltas, options, _tsv_core)


@merge_method("iso_c", options=IsoOptions, **_method_fields(_iso_core, 3))
def iso_c(base: Tensor | None, deltas: Sequence[Tensor], options: IsoOptions) -> Merged:
    """Return Iso-C's merge of K weight matrices, shape (m, n)."""
    return _merge_dense(deltas, options, _iso_core)


@merge_method("iso_cts", options=IsoCtsOptions, **_method_fields(_iso_cts_core, 7))
def iso_cts(base: Tensor | None, deltas: Sequence[Tensor], options: IsoCtsOptions) -> Merged:
    """Return Iso-CTS's merge of K weight matrices, shape (m, n)."""
    return _merge_dense(deltas, options, _iso_cts_core)
