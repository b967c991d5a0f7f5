"""Entrywise methods: weighted sums, trimming, random drops, sign election.

They follow one scheme. Each task's delta is sparsified (by magnitude, at random, or both ends cut),
rescaled, and weighted; then either summed or, entry by entry, summed over the tasks that agree with
the sign of the sum. Names, options, defaults and arithmetic are mergekit's, so its files have the
same meaning here, except for two deterministic choices:

* Ties. bf16 deltas take few values, so many entries equal the threshold. All entries at or above
  it survive, and the report has the resulting density; mergekit takes the first k of an order that
  its sort leaves open.
* Random drops come from a generator seeded by (seed, parameter, model): equal on all machines and
  in any order of the jobs.

Sources: task arithmetic (Ilharco et al. 2023), TIES (Yadav et al. 2023), DARE (Yu et al. 2024),
DELLA (Deep et al. 2024), Model Breadcrumbs (Davari and Belilovsky 2023). Work goes over chunks of
rows that fit a core's cache; memory is one buffer of the parameter's size, whatever K is.
Shapes: K tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.methods.order_statistics import (
    kth_largest_magnitude,
    magnitude_order_statistics,
    zero_above,
    zero_below,
)
from raymix.merging.registry import (
    Deltas,
    Factors,
    FractionPerModel,
    Merged,
    Options,
    Scale,
    ScalePerModel,
    as_deltas,
    broadcast_values,
    merge_method,
)
from raymix.recipe.base import Integer

ChunkSparsifier = Callable[[Tensor], Tensor]
"""Returns a chunk with entries set to 0, in place or not; called on the chunks in order."""


class LinearOptions(Options):
    """Options of `linear`."""

    weight: ScalePerModel = (1.0,)
    normalize: bool = True
    """Divide by the sum of the weights."""


class SumOptions(Options):
    """Options of `task_arithmetic`."""

    weight: ScalePerModel = (1.0,)
    normalize: bool = False
    """Divide by the sum of the weights."""
    lambda_: Scale = Field(1.0, alias="lambda")
    """Factor of the merged delta."""
    int8_mask: bool = False
    """Accepted for mergekit's files and ignored: masks are never stored."""
    rescale: bool = False
    """Scale the sparsified delta to the L1 norm of the full one."""
    density: FractionPerModel = (1.0,)
    """Fraction of the entries that survives."""


class TiesOptions(SumOptions):
    """Options of `ties`: sums over agreeing tasks are divided by their weights."""

    normalize: bool = True


class DareOptions(SumOptions):
    """Options of `dare_ties` and `dare_linear`."""

    rescale: bool = True
    rescale_to: str = Field("l1", pattern="^(l1|density)$")
    """`l1`: to the L1 norm (mergekit); `density`: divide by the density (the paper)."""
    seed: Integer = 0
    """Seed of the drops."""


class DellaOptions(DareOptions):
    """Options of `della_linear`."""

    epsilon: ScalePerModel = (0.15,)
    """The survival probability grows from density - epsilon to density + epsilon by rank."""


class DellaTiesOptions(DellaOptions):
    """Options of `della`."""

    normalize: bool = True


class BreadcrumbsOptions(SumOptions):
    """Options of `breadcrumbs` and `breadcrumbs_ties`."""

    gamma: FractionPerModel = (0.01,)
    """Fraction of the entries, the largest ones, that is cut."""


@dataclass(slots=True)
class _Sparsification:
    """Sparsification of one task's delta and the factor applied afterwards."""

    start: Callable[[], ChunkSparsifier] | None = None
    """Returns a new sparsifier per pass, as random ones have a state; None: nothing is cut."""
    factor: float = 1.0
    n_nonzero: int | None = None
    """Number of surviving entries, where it is known in advance."""


def add_factors(factors_K: Sequence[Factors], options: LinearOptions | SumOptions) -> Factors:
    """Return the weighted sum of low-rank deltas as factors; the rank is the sum of the ranks."""
    # [L_1 w_1 | ... | L_K w_K] times the stacked right factors is the sum, without a product.
    weight_K = broadcast_values(options.weight, len(factors_K))
    scale = options.lambda_ if isinstance(options, SumOptions) else 1.0
    if options.normalize:
        scale /= sum(weight_K)
    return Factors(
        torch.cat([f.left * (w * scale) for f, w in zip(factors_K, weight_K, strict=True)], dim=1),
        torch.cat([f.right for f in factors_K], dim=0),
    )


