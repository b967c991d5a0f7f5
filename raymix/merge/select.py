"""The i-th smallest magnitudes of a parameter, without sorting it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raymix.merge.registry import Deltas


def ordered_values(deltas: Deltas, k: int, *ranks: int) -> list[float]:
    """Return the magnitudes of task k at the ranks of ascending order; negative from the top.

    The answer is exact and needs one buffer of the parameter's size.
    """
    magnitude = deltas.new_matrix()
    for rows in deltas.chunks():
        torch.abs(deltas.chunk(k, rows), out=magnitude[rows])
    return order_statistics(magnitude.view(-1), *ranks)


def order_statistics(values: Tensor, *ranks: int) -> list[float]:
    """Return the values at the ranks of ascending order; reorders `values` in place.

    On the CPU numpy's introselect is 18 to 24 times as fast as a sort.
    """
    size = values.numel()
    places = [rank % size for rank in ranks]
    if values.device.type != "cpu":
        return [float(torch.kthvalue(values, place + 1).values) for place in places]
    array: np.ndarray = values.numpy()
    array.partition(sorted(set(places)))
    return [float(array[place]) for place in places]
