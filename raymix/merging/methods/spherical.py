"""Spherical interpolation (SLERP, multi-SLERP) and Model Stock: geometry of full parameters.

Slerp is Shoemake's (1985); multislerp the tangent-space mean of Goddard (mergekit); Model Stock is
Jang et al. 2024 (arXiv 2403.19522, eq. 5 and its form for more than two models). Arithmetic and
guards follow mergekit, so its files mean the same here. Norms and products are accumulated chunk
by chunk in fp64. Shapes: K tasks, R rows of a parameter seen as a matrix, E entries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.registry import (
    Deltas,
    Options,
    Scale,
    ScalePerModel,
    as_deltas,
    broadcast_values,
    merge_method,
)
from raymix.recipe.base import Number

# Above this |cosine| the arc is a line within fp32, and 1 / sin(angle) is ill-conditioned; as in
# mergekit.
_PARALLEL_COSINE = 0.9995
# Norms at or below this are treated as 0, as in mergekit.
_ZERO_NORM = 1e-8


class SlerpOptions(Options):
    """Options of `slerp`."""

    t: Scale = 0.5
    """Position on the arc: 0 is the base, 1 the other model."""


class MultislerpOptions(Options):
    """Options of `multislerp`."""

    weight: ScalePerModel = (1.0,)
    normalize_weights: bool = True
    """Divide the weights by their sum."""
    eps: Annotated[Number, Field(gt=0)] = _ZERO_NORM
    """Norms below it count as zero."""


class ModelStockOptions(Options):
    """Options of `model_stock`."""

    filter_wise: bool = False
    """One interpolation ratio per row instead of one per parameter."""


@merge_method("slerp", options=SlerpOptions, base="first", min_models=1, max_models=1)
def slerp(base: Tensor | None, deltas: Sequence[Tensor], options: SlerpOptions) -> Tensor:
    """Return the point at `t` on the arc from the first model to the second."""
    models, t = as_deltas(deltas), options.t
    gram = gram_matrix(models)
    norms = [math.sqrt(gram[k, k]) for k in (0, 1)]
    norms = [norm if norm > _ZERO_NORM else 1.0 for norm in norms]
    # Rounding can push the quotient past 1, where acos is undefined.
    cosine = max(-1.0, min(1.0, float(gram[0, 1]) / (norms[0] * norms[1])))
    if abs(cosine) > _PARALLEL_COSINE:
        factors = (1 - t, t)
    else:
        angle = math.acos(cosine)
        factors = (
            math.sin((1 - t) * angle) / math.sin(angle),
            math.sin(t * angle) / math.sin(angle),
        )
    return _weighted_sum(models, factors)


@merge_method("multislerp", options=MultislerpOptions, base="optional", min_models=1)
def multislerp(base: Tensor | None, deltas: Sequence[Tensor], options: MultislerpOptions) -> Tensor:
    """Return the mean of the tasks on the sphere: in the tangent space at their weighted mean.

    Raises:
        MergeError: If the weighted directions cancel and there are more than two.
    """
    tasks = as_deltas(deltas)
    if len(tasks) == 1:
        return tasks[0]
    weight_K = torch.tensor(broadcast_values(options.weight, len(tasks)), dtype=torch.float64)
    if options.normalize_weights:
        weight_K = weight_K / weight_K.sum()
    # All vectors below lie in the span of the tasks: K coefficients and the Gram matrix represent
    # them, and no further vector of the parameter's size is needed.
    gram_KK = gram_matrix(tasks)
    norm_K = gram_KK.diagonal().sqrt()
    unit_K = 1 / (norm_K + options.eps)
    mean_K = weight_K * unit_K
    mean_norm = _norm(mean_K, gram_KK)
    if mean_norm < options.eps:
        if len(tasks) == 2:
            # As mergekit: of two opposite directions the plain weighted sum is taken.
            return _weighted_sum(tasks, weight_K.tolist())
        raise MergeError.at(
            "parameters.weight",
            weight_K.tolist(),
            "the weighted directions of the models cancel, so they have no mean on the sphere",
            fix="Give them other weights",
        )
    mean_K = mean_K / mean_norm
    dot_K = unit_K * (gram_KK @ mean_K)
    tangent_K = weight_K * unit_K - (weight_K * dot_K).sum() * mean_K
    length = _norm(tangent_K, gram_KK) + options.eps
    # The exponential map at the mean; the result gets the weighted mean of the norms.
    point_K = mean_K * math.cos(length) + tangent_K * (math.sin(length) / length)
    return _weighted_sum(tasks, (point_K * (norm_K * weight_K).sum()).tolist())


@merge_method("model_stock", options=ModelStockOptions, min_models=2)
def model_stock(
    base: Tensor | None, deltas: Sequence[Tensor], options: ModelStockOptions
) -> Tensor:
    """Return the mean delta times the interpolation ratio t = K cos / (1 + (K - 1) cos).

    cos is the mean cosine over pairs of task vectors, per parameter or per row.
    """
    tasks = as_deltas(deltas)
    k_tasks = len(tasks)
    dot_RKK = _row_grams(tasks) if options.filter_wise else gram_matrix(tasks)[None]
    norm_RK = dot_RKK.diagonal(dim1=1, dim2=2).sqrt()
    scale_RKK = (norm_RK[:, :, None] * norm_RK[:, None, :]).clamp_min(1e-6)
    cosine_RKK = (dot_RKK / scale_RKK).clamp(-1, 1)
    upper = torch.triu_indices(k_tasks, k_tasks, 1)
    cosine_R = cosine_RKK[:, upper[0], upper[1]].mean(dim=1)
    denominator_R = 1 + (k_tasks - 1) * cosine_R
    # Opposing tasks make the ratio infinite; then t = 0, the base. The inner `where` avoids a
    # division by 0 in the branch that is not taken.
    singular_R = denominator_R.abs() < 1e-6
    t_R = torch.where(
        singular_R, 0.0, k_tasks * cosine_R / torch.where(singular_R, 1.0, denominator_R)
    )
    out = _weighted_sum(tasks, [1 / k_tasks] * k_tasks).reshape(tasks.matrix_shape)
    return out.mul_(t_R[:, None].to(out.device, out.dtype)).view(tasks.shape)


def gram_matrix(tasks: Deltas) -> Tensor:
    """Return the inner products of the tasks, shape (K, K), fp64."""
    k_tasks = len(tasks)
    gram_KK = torch.zeros(k_tasks, k_tasks, dtype=torch.float64)
    for rows in tasks.chunks():
        flat_KE = torch.stack([tasks.chunk(k, rows).view(-1) for k in range(k_tasks)])
        gram_KK += (flat_KE @ flat_KE.T).to("cpu", torch.float64)
    return gram_KK


def _row_grams(tasks: Deltas) -> Tensor:
    """Return the inner products row by row, shape (R, K, K), fp64."""
    grams = []
    for rows in tasks.chunks():
        x_RKE = torch.stack([tasks.chunk(k, rows) for k in range(len(tasks))], dim=1).double()
        grams.append((x_RKE @ x_RKE.mT).cpu())
    return torch.cat(grams)


def _norm(factor_K: Tensor, gram_KK: Tensor) -> float:
    """Return the norm of the sum of the tasks times `factor_K`, from their inner products."""
    # Below 0 by rounding where the tasks cancel.
    return math.sqrt(max(0.0, float(factor_K @ gram_KK @ factor_K)))


def _weighted_sum(tasks: Deltas, factors: Sequence[float]) -> Tensor:
    """Return the sum of the tasks times their factors, shape of the parameter."""
    out = tasks.new_matrix()
    for rows in tasks.chunks():
        total = out[rows].zero_()
        for k, factor in enumerate(factors):
            total.add_(tasks.chunk(k, rows), alpha=factor)
    return out.view(tasks.shape)
