"""Merging entry by entry: weighted sums, trimming, random drops, sign election.

All of it is one scheme. Each task's delta is thinned (by magnitude, at random, or both ends cut),
rescaled, and weighted; then either summed or, entry by entry, reduced to the tasks that agree with
the sign of the sum. Names, options, defaults and arithmetic are mergekit's, so its files mean
the same here, but for two things that are stated and deterministic:

* Ties. bf16 deltas take few values, so many entries equal the threshold. All entries at or above
  it are kept, and the report says which fraction that was; mergekit keeps the first k of an order
  that its sort leaves open.
* Random drops come from a generator seeded by (seed, parameter, model): the same on every
  machine and in any order of the work.

Sources: task arithmetic (Ilharco et al. 2023), TIES (Yadav et al. 2023), DARE (Yu et al. 2024),
DELLA (Deep et al. 2024), Model Breadcrumbs (Davari and Belilovsky 2023). Work goes over chunks of
rows that stay in a core's cache; memory is one buffer of the parameter's size, whatever K is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.methods.order_statistics import (
    keep_from,
    keep_up_to,
    largest,
    ordered_values,
)
from raymix.merging.registry import (
    Deltas,
    EachScale,
    EachShare,
    Factors,
    Merged,
    Options,
    Scale,
    as_deltas,
    each,
    merge_method,
)
from raymix.recipe.base import Integer

Thin = Callable[[Tensor], Tensor]
"""Returns a chunk with entries set to 0, in place or not; called on the chunks in their order."""


class LinearOptions(Options):
    """Options of `linear`."""

    weight: EachScale = (1.0,)
    normalize: bool = True
    """Divide by the sum of the weights."""


class SumOptions(Options):
    """Options of `task_arithmetic`."""

    weight: EachScale = (1.0,)
    normalize: bool = False
    """Divide by the sum of the weights."""
    lambda_: Scale = Field(1.0, alias="lambda")
    """Factor of the merged delta."""
    int8_mask: bool = False
    """Taken for mergekit's sake; masks are never stored."""
    rescale: bool = False
    """Scale what is left of a delta to the L1 norm it had."""
    density: EachShare = (1.0,)
    """Part of the entries that is kept."""


class TiesOptions(SumOptions):
    """Options of `ties`: sums over the tasks that agree are divided by their weights."""

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

    epsilon: EachScale = (0.15,)
    """The probability to be kept runs from density - epsilon to density + epsilon by rank."""


class DellaTiesOptions(DellaOptions):
    """Options of `della`."""

    normalize: bool = True


class BreadcrumbsOptions(SumOptions):
    """Options of `breadcrumbs` and `breadcrumbs_ties`."""

    gamma: EachShare = (0.01,)
    """Part of the entries that is cut for being the largest."""


@dataclass(slots=True)
class _Thinning:
    """How one task's delta is thinned: a fresh `Thin` per pass, and the factor afterwards."""

    start: Callable[[], Thin] | None = None
    factor: float = 1.0
    kept: int | None = None
    """Entries that are left, where that is known beforehand."""


def add(factors_K: Sequence[Factors], options: LinearOptions | SumOptions) -> Factors:
    """Return the weighted sum of low-rank deltas as factors whose rank is the sum of ranks."""
    weight_K = each(options.weight, len(factors_K))
    scale = options.lambda_ if isinstance(options, SumOptions) else 1.0
    if options.normalize:
        scale /= sum(weight_K)
    return Factors(
        torch.cat([f.left * (w * scale) for f, w in zip(factors_K, weight_K, strict=True)], dim=1),
        torch.cat([f.right for f in factors_K], dim=0),
    )


@merge_method("linear", options=LinearOptions, base="none", factored=add)
def linear(base: Tensor | None, deltas: Sequence[Tensor], options: LinearOptions) -> Tensor:
    """Return the weighted mean (or sum) of the models, shape of the parameter."""
    weight_K = each(options.weight, len(deltas))
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
        if options.normalize:
            mean.div_(total)
    return out.view(tasks.shape)


@merge_method("task_arithmetic", options=SumOptions, factored=add)
def task_arithmetic(base: Tensor | None, deltas: Sequence[Tensor], options: SumOptions) -> Tensor:
    """Return lambda times the weighted sum of the deltas."""
    full = options.model_copy(update={"density": (1.0,)})
    return _merge(as_deltas(deltas), full, _nothing, elect=False).delta


@merge_method("ties", options=TiesOptions)
def ties(base: Tensor | None, deltas: Sequence[Tensor], options: TiesOptions) -> Merged:
    """Return the trimmed deltas' mean over the tasks that agree with the elected sign."""
    return _merge(as_deltas(deltas), options, _by_magnitude, elect=True)