@merge_method("linear", options=LinearOptions, base="none", factored=add_factors)
def linear(base: Tensor | None, deltas: Sequence[Tensor], options: LinearOptions) -> Tensor:
    """Return the weighted mean (or sum) of the models, shape of the parameter."""
    weight_K = broadcast_values(options.weight, len(deltas))
    total = sum(weight_K)
    if options.normalize and abs(total) < 1e-12:
        raise MergeError.at(
            "parameters.weight",
            weight_K,
            "the weights sum to 0 and cannot be normalized",
            fix="Set normalize: false",
        )
    tasks = as_deltas(deltas)
    out = tasks.new_matrix()
    for rows in tasks.chunks():
        mean = out[rows].zero_()
        for k, weight in enumerate(weight_K):
            mean.add_(tasks.chunk(k, rows), alpha=weight)
        # Divided at the end, as mergekit does: normalized weights would round differently.
        if options.normalize:
            mean.div_(total)
    return out.view(tasks.shape)


@merge_method("task_arithmetic", options=SumOptions, factored=add_factors)
def task_arithmetic(base: Tensor | None, deltas: Sequence[Tensor], options: SumOptions) -> Tensor:
    """Return lambda times the weighted sum of the deltas."""
    full = options.model_copy(update={"density": (1.0,)})
    return _merge(as_deltas(deltas), full, _keep_all, elect=False).delta


@merge_method("ties", options=TiesOptions)
def ties(base: Tensor | None, deltas: Sequence[Tensor], options: TiesOptions) -> Merged:
    """Return the mean of the trimmed deltas over the tasks that agree with the elected sign."""
    return _merge(as_deltas(deltas), options, _by_magnitude, elect=True)


@merge_method("dare_ties", options=DareOptions)
@merge_method("dare", options=DareOptions)
def dare_ties(base: Tensor | None, deltas: Sequence[Tensor], options: DareOptions) -> Merged:
    """Return the sum of the randomly dropped deltas over tasks that agree with the elected sign."""
    return _merge(as_deltas(deltas), options, _at_random, elect=True)


@merge_method("dare_linear", options=DareOptions)
def dare_linear(base: Tensor | None, deltas: Sequence[Tensor], options: DareOptions) -> Merged:
    """Return the sum of the randomly dropped deltas."""
    return _merge(as_deltas(deltas), options, _at_random, elect=False)


@merge_method("della", options=DellaTiesOptions)
def della(base: Tensor | None, deltas: Sequence[Tensor], options: DellaTiesOptions) -> Merged:
    """Return DELLA's merge: large entries of a row are dropped less often, then sign election."""
    return _merge(as_deltas(deltas), options, _by_rank, elect=True)


@merge_method("della_linear", options=DellaOptions)
def della_linear(base: Tensor | None, deltas: Sequence[Tensor], options: DellaOptions) -> Merged:
    """Return the sum of deltas with DELLA's random drops, without sign election."""
    return _merge(as_deltas(deltas), options, _by_rank, elect=False)


@merge_method("breadcrumbs", options=BreadcrumbsOptions)
def breadcrumbs(
    base: Tensor | None, deltas: Sequence[Tensor], options: BreadcrumbsOptions
) -> Merged:
    """Return the sum of the deltas without their smallest and their very largest entries."""
    return _merge(as_deltas(deltas), options, _between_magnitudes, elect=False)


@merge_method("breadcrumbs_ties", options=BreadcrumbsOptions)
def breadcrumbs_ties(
    base: Tensor | None, deltas: Sequence[Tensor], options: BreadcrumbsOptions
) -> Merged:
    """Return `breadcrumbs` summed over the tasks that agree with the elected sign."""
    return _merge(as_deltas(deltas), options, _between_magnitudes, elect=True)


