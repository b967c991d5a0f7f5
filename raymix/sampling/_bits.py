"""Keyed integer hashing and keyed permutations of [0, n) on uint64 arrays, without tables.

`permute` writes x < n as (l, r) with 2**j values of r and a = ceil(n / 2**j) values of l and runs
a Feistel network over the pair: r is xored with a hash of l, l is advanced modulo a by a hash of
r. Each half round is invertible, so the network permutes [0, a * 2**j), at most 2**j - 1 values
more than n; the few results beyond n are sent through again ("cycle walking"), which keeps the
map a permutation of [0, n). With j about half the bits of n that concerns one value in sqrt(n).

Everything is arithmetic modulo 2**64, so results are the same on every platform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

MASK_64 = (1 << 64) - 1
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_S27, _S30, _S31, _S32 = (np.uint64(bits) for bits in (27, 30, 31, 32))
# One odd multiplier pair per half round: digits of the golden ratio and other irrationals.
_ROUNDS = tuple(
    (np.uint64(first), np.uint64(second))
    for first, second in (
        (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93),
        (0xC2B2AE3D27D4EB4F, 0xA0761D6478BD642F),
        (0x165667B19E3779F9, 0xE7037ED1A0B428DB),
        (0xFF51AFD7ED558CCD, 0x8EBC6AF09C88C6E3),
    )
)


def mix64(value: U64) -> U64:
    """Return a 64-bit hash of each element (splitmix64's finaliser, Steele et al. 2014)."""
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
    """How [0, n) is split for `permute`; fields are uint64 scalars, or arrays one per element."""

    n: U64
    low_bits: U64
    """j"""
    low_mask: U64
    """2**j - 1"""
    high_size: U64
    """a"""
    hash_shift: U64
    """64 - j: takes the top j bits of a hash."""

    @classmethod
    def of(cls, n: NDArray[np.int64]) -> Radix:
        """Return the splits of the sizes `n`, each >= 1."""
        low_bits = np.array([max(1, (int(size) - 1).bit_length() // 2) for size in n.ravel()])
        low_size = np.int64(1) << low_bits
        return cls(
            n=n.astype(np.uint64),
            low_bits=low_bits.astype(np.uint64),
            low_mask=(low_size - 1).astype(np.uint64),
            high_size=(-(-n // low_size)).astype(np.uint64),
            hash_shift=(64 - low_bits).astype(np.uint64),
        )

    def take(self, at: NDArray[np.int64] | int) -> Radix:
        """Return the splits at the positions `at`."""
        return Radix(
            self.n[at],
            self.low_bits[at],
            self.low_mask[at],
            self.high_size[at],
            self.hash_shift[at],
        )


def permute(value: U64, key: U64, radix: Radix) -> U64:
    """Return the keyed permutation of [0, radix.n) at each `value`, as a new array.

    Args:
        value: Elements of [0, n), shape (N,).
        key: One 64-bit key per element, shape (N,); equal keys and sizes give one permutation.
        radix: The size n, one for all or one per element.
    """
    out = _network(value, key, radix)
    astray = np.flatnonzero(out >= radix.n)
    while astray.size:
        part = radix.take(astray) if np.ndim(radix.n) else radix
        walked = _network(out[astray], key[astray], part)
        out[astray] = walked
        astray = astray[walked >= part.n]
    return out


def _network(value: U64, key: U64, radix: Radix) -> U64:
    low = value & radix.low_mask
    high = value >> radix.low_bits
    hashed = np.empty_like(high)
    scratch = np.empty_like(high)
    for half, (first, second) in enumerate(_ROUNDS):
        np.multiply(low if half % 2 else high, first, out=hashed)
        hashed += key
        np.right_shift(hashed, _S32, out=scratch)
        hashed ^= scratch
        hashed *= second
        if half % 2:
            hashed >>= _S32
            hashed *= radix.high_size
            hashed >>= _S32
            high += hashed
            # Unsigned: below a, high - a wraps to a huge number, so this subtracts a where due.
            np.subtract(high, radix.high_size, out=scratch)
            np.minimum(high, scratch, out=high)
        else:
            hashed >>= radix.hash_shift
            low ^= hashed
    high <<= radix.low_bits
    high |= low
    return high
