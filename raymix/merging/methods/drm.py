"""DRM, Decom-Renorm-Merge (arXiv 2505.23117), and KnOTS, which differs in one mask.

The published algorithm takes the SVD of the stacked deltas, C = [D_1 | ... | D_K] = U S V^T,
normalizes the rows of each task's block of V^T, moves the norms into S, prunes, elects signs,
averages, and maps back. S cancels: the scaled block of task k is B_k = U^T D_k. So, with
U = the leading eigenvectors of sum_k D_k D_k^T:

    keep |B_k[i, j]| / ||B_k[i]|| >= tau     tau: one quantile over all tasks and entries
    X = mean over the tasks that agree with the elected sign (agree.py), coefficients applied
    delta = U X

"Renorm" therefore only decides which entries survive: each (task, direction) row gets its share.
Horizontal keeps a common column space (outputs), vertical a common row space: it is horizontal on
the transposed matrices. `auto` takes the cheaper side of each matrix, which is another method,
not another way to compute the same.

Beyond the published code: a row of B_k that is zero up to rounding (orthogonal or frozen tasks) is
zero, so it is neither normalized to noise nor counted; drop 0 elects and weighs as any other drop;
D and -D cancel exactly; sign election can be switched off for matrices too; nothing forms an
(m, nK) stack. KnOTS (arXiv 2410.19735) prunes each task by |B_k| instead, and scales the result.

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
    Transposed,
    basis_size,
    left_basis,
    to_read,
)
from raymix.merging.methods.order_statistics import keep_from, order_statistics, ordered_values
from raymix.merging.methods.sign_election import agreeing_mean
from raymix.merging.registry import (
    EachScale,
    EachShare,
    Factors,
    Merged,
    Options,
    Scale,
    Share,
    as_deltas,
    each,
    merge_method,
)
from raymix.recipe.base import Integer, Number

Direction = Literal["horizontal", "vertical", "auto"]

# A row of U^T D_k this small against D_k is rounding: of the product, and of directions that mix
# where singular values nearly agree.
_ROUNDING = {torch.float32: 3e-5, torch.float64: 1e-8}
_CHUNK = 1 << 16


class _SharedOptions(Options):
    """What DRM and KnOTS have in common."""

    weight: EachScale = (1.0,)
    """Coefficient per model, applied after sign election."""
    direction: Direction = "horizontal"
    """The common space: `horizontal` columns, `vertical` rows, `auto` the cheaper per matrix."""
    elect: bool = True
    """Whether tasks that disagree with the elected sign are left out, entry by entry."""
    decomposition: Decomposition = "gram"
    """`gram` (fp64) or `svd` (fp64, the reference); `gram_fp32`, `svd_fp32` and `randomized`
    change the result."""
    rank_tolerance: Annotated[Number, Field(ge=0, lt=1)] = 1e-2
    """Directions with a singular value at or below this part of the largest are cut."""
    rank: Annotated[Integer, Field(ge=1)] | None = None
    """Directions that `randomized` looks for."""


class DrmOptions(_SharedOptions):
    """Options of `drm`."""

    drop: Share = 0.8
    """Part of all entries that is pruned."""
    renorm: bool = True
    """Prune by entries relative to their row's norm; else to the direction's singular value."""
    drop_other: Share = 0.0
    """Part of the entries pruned in parameters that are no weight matrices, each on its own."""


class KnotsOptions(_SharedOptions):
    """Options of `knots`."""

    density: EachShare = (1.0,)
    """Part of each task's entries that is kept."""
    lambda_: Scale = Field(1.0, alias="lambda")
    """Factor of the merged delta."""
    rank_tolerance: Annotated[Number, Field(ge=0, lt=1)] = 1e-5


def _other(base: Tensor | None, deltas: Sequence[Tensor], options: _SharedOptions) -> Merged:
    """Return the merge of a bias, a norm or an embedding: trimmed, elected, averaged."""
    tasks = as_deltas(deltas)
    drop = options.drop_other if isinstance(options, DrmOptions) else 0.0
    size = tasks.shape.numel()
    lowest_K = [0.0] * len(tasks)
    place = size - round(size * (1 - drop))
    if place >= 1:
        lowest_K = [ordered_values(tasks, k, place - 1)[0] for k in range(len(tasks))]

    def read(k: int, rows: slice) -> Tensor:
        x = tasks.chunk(k, rows)
        return keep_from(x, lowest_K[k]) if lowest_K[k] else x

    weight_K = each(options.weight, len(tasks))
    out = agreeing_mean(read, tasks.chunks(), tasks.new_matrix(), weight_K, elect=options.elect)
    if isinstance(options, KnotsOptions):
        out.mul_(options.lambda_)
    return Merged(out.view(tasks.shape))