def _merge(
    deltas: Deltas,
    options: SumOptions,
    make_sparsification: Callable[[Deltas, int, SumOptions], _Sparsification],
    *,
    elect: bool,
) -> Merged:
    """Return the merge; `make_sparsification` reads a task for thresholds and rescaling factor."""
    weight_K = broadcast_values(options.weight, len(deltas))
    plan_K = [make_sparsification(deltas, k, options) for k in range(len(deltas))]
    # One sparsifier per task for the full pass: its generator goes on from chunk to chunk.
    sparsify_K = [plan.start() if plan.start else None for plan in plan_K]
    scale_K = [weight * plan.factor for weight, plan in zip(weight_K, plan_K, strict=True)]
    out, n_nonzero = deltas.new_matrix(), sum(plan.n_nonzero or 0 for plan in plan_K)
    combine = _sum_agreeing if elect else _sum
    for rows in deltas.chunks():
        x_K = []
        for k, sparsify in enumerate(sparsify_K):
            x = deltas.chunk(k, rows)
            if sparsify is not None:
                x = sparsify(x)
                n_nonzero += int(torch.count_nonzero(x)) if plan_K[k].n_nonzero is None else 0
            x_K.append(x if scale_K[k] == 1 else x.mul_(scale_K[k]))
        combine(x_K, weight_K, out[rows], normalize=options.normalize)
    if options.lambda_ != 1:
        out.mul_(options.lambda_)
    pruned = any(sparsify is not None for sparsify in sparsify_K)
    size = max(1, len(deltas) * out.numel())
    return Merged(out.view(deltas.shape), density=n_nonzero / size if pruned else None)


def _sum(x_K: Sequence[Tensor], weight_K: Sequence[float], out: Tensor, *, normalize: bool) -> None:
    """Write the sum of the tasks to `out`; `normalize`: divided by the sum of their weights."""
    out.copy_(x_K[0])
    for x in x_K[1:]:
        out.add_(x)
    total = sum(weight_K)
    if normalize and abs(total) >= 1e-8:  # mergekit's guard for weights that cancel
        out.div_(total)


def _sum_agreeing(
    x_K: Sequence[Tensor], weight_K: Sequence[float], out: Tensor, *, normalize: bool
) -> None:
    """Write the sum over the tasks that agree with its sign to `out`; overwrites `x_K`.

    A sum of 0 counts as positive. Masks are numbers: torch's operations on booleans are several
    times as slow on a CPU.
    """
    total = x_K[0].clone()
    for x in x_K[1:]:
        total.add_(x)
    # Entries that cancel exactly sum to +0, which elects the positive sign, as in mergekit. A sum
    # of -0 means that all tasks have -0, and then no sign matters.
    sign = torch.copysign(out.fill_(1), total)
    out.zero_()
    divisor = torch.zeros_like(out) if normalize else None
    for x, weight in zip(x_K, weight_K, strict=True):
        agreeing = x.mul_(sign).clamp_min_(0)  # positive where the signs agree
        out.add_(agreeing)
        if divisor is not None:
            divisor.add_(agreeing.sign_(), alpha=weight)
    if divisor is not None:
        min_weight = min(weight_K)
        if min_weight > 0:
            # A divisor is then 0 or at least the smallest weight, so the clamp changes zeros only.
            divisor.clamp_min_(min_weight)
        else:
            divisor.masked_fill_(divisor == 0, 1)
        out.div_(divisor)
    out.mul_(sign)


def _keep_all(deltas: Deltas, k: int, options: SumOptions) -> _Sparsification:
    return _Sparsification()


def _by_magnitude(deltas: Deltas, k: int, options: SumOptions) -> _Sparsification:
    density = broadcast_values(options.density, len(deltas))[k]
    if density >= 1:
        return _Sparsification()
    count = max(1, int(density * deltas.shape.numel())) if density > 0 else 0
    threshold, n_nonzero = kth_largest_magnitude(deltas, k, count) if count else (torch.inf, 0)
    plan = _Sparsification(lambda: lambda x: zero_below(x, threshold), n_nonzero=n_nonzero)
    return _rescaled(deltas, k, plan, options)


