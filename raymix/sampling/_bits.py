"""Keyed integer hashing and keyed permutations of [0, n), vectorized, without tables.

`permute` writes x < n as (high, low) with 2**j values of low and a = ceil(n / 2**j) values of
high, and runs a Feistel network over the pair: in turn low is xored with a hash of high, and high
advances modulo a by a hash of low. Each half round is invertible, so the network permutes
[0, a * 2**j), at most 2**j - 1 values more than n; the few results beyond n are sent through again
("cycle walking"), which keeps the map a permutation of [0, n). With j about half the bits of n
that concerns less than one value in sqrt(n).

Four half rounds are random enough for large n; small n get more (measured: joint positions of
neighbors, jumps, fixed points and the correlation of two keys against a random order).

Everything is unsigned arithmetic modulo 2**32 or 2**64: the same on every platform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

MASK_64 = (1 << 64) - 1
MAX_PERMUTATION = 1 << 30
"""Largest n that `permute` can permute."""
# 0-d arrays: numpy takes them faster than its scalars.
_MIX = tuple(np.array(odd, dtype=np.uint64) for odd in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_S27, _S30, _S31, _S32 = (np.array(bits, dtype=np.uint64) for bits in (27, 30, 31, 32))
_S15, _S16 = (np.array(bits, dtype=np.uint32) for bits in (15, 16))
# One pair of odd multipliers per half round. Any would do, but never others: they fix the order
# of every run.
_HALVES = tuple(
    (np.array(first, dtype=np.uint32), np.array(second, dtype=np.uint32))
    for first, second in (
        (0x9E3779B1, 0x85EBCA77),
        (0xC2B2AE3D, 0x27D4EB2F),
        (0x165667B1, 0xD3A2646D),
        (0xFD7046C5, 0xB55A4F09),
        (0x7FEB352D, 0x846CA68B),
        (0xCC9E2D51, 0x1B873593),
        (0xE6546B65, 0xA136AAAD),
        (0x9F6D62D7, 0x8DA6B343),
    )
)
# (first half round, end, largest n that gets them)
_EXTRA = ((4, 6, 512), (6, 8, 32))


def mix64(value: U64) -> U64:
    """Return a 64-bit hash of each element (splitmix64's finalizer, Steele et al. 2014)."""
    mixed = value ^ (value >> _S30)
    mixed *= _MIX[0]
    mixed ^= mixed >> _S27
    mixed *= _MIX[1]
    mixed ^= mixed >> _S31
    return mixed


def mix_int(value: int) -> int:
    """Return `mix64` of one Python integer, taken modulo 2**64."""
    return int(mix64(np.array([value & MASK_64], dtype=np.uint64))[0])


@dataclass(frozen=True, slots=True)
class Radix:
    """How [0, n) is split for `permute`; fields are uint32, one each or one per element."""

    n: U32
    low_bits: U32
    """j"""
    low_mask: U32
    """2**j - 1"""
    high_size: U32
    """a"""
    hash_shift: U32
    """32 - j: takes the top j bits of a hash."""

    @classmethod
    def of(cls, n: NDArray[np.int64]) -> Radix:
        """Return the splits of the sizes `n`, each from 1 to `MAX_PERMUTATION`."""
        low_bits = np.array([_low_bits(size) for size in n.tolist()])
        low_size = np.int64(1) << low_bits
        fields = (n, low_bits, low_size - 1, -(-n // low_size), 32 - low_bits)
        return cls(*(field.astype(np.uint32) for field in fields))

    def take(self, at: NDArray[np.int64] | int) -> Radix:
        """Return the splits at the positions `at`; for one position, fields of shape ()."""
        where = (at, ...) if isinstance(at, int) else at
        return Radix(
            self.n[where],
            self.low_bits[where],
            self.low_mask[where],
            self.high_size[where],
            self.hash_shift[where],
        )


def _low_bits(n: int) -> int:
    """Return j: about half the bits of n, for large n where a * 2**j exceeds n the least."""
    half = max(1, (n - 1).bit_length() // 2)
    if n <= _EXTRA[0][2]:
        return half
    return min((half, half - 1, half + 1), key=lambda bits: -n % (1 << bits))


def permute(value: U64, key: U64, radix: Radix) -> U64:
    """Return the keyed permutation of [0, radix.n) at each `value`, as a new array.

    Args:
        value: Elements of [0, n), shape (N,).
        key: One 64-bit key per element, shape (N,); equal keys and sizes give one permutation.
        radix: The size n, one for all or one per element.
    """
    keys = key.astype(np.uint32), (key >> _S32).astype(np.uint32)
    out = _network(value.astype(np.uint32), keys, radix)
    beyond = np.flatnonzero(out >= radix.n)
    # Cycle walking: a permutation restricted to [0, n) this way is a permutation of it.
    while beyond.size:
        part = radix.take(beyond) if np.ndim(radix.n) else radix
        walked = _network(out[beyond], _at(keys, beyond), part)
        out[beyond] = walked
        beyond = beyond[walked >= part.n]
    return out.astype(np.uint64)


def _network(value: U32, keys: tuple[U32, U32], radix: Radix) -> U32:
    low = value & radix.low_mask
    high = value >> radix.low_bits
    if np.ndim(radix.n):
        _half_rounds(low, high, keys, radix, range(_EXTRA[0][0]))
        for first, end, largest in _EXTRA:
            part = np.flatnonzero(radix.n <= largest)
            if part.size:
                part_low, part_high, part_keys = low[part], high[part], _at(keys, part)
                _half_rounds(part_low, part_high, part_keys, radix.take(part), range(first, end))
                low[part], high[part] = part_low, part_high
    else:
        n = int(radix.n)
        ends = [_EXTRA[0][0], *(end for _, end, largest in _EXTRA if n <= largest)]
        _half_rounds(low, high, keys, radix, range(ends[-1]))
    high <<= radix.low_bits
    high |= low
    return high


def _at(keys: tuple[U32, U32], at: NDArray[np.int64]) -> tuple[U32, U32]:
    return keys[0][at], keys[1][at]


def _half_rounds(low: U32, high: U32, keys: tuple[U32, U32], radix: Radix, halves: range) -> None:
    """Run half rounds in place: even ones change `low`, odd ones `high`."""
    hashed = np.empty_like(high)
    scratch = np.empty_like(high)
    for half in halves:
        odd = half % 2
        np.multiply(low if odd else high, _HALVES[half][0], out=hashed)
        hashed += keys[odd]
        np.right_shift(hashed, _S15, out=scratch)
        hashed ^= scratch
        hashed *= _HALVES[half][1]
        if odd:
            hashed >>= _S16
            hashed *= radix.high_size
            hashed >>= _S16
            high += hashed
            # Unsigned: below a, high - a wraps to a huge number, so this subtracts a where due.
            np.subtract(high, radix.high_size, out=scratch)
            np.minimum(high, scratch, out=high)
        else:
            hashed >>= radix.hash_shift
            low ^= hashed