@merge_method("dare_ties", options=DareOptions)
@merge_method("dare", options=DareOptions)
def dare_ties(base: Tensor | None, deltas: Sequence[Tensor], options: DareOptions) -> Merged:
    """Return the randomly thinned deltas' sum over the tasks that agree with the elected sign."""
    return _merge(as_deltas(deltas), options, _at_random, elect=True)


@merge_method("dare_linear", options=DareOptions)
def dare_linear(base: Tensor | None, deltas: Sequence[Tensor], options: DareOptions) -> Merged:
    """Return the sum of the randomly thinned deltas."""
    return _merge(as_deltas(deltas), options, _at_random, elect=False)


@merge_method("della", options=DellaTiesOptions)
def della(base: Tensor | None, deltas: Sequence[Tensor], options: DellaTiesOptions) -> Merged:
    """Return DELLA's merge: drops less likely for large entries of a row, then sign election."""
    return _merge(as_deltas(deltas), options, _by_rank, elect=True)


@merge_method("della_linear", options=DellaOptions)
def della_linear(base: Tensor | None, deltas: Sequence[Tensor], options: DellaOptions) -> Merged:
    """Return the sum of deltas thinned as DELLA does."""
    return _merge(as_deltas(deltas), options, _by_rank, elect=False)


@merge_method("breadcrumbs", options=BreadcrumbsOptions)
def breadcrumbs(
    base: Tensor | None, deltas: Sequence[Tensor], options: BreadcrumbsOptions
) -> Merged:
    """Return the sum of the deltas without their smallest and their very largest entries."""
    return _merge(as_deltas(deltas), options, _without_ends, elect=False)


@merge_method("breadcrumbs_ties", options=BreadcrumbsOptions)
def breadcrumbs_ties(
    base: Tensor | None, deltas: Sequence[Tensor], options: BreadcrumbsOptions
) -> Merged:
    """Return the same reduced to the tasks that agree with the elected sign."""
    return _merge(as_deltas(deltas), options, _without_ends, elect=True)


def _merge(
    deltas: Deltas,
    options: SumOptions,
    thinning: Callable[[Deltas, int, SumOptions], _Thinning],
    *,
    elect: bool,
) -> Merged:
    """Return the merge of all tasks; `thinning` reads a task once and says how to thin it."""
    weight_K = each(options.weight, len(deltas))
    plan_K = [thinning(deltas, k, options) for k in range(len(deltas))]
    thin_K = [plan.start() if plan.start else None for plan in plan_K]
    scale_K = [weight * plan.factor for weight, plan in zip(weight_K, plan_K, strict=True)]
    out, kept = deltas.new_matrix(), sum(plan.kept or 0 for plan in plan_K)
    combine = _agreeing if elect else _summed
    for rows in deltas.chunks():
        found = []
        for k, thin in enumerate(thin_K):
            x = deltas.chunk(k, rows)
            if thin is not None:
                x = thin(x)
                kept += int(torch.count_nonzero(x)) if plan_K[k].kept is None else 0
            found.append(x if scale_K[k] == 1 else x.mul_(scale_K[k]))
        combine(found, weight_K, out[rows], normalize=options.normalize)
    if options.lambda_ != 1:
        out.mul_(options.lambda_)
    pruned = any(thin is not None for thin in thin_K)
    whole = len(deltas) * out.numel()
    return Merged(out.view(deltas.shape), kept=kept / max(1, whole) if pruned else None)


def _summed(
    x_K: Sequence[Tensor], weight_K: Sequence[float], out: Tensor, *, normalize: bool
) -> None:
    """Write the sum of the tasks to `out`, divided by their weights when `normalize`."""
    out.copy_(x_K[0])
    for x in x_K[1:]:
        out.add_(x)
    total = sum(weight_K)
    if normalize and abs(total) >= 1e-8:
        out.div_(total)


def _agreeing(
    x_K: Sequence[Tensor], weight_K: Sequence[float], out: Tensor, *, normalize: bool
) -> None:
    """Write the sum over the tasks that agree with its sign (a sum of 0 counts as positive).

    Masks are numbers here: torch's operations on booleans are several times as slow on a CPU.
    """
    total = x_K[0].clone()
    for x in x_K[1:]:
        total.add_(x)
    # What cancels exactly gives +0; -0 stands where no task has anything.
    sign = torch.copysign(out.fill_(1), total)
    out.zero_()
    divisor = torch.zeros_like(out) if normalize else None
    for x, weight in zip(x_K, weight_K, strict=True):
        agreeing = x.mul_(sign).clamp_min_(0)  # in the frame of the elected sign
        out.add_(agreeing)
        if divisor is not None:
            divisor.add_(agreeing.sign_(), alpha=weight)
    if divisor is not None:
        least = min(weight_K)
        # With positive weights a divisor is 0 or at least the least of them.
        out.div_(divisor.clamp_min_(least) if least > 0 else divisor.masked_fill_(divisor == 0, 1))
    out.mul_(sign)