def _between_magnitudes(deltas: Deltas, k: int, options: SumOptions) -> _Sparsification:
    density = broadcast_values(options.density, len(deltas))[k]
    if density >= 1:
        return _Sparsification()
    gamma_K = options.gamma if isinstance(options, BreadcrumbsOptions) else (0.0,)
    size = deltas.shape.numel()
    count, n_top = int(density * size), int(broadcast_values(gamma_K, len(deltas))[k] * size)
    # The surviving band ends below the n_top largest entries; the entries under it are cut.
    n_below = max(0, size - count - n_top)
    if not count:
        return _Sparsification(lambda: lambda x: x.zero_())
    low, high = magnitude_order_statistics(deltas, k, n_below, n_below + count - 1)
    plan = _Sparsification(lambda: lambda x: zero_above(zero_below(x, low), high))
    return _rescaled(deltas, k, plan, options)


def _at_random(deltas: Deltas, k: int, options: SumOptions) -> _Sparsification:
    density = broadcast_values(options.density, len(deltas))[k]
    if density >= 1:
        return _Sparsification()

    def start() -> ChunkSparsifier:
        draw = _BernoulliMask(options, k)
        return lambda x: x.mul_(draw(torch.full(x.shape, density), x))

    return _rescaled(deltas, k, _Sparsification(start), options)


def _by_rank(deltas: Deltas, k: int, options: SumOptions) -> _Sparsification:
    density = broadcast_values(options.density, len(deltas))[k]
    epsilon_K = options.epsilon if isinstance(options, DellaOptions) else (0.0,)
    epsilon = broadcast_values(epsilon_K, len(deltas))[k]
    if density >= 1:
        return _Sparsification()
    if density <= 0:
        return _Sparsification(lambda: lambda x: x.zero_())
    if not (density - epsilon > 0 and density + epsilon < 1):
        raise MergeError.at(
            "parameters.epsilon",
            epsilon,
            f"density {density:g} -/+ epsilon must lie between 0 and 1",
            fix="Lower epsilon",
        )

    def start() -> ChunkSparsifier:
        draw = _BernoulliMask(options, k)

        def sparsify(x: Tensor) -> Tensor:
            # Stable, because ties are common in bf16 deltas and must not differ between machines.
            order = x.abs().argsort(dim=1, stable=True)
            probability = torch.empty_like(x)
            steps = torch.linspace(-epsilon, epsilon, x.shape[1], dtype=x.dtype, device=x.device)
            probability.scatter_(1, order, (steps + density).expand_as(x))
            return x.mul_(draw(probability.cpu(), x))

        return sparsify

    return _rescaled(deltas, k, _Sparsification(start), options)


class _BernoulliMask:
    """Random masks for one task of one parameter; drawn on the CPU, so equal on all devices."""

    def __init__(self, options: SumOptions, k: int) -> None:
        # `options.seed` has the parameter's name in it (see `run.work`); a large prime keeps the
        # seeds of the tasks apart. torch takes seeds of 63 bits.
        seed = options.seed if isinstance(options, DareOptions) else 0
        self._generator = torch.Generator().manual_seed((seed * 1_000_003 + k) % (1 << 63))

    def __call__(self, probability: Tensor, like: Tensor) -> Tensor:
        """Return 1 with the given probabilities, else 0, in device and dtype of `like`."""
        drawn = torch.rand(probability.shape, generator=self._generator)
        return (probability - drawn).sign_().clamp_min_(0).to(like)


def _rescaled(
    deltas: Deltas, k: int, plan: _Sparsification, options: SumOptions
) -> _Sparsification:
    """Return the plan with the factor of `rescale`, computed in a pass over the task."""
    if not options.rescale or plan.start is None:
        return plan
    if isinstance(options, DareOptions) and options.rescale_to == "density":
        density = broadcast_values(options.density, len(deltas))[k]
        plan.factor = 1 / density if density else 1.0
        return plan
    # The sparsifier of this pass draws the same mask as that of the merge: both start anew.
    sparsify, before, after = plan.start(), 0.0, 0.0
    for rows in deltas.chunks():
        x = deltas.chunk(k, rows)
        before += float(x.abs().sum(dtype=torch.float64))
        after += float(sparsify(x).abs().sum(dtype=torch.float64))
    # mergekit's guard for deltas that are nearly 0.
    plan.factor = before / after if before >= 1e-7 and after >= 1e-7 else 1.0
    return plan
