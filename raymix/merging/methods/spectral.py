"""Merging by each task's own singular directions: TSV-M, Iso-C and Iso-CTS.

TSV-M (Gargiulo et al. 2025, arXiv 2412.00081): the top 1/K of every task's directions, made
orthogonal to each other, with their singular values. Iso-C (Marczak et al. 2025, arXiv
2502.04959): the summed deltas with all singular values set to their mean. Iso-CTS: the common
directions of the sum plus each task's own in what is left, with equal values.

All three commute with rotations on both sides, so low-rank deltas are merged as small cores. What
is no weight matrix gets the mean of the deltas. Singular vectors come from the fp64 Gram matrix of
the smaller side. Shapes: K tasks, (m, n) matrices, r directions.
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
    EachScale,
    FactoredDelta,
    Factors,
    Merged,
    Options,
    Scale,
    as_deltas,
    each,
    merge_method,
)
from raymix.recipe.base import Number

# The fp64 Gram matrix resolves singular values down to about this part of the largest.
_RESOLVED = 1e-7

_Core = Callable[[Sequence[Tensor], int, Any], tuple[Tensor, int]]
"""Makes the merged matrix and its rank from K fp64 matrices and min(m, n) of the weight."""


class _Weighted(FactoredDelta):
    """The deltas in fp64, each times its weight."""

    def __init__(self, deltas: Sequence[Tensor], weight_K: Sequence[float]) -> None:
        self._deltas, self._weight_K = deltas, weight_K

    def __len__(self) -> int:
        return len(self._deltas)

    def make(self, index: int) -> Tensor:
        """See `FactoredDelta`."""
        delta = self._deltas[index].to(torch.float64, copy=True)
        return delta.mul_(self._weight_K[index])


class TsvOptions(Options):
    """Options of `tsv`."""

    weight: EachScale = (1.0,)
    lambda_: Scale = Field(1.0, alias="lambda")
    """Factor of the merged delta."""


class IsoOptions(TsvOptions):
    """Options of `iso_c`."""


class IsoCtsOptions(TsvOptions):
    """Options of `iso_cts`."""

    common: Annotated[Number, Field(gt=0, le=1)] = 0.8
    """Part of the directions that comes from the sum; the rest is shared out to the tasks."""


def _mean(base: Tensor | None, deltas: Sequence[Tensor], options: TsvOptions) -> Tensor:
    """Return the mean of the deltas of a bias, a norm or an embedding, as the authors do."""
    weight_K = [weight / len(deltas) for weight in each(options.weight, len(deltas))]
    return linear(base, deltas, LinearOptions(weight=tuple(weight_K), normalize=False))


def _dense(deltas: Sequence[Tensor], options: TsvOptions, core: _Core) -> Merged:
    tasks = as_deltas(deltas)
    matrices = _Weighted(tasks, each(options.weight, len(tasks)))
    merged, rank = core(matrices, min(tasks.shape), options)
    return Merged(merged.mul_(options.lambda_).to(tasks.dtype), rank=rank)


def _factored(factors_K: Sequence[Factors], options: TsvOptions, core: _Core) -> Factors:
    """Return the merge as factors: the tasks are merged in bases of their two joint spaces."""
    weight_K = each(options.weight, len(factors_K))
    q_left, r_left = torch.linalg.qr(torch.cat([f.left for f in factors_K], dim=1))
    q_right, r_right = torch.linalg.qr(torch.cat([f.right.T for f in factors_K], dim=1))
    ranks = [f.left.shape[1] for f in factors_K]
    parts = zip(r_left.split(ranks, dim=1), r_right.split(ranks, dim=1), weight_K, strict=True)
    cores = [(left @ right.T).double() * weight for left, right, weight in parts]
    side = min(factors_K[0].left.shape[0], factors_K[0].right.shape[1])
    merged, _ = core(cores, side, options)
    return Factors(q_left @ (merged * options.lambda_).to(q_left.dtype), q_right.T)


def _tsv_core(matrices: Sequence[Tensor], side: int, options: TsvOptions) -> tuple[Tensor, int]:
    size = max(1, side // len(matrices))
    return _joined([_leading(_svd(matrix), size) for matrix in matrices], flat=False)


def _iso_core(matrices: Sequence[Tensor], side: int, options: IsoOptions) -> tuple[Tensor, int]:
    u, sigma, v = _svd(_sum(matrices))
    return (sigma.mean() * (u @ v.T) if len(sigma) else u @ v.T), len(sigma)


def _iso_cts_core(
    matrices: Sequence[Tensor], side: int, options: IsoCtsOptions
) -> tuple[Tensor, int]:
    own = int(side * (1 - options.common)) // len(matrices)
    parts = [_leading(_svd(_sum(matrices)), side - own * len(matrices))]
    common = parts[0][0]
    for matrix in matrices:
        outside = matrix - common @ (common.T @ matrix)
        found = _svd(outside, scale=float(torch.linalg.matrix_norm(matrix)))
        parts.append(_leading(found, own))
    return _joined(parts, flat=True)


def _leading(parts: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Return copies of the first directions: a view would keep all of them in memory."""
    return tuple(part[..., :count].clone() for part in parts)