def _nothing(deltas: Deltas, k: int, options: SumOptions) -> _Thinning:
    return _Thinning()


def _by_magnitude(deltas: Deltas, k: int, options: SumOptions) -> _Thinning:
    density = each(options.density, len(deltas))[k]
    if density >= 1:
        return _Thinning()
    count = max(1, int(density * deltas.shape.numel())) if density > 0 else 0
    lowest, kept = largest(deltas, k, count) if count else (torch.inf, 0)
    plan = _Thinning(lambda: lambda x: keep_from(x, lowest), kept=kept)
    return _rescaled(deltas, k, plan, options)


def _without_ends(deltas: Deltas, k: int, options: SumOptions) -> _Thinning:
    density = each(options.density, len(deltas))[k]
    if density >= 1:
        return _Thinning()
    gamma_K = options.gamma if isinstance(options, BreadcrumbsOptions) else (0.0,)
    size = deltas.shape.numel()
    count, top = int(density * size), int(each(gamma_K, len(deltas))[k] * size)
    below = max(0, size - count - top)
    if not count:
        return _Thinning(lambda: lambda x: x.zero_())
    low, high = ordered_values(deltas, k, below, below + count - 1)
    plan = _Thinning(lambda: lambda x: keep_up_to(keep_from(x, low), high))
    return _rescaled(deltas, k, plan, options)


def _at_random(deltas: Deltas, k: int, options: SumOptions) -> _Thinning:
    density = each(options.density, len(deltas))[k]
    if density >= 1:
        return _Thinning()

    def start() -> Thin:
        draw = _Draw(options, k)
        return lambda x: x.mul_(draw(torch.full(x.shape, density), x))

    return _rescaled(deltas, k, _Thinning(start), options)


def _by_rank(deltas: Deltas, k: int, options: SumOptions) -> _Thinning:
    density = each(options.density, len(deltas))[k]
    epsilon_K = options.epsilon if isinstance(options, DellaOptions) else (0.0,)
    epsilon = each(epsilon_K, len(deltas))[k]
    if density >= 1:
        return _Thinning()
    if density <= 0:
        return _Thinning(lambda: lambda x: x.zero_())
    if not (density - epsilon > 0 and density + epsilon < 1):
        raise MergeError.at(
            "parameters.epsilon",
            epsilon,
            f"density {density:g} -/+ epsilon must lie between 0 and 1",
            fix="Lower epsilon",
        )

    def start() -> Thin:
        draw = _Draw(options, k)

        def thin(x: Tensor) -> Tensor:
            order = x.abs().argsort(dim=1, stable=True)
            probability = torch.empty_like(x)
            steps = torch.linspace(-epsilon, epsilon, x.shape[1], dtype=x.dtype, device=x.device)
            probability.scatter_(1, order, (steps + density).expand_as(x))
            return x.mul_(draw(probability.cpu(), x))

        return thin

    return _rescaled(deltas, k, _Thinning(start), options)


class _Draw:
    """Coin tosses for one task of one parameter; on the CPU, so on every device the same."""

    def __init__(self, options: SumOptions, k: int) -> None:
        seed = options.seed if isinstance(options, DareOptions) else 0
        self._generator = torch.Generator().manual_seed((seed * 1_000_003 + k) % (1 << 63))

    def __call__(self, probability: Tensor, like: Tensor) -> Tensor:
        """Return 1 with the given probabilities and 0 else, where and of the dtype of `like`."""
        drawn = torch.rand(probability.shape, generator=self._generator)
        return (probability - drawn).sign_().clamp_min_(0).to(like)


def _rescaled(deltas: Deltas, k: int, plan: _Thinning, options: SumOptions) -> _Thinning:
    """Return the plan with the factor that `rescale` asks for, from a pass over the task."""
    if not options.rescale or plan.start is None:
        return plan
    if isinstance(options, DareOptions) and options.rescale_to == "density":
        density = each(options.density, len(deltas))[k]
        plan.factor = 1 / density if density else 1.0
        return plan
    thin, before, after = plan.start(), 0.0, 0.0
    for rows in deltas.chunks():
        x = deltas.chunk(k, rows)
        before += float(x.abs().sum(dtype=torch.float64))
        after += float(thin(x).abs().sum(dtype=torch.float64))
    # mergekit's guard for deltas that are next to nothing.
    plan.factor = before / after if before >= 1e-7 and after >= 1e-7 else 1.0
    return plan
