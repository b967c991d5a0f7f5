"""DRM, Decom-Renorm-Merge (arXiv 2505.23117), and KnOTS, which differs in its pruning mask.

The published algorithm takes the SVD of the stacked deltas, C = [D_1 | ... | D_K] = U S V^T,
normalizes the rows of each task's block of V^T, moves the norms into S, prunes, elects signs,
averages, and maps back. S cancels: the scaled block of task k is B_k = U^T D_k. So, with
U = the leading eigenvectors of sum_k D_k D_k^T:

    keep |B_k[i, j]| / ||B_k[i]|| >= tau     tau: one quantile over all tasks and entries
    X = mean over the tasks that agree with the elected sign (sign_election.py), weighted
    delta = U X

"Renorm" therefore only decides which entries survive: rows of small norm are pruned as much as rows
of large norm. Horizontal uses a common column space (outputs), vertical a common row space: it is
horizontal on the transposed matrices. `auto` takes the cheaper side of each matrix, which is a
different method, not another way to compute the same result.

Differences from the published code: a row of B_k that is zero up to rounding (orthogonal or frozen
tasks) is set to zero, so it is neither normalized to noise nor counted; drop 0 elects and weighs as
any other drop; D and -D cancel exactly; sign election can be switched off for matrices too; no
(m, nK) stack is formed. KnOTS (arXiv 2410.19735) prunes each task by |B_k| instead, and scales the
result.

Shapes: K tasks, (m, n) matrices, r directions, B_k and X (r, n).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raymix.merging.methods.decompose import (
    Decomposition,
    TransposedDeltas,
    as_readable,
    basis_size,
    left_basis,
)
from raymix.merging.methods.order_statistics import (
    magnitude_order_statistics,
    order_statistics,
    zero_below,
)
from raymix.merging.methods.sign_election import agreeing_mean
from raymix.merging.registry import (
    Factors,
    Fraction,
    FractionPerModel,
    Merged,
    Options,
    Scale,
    ScalePerModel,
    as_deltas,
    broadcast_values,
    merge_method,
)
from raymix.recipe.base import Integer, Number

Direction = Literal["horizontal", "vertical", "auto"]

# A row of U^T D_k below this part of the norm of D_k is rounding error: of the product, and of
# directions that mix where singular values are nearly equal.
_ROUNDING_TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-8}
# fp32 entries of 256 kB, with their fp64 copies within a core's L2 cache.
_CHUNK_ENTRIES = 1 << 16


class _CommonOptions(Options):
    """Options that DRM and KnOTS have in common."""

    weight: ScalePerModel = (1.0,)
    """Weight per model, applied after sign election."""
    direction: Direction = "horizontal"
    """The common space: `horizontal` columns, `vertical` rows, `auto` the cheaper per matrix."""
    elect: bool = True
    """Whether tasks that disagree with the elected sign are excluded, entry by entry."""
    decomposition: Decomposition = "gram"
    """`gram` (fp64) or `svd` (fp64, the reference); `gram_fp32`, `svd_fp32` and `randomized`
    change the result."""
    rank_tolerance: Annotated[Number, Field(ge=0, lt=1)] = 1e-2
    """Directions with a singular value at or below this part of the largest are dropped."""
    rank: Annotated[Integer, Field(ge=1)] | None = None
    """Number of directions that `randomized` computes."""


class DrmOptions(_CommonOptions):
    """Options of `drm`."""

    drop: Fraction = 0.8
    """Fraction of all entries that is pruned."""
    renorm: bool = True
    """Prune by entries relative to their row's norm; else to the direction's singular value."""
    drop_other: Fraction = 0.0
    """Fraction of the entries pruned in parameters that are no weight matrices, per task."""


class KnotsOptions(_CommonOptions):
    """Options of `knots`."""

    density: FractionPerModel = (1.0,)
    """Fraction of each task's entries that survives pruning."""
    lambda_: Scale = Field(1.0, alias="lambda")
    """Factor of the merged delta."""
    rank_tolerance: Annotated[Number, Field(ge=0, lt=1)] = 1e-5


