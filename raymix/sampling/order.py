"""The n-th sample of a domain: a pure function of (seed, domain, n), O(1), no tables.

A domain's samples (rows or documents) lie in *groups* (blocks) on disk. Sample n belongs to epoch
n // units. In every epoch the full groups are put into a keyed random order, a shorter last group
after them; `window` consecutive groups of that order form a window, and the samples inside a
window are put into a keyed random order. So an epoch visits every sample exactly once, while the
samples of a stretch come from at most `window` groups at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from raymix.errors import CorpusError
from raymix.sampling._bits import MAX_PERMUTATION, U64, Radix, mix64, mix_int, permute
from raymix.sampling.shares import Ints

# Odd constants keep the keys of epochs and windows apart.
_EPOCH = np.uint64(0x9E3779B97F4A7C15)
_WINDOW = np.uint64(0xD1B54A32D192ED03)


def domain_key(name: str) -> int:
    """Return a 64-bit key of a domain's name, the same on every platform and in every version."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class DomainGeometry:
    """How a domain's samples lie in groups."""

    name: str
    units: int
    """Samples per epoch: rows or documents."""
    group_units: int
    """Samples per full group; the last group may hold fewer."""

    def __post_init__(self) -> None:
        if self.units < 1 or self.group_units < 1:
            raise CorpusError.at(
                f"corpus.{self.name}",
                self.units,
                f"no samples (in groups of {self.group_units})",
                fix="Every domain needs at least one row or document of training data",
            )

    @property
    def key(self) -> int:
        """Return the 64-bit key of the name."""
        return domain_key(self.name)


@dataclass(frozen=True, slots=True)
class _OrderShape:
    """Numbers of a domain as uint64, one each or one per element, shapes () or (N,)."""

    key: U64
    group_key: U64
    units: U64
    group_units: U64
    window_groups: U64
    window_units: U64
    last_window: U64
    full_groups: U64
    groups: Radix
    """Of the full groups."""
    inside: Radix
    """Of the samples in a window; per domain two: a whole window, the last window."""


