"""Sign election by total mass, and the mean over agreeing tasks, as in TIES and DRM.

Per entry: the elected sign s is that of the tasks' sum; where the sum is exactly 0, s is the
majority sign of the other entries; tasks of another sign are excluded; the entries of the rest,
times the task's coefficient, are averaged over those that are not 0. Shapes: K tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def agreeing_mean(
    read: Callable[[int, slice], Tensor],
    chunks: Iterable[slice],
    out: Tensor,
    coefficient_K: Sequence[float],
    *,
    elect: bool = True,
) -> Tensor:
    """Fill `out` chunk by chunk with the mean over agreeing tasks, and return it.

    Args:
        read: Returns rows of task k, which are not changed.
        chunks: The ranges of rows of `out`.
        out: The result, shape (rows, columns).
        coefficient_K: Factor of each task, applied after the election; 0 excludes a task from the
            mean.
        elect: Whether signs are elected; if not, all entries that are not 0 are averaged.
    """
    # The majority sign is known after all chunks only; those that need it are computed again.
    undecided: list[slice] = []
    balance = 0.0
    for rows in chunks:
        x_K = [read(k, rows) for k in range(len(coefficient_K))]
        sign = _sign_of_sum(x_K) if elect else None
        if sign is not None:
            balance += float(sign.sum(dtype=torch.float64))
            # Entries that cancel exactly: the sum is 0, but a task's entry is not.
            if float(_magnitude(x_K).sign_().sub_(sign.abs()).sum()) > 0:
                undecided.append(rows)
        _mean(x_K, sign, coefficient_K, out[rows])
    majority = (balance > 0) - (balance < 0)
    for rows in undecided if majority else ():
        x_K = [read(k, rows) for k in range(len(coefficient_K))]
        sign = _sign_of_sum(x_K)
        _mean(x_K, sign.masked_fill_(sign == 0, majority), coefficient_K, out[rows])
    return out


# torch's CPU kernels for booleans and `where` are several times as slow as arithmetic, so the masks
# below are numbers: sign().abs() is 1 where an entry is not 0.


def _sign_of_sum(x_K: Sequence[Tensor]) -> Tensor:
    total = x_K[0].clone()
    for x in x_K[1:]:
        total.add_(x)
    return total.sign_()


def _magnitude(x_K: Sequence[Tensor]) -> Tensor:
    total = x_K[0].abs()
    for x in x_K[1:]:
        total.add_(x.abs())
    return total


def _mean(
    x_K: Sequence[Tensor], sign: Tensor | None, coefficient_K: Sequence[float], out: Tensor
) -> None:
    """Write the mean of the tasks' entries of sign `sign` (None: of any sign) to `out`."""
    out.zero_()
    count = torch.zeros_like(out)
    for x, coefficient in zip(x_K, coefficient_K, strict=True):
        if coefficient == 0:
            continue
        if sign is None:
            out.add_(x, alpha=coefficient)
            count.add_(x.sign().abs_())
        else:
            # Times the sign, agreeing entries are positive; the last line turns them back.
            agreeing = (x * sign).clamp_min_(0)
            out.add_(agreeing, alpha=coefficient)
            count.add_(agreeing.sign_())
    out.div_(count.clamp_min_(1))
    if sign is not None:
        out.mul_(sign)