def _merge_entrywise(
    base: Tensor | None, deltas: Sequence[Tensor], options: _CommonOptions
) -> Merged:
    """Return the merge of a bias, a norm or an embedding: trimmed, elected, averaged."""
    tasks = as_deltas(deltas)
    drop = options.drop_other if isinstance(options, DrmOptions) else 0.0
    size = tasks.shape.numel()
    threshold_K = [0.0] * len(tasks)
    # As for matrices: the entries at or above the n_pruned-th smallest survive.
    n_pruned = size - round(size * (1 - drop))
    if n_pruned >= 1:
        threshold_K = [
            magnitude_order_statistics(tasks, k, n_pruned - 1)[0] for k in range(len(tasks))
        ]

    def read(k: int, rows: slice) -> Tensor:
        x = tasks.chunk(k, rows)
        return zero_below(x, threshold_K[k]) if threshold_K[k] else x

    weight_K = broadcast_values(options.weight, len(tasks))
    out = agreeing_mean(read, tasks.chunks(), tasks.new_matrix(), weight_K, elect=options.elect)
    if isinstance(options, KnotsOptions):
        out.mul_(options.lambda_)
    return Merged(out.view(tasks.shape))


def _low_rank_drm(factors_K: Sequence[Factors], options: DrmOptions) -> Factors:
    return _merge_factored(factors_K, options, _drm_coordinates)


def _low_rank_knots(factors_K: Sequence[Factors], options: KnotsOptions) -> Factors:
    return _merge_factored(factors_K, options, _knots_coordinates)


def _working_bytes(
    shape: tuple[int, int],
    k_tasks: int,
    itemsize: int,
    options: _CommonOptions,
    *,
    copies: tuple[int, int],
) -> int:
    """Return the memory of the larger step in bytes: decomposition, or tasks' coordinates.

    Args:
        shape: (m, n) of the matrices.
        k_tasks: Number of matrices, K.
        itemsize: Bytes per entry of the merge.
        options: Options of the method.
        copies: Copies of the coordinates in memory at once: of all tasks, and of a single task.
    """
    # The larger, not the sum: the decomposition's arrays are freed before the projections.
    m, n = reversed(shape) if _is_vertical(options, *shape) else shape
    r, basis_bytes = basis_size(
        m, n, k_tasks, options.decomposition, rank=options.rank, itemsize=itemsize
    )
    entries = (copies[0] * k_tasks + copies[1]) * r * n + m * r
    return max(basis_bytes, itemsize * entries)


@merge_method(
    "drm",
    options=DrmOptions,
    matrix_only=True,
    # Coordinates and relative magnitudes of all tasks at once: the quantile is joint.
    working_bytes=partial(_working_bytes, copies=(3, 0)),
    fallback=_merge_entrywise,
    factored=_low_rank_drm,
    scale_option="weight",  # applied after the election, so the delta is proportional to it
)
def drm(base: Tensor | None, deltas: Sequence[Tensor], options: DrmOptions) -> Merged:
    """Return DRM's merge of K weight matrices, shape (m, n)."""
    return _merge_dense(deltas, options, _drm_coordinates)


@merge_method(
    "knots",
    options=KnotsOptions,
    matrix_only=True,
    # Thresholds are per task, so the copies are of one task at a time.
    working_bytes=partial(_working_bytes, copies=(1, 3)),
    fallback=_merge_entrywise,
    factored=_low_rank_knots,
)
def knots(base: Tensor | None, deltas: Sequence[Tensor], options: KnotsOptions) -> Merged:
    """Return the KnOTS-TIES merge of K weight matrices, shape (m, n)."""
    return _merge_dense(deltas, options, _knots_coordinates)