class CorpusOrder:
    """The orders of all domains of a corpus, looked up together.

    Args of the constructor:
        geometries: One per domain.
        seed: The run's seed.
        window: Groups shuffled together, >= 1.
    """

    def __init__(self, geometries: Sequence[DomainGeometry], *, seed: int, window: int) -> None:
        self.geometries = tuple(geometries)
        self.window = window
        units = np.array([g.units for g in geometries], dtype=np.int64)
        size = np.array([g.group_units for g in geometries], dtype=np.int64)
        full = units // size
        if (full > MAX_PERMUTATION).any() or (size > MAX_PERMUTATION).any():
            raise CorpusError.at(
                "corpus", int(full.max()), f"more than {MAX_PERMUTATION} blocks or rows in a block"
            )
        # A window of more groups than the domain has is one of all its groups.
        width = np.minimum(np.minimum(window, full + 1), np.maximum(1, MAX_PERMUTATION // size))
        last = (units - 1) // (width * size)
        inside = np.stack([np.minimum(width * size, units), units - last * width * size], axis=1)
        seed_key = mix_int(seed)
        # By name, not position: a domain keeps its order when another is added to the recipe.
        keys = [mix_int(seed_key ^ g.key) for g in geometries]
        self._shapes = _OrderShape(
            key=np.array(keys, dtype=np.uint64),
            group_key=mix64(np.array(keys, dtype=np.uint64)),
            units=units.astype(np.uint64),
            group_units=size.astype(np.uint64),
            window_groups=width.astype(np.uint64),
            window_units=(width * size).astype(np.uint64),
            last_window=last.astype(np.uint64),
            full_groups=full.astype(np.uint64),
            groups=Radix.of(np.maximum(full, 1)),
            inside=Radix.of(inside.ravel()),
        )

    def locate(self, domain: Ints, n: Ints) -> tuple[Ints, Ints, Ints]:
        """Return (epoch, group, sample in the group) of samples `n` >= 0, each shape (N,)."""
        domain = np.asarray(domain, dtype=np.int64)
        return _locate(_take(self._shapes, domain), domain * 2, np.asarray(n), self._shapes.inside)

    def of(self, domain: int) -> DomainOrder:
        """Return the order of one domain."""
        return DomainOrder._view(self, domain)


class DomainOrder:
    """The order of one domain's samples; see the module's text."""

    def __init__(self, geometry: DomainGeometry, *, seed: int, window: int) -> None:
        self._bind(CorpusOrder([geometry], seed=seed, window=window), 0)

    @classmethod
    def _view(cls, orders: CorpusOrder, domain: int) -> DomainOrder:
        order = cls.__new__(cls)
        order._bind(orders, domain)
        return order

    def _bind(self, orders: CorpusOrder, domain: int) -> None:
        self.geometry = orders.geometries[domain]
        self._inside = orders._shapes.inside
        self._shape = _take(orders._shapes, domain)
        self._pair = 2 * domain

    def locate(self, n: Ints) -> tuple[Ints, Ints, Ints]:
        """Return (epoch, group, sample in the group) of samples `n` >= 0, each shape (N,)."""
        return _locate(self._shape, self._pair, np.asarray(n), self._inside)


def _take(shapes: _OrderShape, at: Ints | int) -> _OrderShape:
    where = (at, ...) if isinstance(at, int) else at
    return _OrderShape(
        key=shapes.key[where],
        group_key=shapes.group_key[where],
        units=shapes.units[where],
        group_units=shapes.group_units[where],
        window_groups=shapes.window_groups[where],
        window_units=shapes.window_units[where],
        last_window=shapes.last_window[where],
        full_groups=shapes.full_groups[where],
        groups=shapes.groups.take(at),
        inside=shapes.inside,
    )


def _locate(
    shape: _OrderShape, pair: Ints | int, n: Ints, inside: Radix
) -> tuple[Ints, Ints, Ints]:
    place = n.astype(np.uint64)
    epoch = place // shape.units
    place -= epoch * shape.units
    window = place // shape.window_units
    place -= window * shape.window_units
    radix = _window_sizes(shape, pair, window, inside)
    place = permute(place, mix64(epoch * _EPOCH + window * _WINDOW + shape.key), radix)
    position = place // shape.group_units
    place -= position * shape.group_units
    position += window * shape.window_groups
    # The shorter last group always comes last: permuted among the others it would shift them.
    tail = position == shape.full_groups
    if np.count_nonzero(tail):
        group = _full_group(np.where(tail, 0, position), epoch, shape)
        group = np.where(tail, shape.full_groups, group)
    else:
        group = _full_group(position, epoch, shape)
    return epoch.astype(np.int64), group.astype(np.int64), place.astype(np.int64)


def _window_sizes(shape: _OrderShape, pair: Ints | int, window: U64, inside: Radix) -> Radix:
    in_last = window == shape.last_window
    n_last = np.count_nonzero(in_last)
    # One domain, one window size: scalars broadcast, which is several times faster.
    if isinstance(pair, int) and n_last in {0, in_last.size}:
        return inside.take(pair + int(n_last > 0))
    return inside.take(pair + in_last)


def _full_group(position: U64, epoch: U64, shape: _OrderShape) -> U64:
    """Return which full group stands at `position` of the epoch's order."""
    if np.ndim(shape.key) or not position.size:
        return permute(position, mix64(epoch * _EPOCH + shape.group_key), shape.groups)
    # Samples read together share windows: look each of their positions up once.
    n_groups = np.maximum(shape.full_groups, 1)
    place = epoch * n_groups + position
    first, last = place.min(), place.max()
    if int(last - first) >= place.size // 2:
        return permute(position, mix64(epoch * _EPOCH + shape.group_key), shape.groups)
    positions = np.arange(first, last + 1, dtype=np.uint64)
    epochs = positions // n_groups
    positions -= epochs * n_groups
    keys = mix64(epochs * _EPOCH + shape.group_key)
    return permute(positions, keys, shape.groups)[(place - first).view(np.int64)]


def step_order(seed: int, first_step: int, n_steps: int, n_rows: int) -> Ints:
    """Return a keyed random order of the rows of each step, shape (S, B): row s permutes range(B).

    It depends on (seed, step, B) only, never on how many steps are asked for at once.
    """
    bits = max(1, (n_rows - 1).bit_length())
    low = np.uint64((1 << bits) - 1)
    base = mix_int(mix_int(seed) ^ 0x5DEECE66D)
    steps = np.arange(first_step, first_step + n_steps, dtype=np.uint64)
    rows = np.arange(n_rows, dtype=np.uint64)
    key_S = mix64(steps * _EPOCH + np.uint64(base))
    hash_SB = mix64(key_S[:, None] + rows * _WINDOW)
    # The row's number in the low bits makes the keys distinct: sorting them sorts the rows.
    hash_SB = (hash_SB & ~low) | rows
    hash_SB.sort(axis=1)  # in place: (steps, rows) may be millions
    return (hash_SB & low).astype(np.int64)