def _low_rank_drm(factors_K: Sequence[Factors], options: DrmOptions) -> Factors:
    return _factored(factors_K, options, _drm_coordinates)


def _low_rank_knots(factors_K: Sequence[Factors], options: KnotsOptions) -> Factors:
    return _factored(factors_K, options, _knots_coordinates)


def _working_bytes(
    shape: tuple[int, int],
    k_tasks: int,
    itemsize: int,
    options: _SharedOptions,
    *,
    copies: tuple[int, int],
) -> int:
    """Return the bytes of the larger step: the decomposition, or the tasks' coordinates.

    Args:
        shape: (m, n) of the matrices.
        k_tasks: How many there are.
        itemsize: Bytes per entry of the merge.
        options: Those of the method.
        copies: How often the coordinates are held: of every task, and of one task.
    """
    m, n = reversed(shape) if _is_vertical(options, *shape) else shape
    r, basis_bytes = basis_size(
        m, n, k_tasks, options.decomposition, rank=options.rank, itemsize=itemsize
    )
    entries = (copies[0] * k_tasks + copies[1]) * r * n + m * r
    return max(basis_bytes, itemsize * entries)


@merge_method(
    "drm",
    options=DrmOptions,
    matrix=True,
    working_bytes=partial(_working_bytes, copies=(3, 0)),
    otherwise=_other,
    factored=_low_rank_drm,
    scale_option="weight",  # applied after the election, so a common factor comes out
)
def drm(base: Tensor | None, deltas: Sequence[Tensor], options: DrmOptions) -> Merged:
    """Return DRM's merge of K weight matrices, shape (m, n)."""
    return _dense(deltas, options, _drm_coordinates)


@merge_method(
    "knots",
    options=KnotsOptions,
    matrix=True,
    working_bytes=partial(_working_bytes, copies=(1, 3)),
    otherwise=_other,
    factored=_low_rank_knots,
)
def knots(base: Tensor | None, deltas: Sequence[Tensor], options: KnotsOptions) -> Merged:
    """Return the KnOTS-TIES merge of K weight matrices, shape (m, n)."""
    return _dense(deltas, options, _knots_coordinates)


@dataclass(slots=True)
class _Shared:
    """The tasks in the coordinates of their common space."""

    u: Tensor
    """Directions, shape (m, r)."""
    sigma: Tensor
    """Singular values of the stack, shape (r,), fp64."""
    x_K: list[Tensor]
    """U^T D_k, shape (r, n) each, rows of rounding set to 0."""
    norm_K: list[Tensor]
    """Their row norms, shape (r,) each, fp64; 0 for rows of rounding."""

    def chunks(self) -> Iterator[slice]:
        """Yield ranges of directions whose entries stay in a core's cache."""
        return _chunks(self.x_K[0])


def _chunks(x: Tensor) -> Iterator[slice]:
    rows, columns = x.shape
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _row_norms(x: Tensor) -> Tensor:
    """Return the norms of rows, fp64: in chunks, as `vector_norm` is slow to widen by itself."""
    norm = x.new_empty(len(x), dtype=torch.float64)
    for rows in _chunks(x):
        norm[rows] = torch.linalg.vector_norm(x[rows].double(), dim=1)
    return norm


_Coordinates = Callable[[_Shared, Any], tuple[Tensor, float | None]]
"""Makes X (r, n) and the kept part of the entries from the tasks' coordinates."""


def _dense(deltas: Sequence[Tensor], options: _SharedOptions, merge: _Coordinates) -> Merged:
    tasks = as_deltas(deltas)
    vertical = _is_vertical(options, *tasks.shape)
    u, x, kept = _merged(Transposed(tasks) if vertical else tasks, options, merge)
    return Merged(x.T @ u.T if vertical else u @ x, kept=kept, rank=u.shape[1])


def _factored(
    factors_K: Sequence[Factors], options: _SharedOptions, merge: _Coordinates
) -> Factors:
    """Return the merge as factors; their rank is at most the sum of the ranks.

    With [L_1 | ... | L_K] = Q R, the matrices Q^T D_k = R_k A_k stand for the D_k.
    """
    first = factors_K[0]
    vertical = _is_vertical(options, first.left.shape[0], first.right.shape[1])
    oriented = [factors.transposed() for factors in factors_K] if vertical else factors_K
    q, r = torch.linalg.qr(torch.cat([factors.left for factors in oriented], dim=1))
    parts = r.split([factors.left.shape[1] for factors in oriented], dim=1)
    within = [part @ factors.right for part, factors in zip(parts, oriented, strict=True)]
    u, x, _ = _merged(within, options, merge)
    merged = Factors(q @ u, x)
    return merged.transposed() if vertical else merged