def _joined(parts: Sequence[tuple[Tensor, ...]], *, flat: bool) -> tuple[Tensor, int]:
    """Return U S V^T of all parts' directions made orthogonal, S their values or their mean."""
    lefts, sigmas, rights = zip(*parts, strict=True)
    sigma = torch.cat(sigmas)
    u, v = orthogonalized(torch.cat(lefts, dim=1)), orthogonalized(torch.cat(rights, dim=1))
    if flat and len(sigma):
        sigma = sigma.mean().expand(len(sigma))
    return (u * sigma) @ v.T, len(sigma)


def orthogonalized(columns: Tensor) -> Tensor:
    """Return the matrix of orthonormal columns nearest to `columns` (m, r): its polar factor.

    Directions in which the columns are dependent are left out rather than invented.
    """
    eigenvalues, vectors = eigh(columns.T @ columns)
    largest = float(eigenvalues[-1]) if eigenvalues.numel() else 0.0
    sound = eigenvalues > _RESOLVED**2 * largest
    inverse = torch.where(sound, eigenvalues.clamp_min(1e-300).rsqrt(), 0.0)
    return columns @ ((vectors * inverse) @ vectors.T)


def _sum(matrices: Sequence[Tensor]) -> Tensor:
    total = matrices[0].clone()
    for k in range(1, len(matrices)):
        total += matrices[k]
    return total


def _svd(matrix: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, r), sigma (r,) descending and V (n, r) of the resolved directions, fp64.

    Resolved are those above rounding against the largest one, or against `scale`.
    """
    if matrix.shape[0] > matrix.shape[1]:
        v, sigma, u = _svd(matrix.T, scale)
        return u, sigma, v
    eigenvalues, vectors = eigh(gram([matrix]))
    sigma = eigenvalues.flip(0).clamp_min(0).sqrt()
    count = int((sigma > _RESOLVED * (scale or float(sigma[0]))).sum()) if len(sigma) else 0
    u, sigma = vectors.flip(1)[:, :count], sigma[:count]
    return u, sigma, (matrix.T @ u).div_(sigma)


def _about(core: _Core, matrices: int) -> dict[str, Any]:
    def working_bytes(shape: tuple[int, int], *_: Any) -> int:
        m, n = shape
        return torch.float64.itemsize * (matrices * m * n + 4 * min(m, n) ** 2)

    return {
        "matrix": True,
        "working_bytes": working_bytes,
        "otherwise": _mean,
        "factored": partial(_factored, core=core),
        "scale_option": "weight",  # `lambda` is of matrices alone; both are in proportion to this
    }


@merge_method("tsv", options=TsvOptions, **_about(_tsv_core, 4))
def tsv(base: Tensor | None, deltas: Sequence[Tensor], options: TsvOptions) -> Merged:
    """Return TSV-M's merge of K weight matrices, shape (m, n)."""
    return _dense(deltas, options, _tsv_core)


@merge_method("iso_c", options=IsoOptions, **_about(_iso_core, 3))
def iso_c(base: Tensor | None, deltas: Sequence[Tensor], options: IsoOptions) -> Merged:
    """Return Iso-C's merge of K weight matrices, shape (m, n)."""
    return _dense(deltas, options, _iso_core)


@merge_method("iso_cts", options=IsoCtsOptions, **_about(_iso_cts_core, 7))
def iso_cts(base: Tensor | None, deltas: Sequence[Tensor], options: IsoCtsOptions) -> Merged:
    """Return Iso-CTS's merge of K weight matrices, shape (m, n)."""
    return _dense(deltas, options, _iso_cts_core)