@dataclass(slots=True)
class _Coordinates:
    """Coordinates of the tasks in the basis of their common space."""

    u: Tensor
    """Orthonormal basis, shape (m, r)."""
    sigma: Tensor
    """Singular values of the stack, shape (r,), fp64."""
    x_K: list[Tensor]
    """U^T D_k, shape (r, n) each; rows below rounding error are 0."""
    norm_K: list[Tensor]
    """Row norms of `x_K`, shape (r,) each, fp64; 0 for rows below rounding error."""

    def chunks(self) -> Iterator[slice]:
        """Yield ranges of rows whose entries fit a core's cache."""
        return _chunks(self.x_K[0])


def _chunks(x: Tensor) -> Iterator[slice]:
    rows, columns = x.shape
    step = max(1, _CHUNK_ENTRIES // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _row_norms(x: Tensor) -> Tensor:
    """Return the norms of rows, shape (r,), fp64."""
    # In chunks: `vector_norm(dtype=float64)` converts entry by entry and is far slower.
    norm = x.new_empty(len(x), dtype=torch.float64)
    for rows in _chunks(x):
        norm[rows] = torch.linalg.vector_norm(x[rows].double(), dim=1)
    return norm


_CoordinateMerge = Callable[[_Coordinates, Any], tuple[Tensor, float | None]]
"""Returns X (r, n) and the density after pruning from the tasks' coordinates."""


def _merge_dense(
    deltas: Sequence[Tensor], options: _CommonOptions, merge: _CoordinateMerge
) -> Merged:
    """Return the merge of full matrices."""
    tasks = as_deltas(deltas)
    vertical = _is_vertical(options, *tasks.shape)
    matrices = TransposedDeltas(tasks) if vertical else tasks
    u, x, density = _merge_in_basis(matrices, options, merge)
    return Merged(x.T @ u.T if vertical else u @ x, density=density, rank=u.shape[1])


def _merge_factored(
    factors_K: Sequence[Factors], options: _CommonOptions, merge: _CoordinateMerge
) -> Factors:
    """Return the merge as factors; their rank is at most the sum of the ranks.

    With [L_1 | ... | L_K] = Q R, the small matrices Q^T D_k = R_k A_k replace the D_k: Q has
    orthonormal columns that span all D_k, so singular values and row norms are the same.
    """
    first = factors_K[0]
    vertical = _is_vertical(options, first.left.shape[0], first.right.shape[1])
    oriented = [factors.transposed() for factors in factors_K] if vertical else factors_K
    q, r = torch.linalg.qr(torch.cat([factors.left for factors in oriented], dim=1))
    parts = r.split([factors.left.shape[1] for factors in oriented], dim=1)
    projected = [part @ factors.right for part, factors in zip(parts, oriented, strict=True)]
    u, x, _ = _merge_in_basis(projected, options, merge)
    merged = Factors(q @ u, x)
    return merged.transposed() if vertical else merged


def _is_vertical(options: _CommonOptions, m: int, n: int) -> bool:
    return options.direction == "vertical" or (options.direction == "auto" and m > n)


def _merge_in_basis(
    matrices: Sequence[Tensor], options: _CommonOptions, merge: _CoordinateMerge
) -> tuple[Tensor, Tensor, float | None]:
    """Return U (m, r), X (r, n) and the density after pruning."""
    tasks = as_readable(matrices)
    u, sigma = left_basis(
        tasks,
        decomposition=options.decomposition,
        tolerance=options.rank_tolerance,
        rank=options.rank,
    )
    if not sigma.numel():  # frozen in every task
        return u, u.new_zeros(0, tasks.shape[1]), None
    x_K: list[Tensor] = []
    norm_K: list[Tensor] = []
    for matrix in tasks.iter_buffered():
        x = u.T @ matrix
        norm = _row_norms(x)
        # Otherwise renormalization would blow rounding noise up to the size of real entries.
        floor = _ROUNDING_TOLERANCE[x.dtype] * torch.linalg.vector_norm(matrix)
        x[norm <= floor] = 0
        x_K.append(x)
        norm_K.append(norm.masked_fill_(norm <= floor, 0))
    used = torch.stack(norm_K).amax(dim=0) > 0
    if not used.all():  # rank_tolerance 0 also returns directions outside the span of the tasks
        u, sigma = u[:, used], sigma[used]
        x_K, norm_K = [x[used] for x in x_K], [norm[used] for norm in norm_K]
    return (u, *merge(_Coordinates(u, sigma, x_K, norm_K), options))


def _drm_coordinates(coordinates: _Coordinates, options: DrmOptions) -> tuple[Tensor, float | None]:
    """Return X and the density: all tasks pruned by one quantile of their relative entries."""
    x_K = coordinates.x_K
    scale_K = coordinates.norm_K if options.renorm else [coordinates.sigma] * len(x_K)
    factor_K = [
        torch.where(scale > 0, 1 / scale, 0.0).to(x.dtype)[:, None]
        for scale, x in zip(scale_K, x_K, strict=True)
    ]
    r, n = x_K[0].shape
    size = len(x_K) * r * n
    # As published: the entries at or above the n_pruned-th smallest survive, ties included.
    n_pruned = size - round(size * (1 - options.drop))
    if n_pruned < 1:
        return _average(coordinates, options), 1.0
    relative = torch.empty(len(x_K), r, n, dtype=factor_K[0].dtype, device=coordinates.u.device)
    for x, factor, out in zip(x_K, factor_K, relative, strict=True):
        for rows in coordinates.chunks():
            torch.mul(x[rows].abs(), factor[rows], out=out[rows])
    (threshold,) = order_statistics(relative.view(-1), n_pruned - 1)
    del relative  # the selection reordered it; the products are computed again, chunk by chunk
    density = _prune(coordinates, [(factor, threshold) for factor in factor_K])
    return _average(coordinates, options), density


def _knots_coordinates(
    coordinates: _Coordinates, options: KnotsOptions
) -> tuple[Tensor, float | None]:
    """Return X and the density: each task pruned by the magnitude of its own entries."""
    thresholds: list[tuple[Tensor, float]] = []
    size = coordinates.x_K[0].numel()
    density_K = broadcast_values(options.density, len(coordinates.x_K))
    for x, density in zip(coordinates.x_K, density_K, strict=True):
        count = max(1, int(density * size)) if density > 0 else 0
        threshold = order_statistics(x.abs().view(-1), -count)[0] if count else torch.inf
        thresholds.append((torch.ones(len(x), 1, dtype=x.dtype, device=x.device), threshold))
    pruned = any(density < 1 for density in density_K)
    density_after = _prune(coordinates, thresholds) if pruned else 1.0
    return _average(coordinates, options).mul_(options.lambda_), density_after


def _prune(coordinates: _Coordinates, thresholds: Sequence[tuple[Tensor, float]]) -> float:
    """Zero the entries whose |factor * entry| is below the task's threshold, in place.

    Args:
        coordinates: The tasks' coordinates, changed in place.
        thresholds: Per task, factors per row (r, 1) and the threshold.

    Returns:
        The fraction of all entries that survives.
    """
    n_nonzero = 0
    for x, (factor, threshold) in zip(coordinates.x_K, thresholds, strict=True):
        for rows in coordinates.chunks():
            part = x[rows]
            # A mask of 0 and 1 as numbers, see `zero_below`; the entries themselves stay exact.
            part.mul_(zero_below(part * factor[rows], threshold).sign_().abs_())
            n_nonzero += int(torch.count_nonzero(part))
    return n_nonzero / (len(coordinates.x_K) * coordinates.x_K[0].numel())


def _average(coordinates: _Coordinates, options: _CommonOptions) -> Tensor:
    """Return the agreeing mean of the tasks' coordinates, shape (r, n)."""
    weight_K = broadcast_values(options.weight, len(coordinates.x_K))

    def read(k: int, rows: slice) -> Tensor:
        return coordinates.x_K[k][rows]

    out = torch.empty_like(coordinates.x_K[0])
    return agreeing_mean(read, coordinates.chunks(), out, weight_K, elect=options.elect)