def _is_vertical(options: _SharedOptions, m: int, n: int) -> bool:
    return options.direction == "vertical" or (options.direction == "auto" and m > n)


def _merged(
    matrices: Sequence[Tensor], options: _SharedOptions, merge: _Coordinates
) -> tuple[Tensor, Tensor, float | None]:
    """Return U (m, r), X (r, n) and the kept part of the entries."""
    tasks = to_read(matrices)
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
    for matrix in tasks.in_turn():
        x = u.T @ matrix
        norm = _row_norms(x)
        floor = _ROUNDING[x.dtype] * torch.linalg.vector_norm(matrix)
        x[norm <= floor] = 0
        x_K.append(x)
        norm_K.append(norm.masked_fill_(norm <= floor, 0))
    alive = torch.stack(norm_K).amax(dim=0) > 0
    if not alive.all():  # a tolerance of 0 keeps directions that no task has
        u, sigma = u[:, alive], sigma[alive]
        x_K, norm_K = [x[alive] for x in x_K], [norm[alive] for norm in norm_K]
    return (u, *merge(_Shared(u, sigma, x_K, norm_K), options))


def _drm_coordinates(shared: _Shared, options: DrmOptions) -> tuple[Tensor, float | None]:
    scale_K = shared.norm_K if options.renorm else [shared.sigma] * len(shared.x_K)
    factor_K = [
        torch.where(scale > 0, 1 / scale, 0.0).to(x.dtype)[:, None]
        for scale, x in zip(scale_K, shared.x_K, strict=True)
    ]
    r, n = shared.x_K[0].shape
    total = len(shared.x_K) * r * n
    # As published: the entries at or above the k-th smallest stay, those equal to it included.
    place = total - round(total * (1 - options.drop))
    if place < 1:
        return _average(shared, options), 1.0
    relative = torch.empty(len(shared.x_K), r, n, dtype=factor_K[0].dtype, device=shared.u.device)
    for x, factor, out in zip(shared.x_K, factor_K, relative, strict=True):
        for rows in shared.chunks():
            torch.mul(x[rows].abs(), factor[rows], out=out[rows])
    (lowest,) = order_statistics(relative.view(-1), place - 1)
    del relative
    kept = _prune(shared, [(factor, lowest) for factor in factor_K])
    return _average(shared, options), kept


def _knots_coordinates(shared: _Shared, options: KnotsOptions) -> tuple[Tensor, float | None]:
    """Return X and the kept part: each task trimmed by the magnitude of its own entries."""
    marks: list[tuple[Tensor, float]] = []
    size = shared.x_K[0].numel()
    density_K = each(options.density, len(shared.x_K))
    for x, density in zip(shared.x_K, density_K, strict=True):
        count = max(1, int(density * size)) if density > 0 else 0
        lowest = order_statistics(x.abs().view(-1), -count)[0] if count else torch.inf
        marks.append((torch.ones(len(x), 1, dtype=x.dtype, device=x.device), lowest))
    pruned = any(density < 1 for density in density_K)
    kept = _prune(shared, marks) if pruned else 1.0
    return _average(shared, options).mul_(options.lambda_), kept


def _prune(shared: _Shared, marks: Sequence[tuple[Tensor, float]]) -> float:
    """Zero the entries below their mark (factor times entry below the lowest kept), in place.

    Returns:
        The part of all entries that is left.
    """
    kept = 0
    for x, (factor, lowest) in zip(shared.x_K, marks, strict=True):
        for rows in shared.chunks():
            part = x[rows]
            part.mul_(keep_from(part * factor[rows], lowest).sign_().abs_())
            kept += int(torch.count_nonzero(part))
    return kept / (len(shared.x_K) * shared.x_K[0].numel())


def _average(shared: _Shared, options: _SharedOptions) -> Tensor:
    """Return the agreeing mean of the tasks' coordinates, shape (r, n)."""
    weight_K = each(options.weight, len(shared.x_K))

    def read(k: int, rows: slice) -> Tensor:
        return shared.x_K[k][rows]

    out = torch.empty_like(shared.x_K[0])
    return agreeing_mean(read, shared.chunks(), out, weight_K, elect=options.elect)
