"""Batch hashes, and the compact JSON form of a planner's state."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raymix.sampling.shares import Ints

# Longer arrays are packed: 10,000 integers as JSON text would dominate a checkpoint's state.
_MAX_LIST = 256


def batch_hash(domain_B: ArrayLike, index_B: ArrayLike) -> str:
    """Return 16 hex digits that name a global batch: blake2b of its samples' identities in order.

    The bytes hashed are pairs (domain, samples of the domain before it) as little-endian int64, so
    the hash is the same on every platform.
    """
    domains: NDArray[np.int64] = np.asarray(domain_B, dtype="<i8")
    pairs = np.empty((domains.size, 2), dtype="<i8")
    pairs[:, 0] = domains
    pairs[:, 1] = index_B
    return blake2b(pairs.tobytes(), digest_size=8).hexdigest()


def dump_state(step: int, carry_D: Ints, count_D: Ints) -> dict[str, Any]:
    """Return a planner's state in JSON types; under 200 KB as text at 10,000 domains."""
    return {"step": step, "carry": _dump(carry_D), "count": _dump(count_D)}


def load_state(state: Mapping[str, Any], n_domains: int) -> tuple[int, Ints, Ints]:
    """Return step, carry and count of a state.

    Raises:
        ValueError: If it belongs to another number of domains.
    """
    carry_D, count_D = _load(state["carry"]), _load(state["count"])
    if not carry_D.size == count_D.size == n_domains:
        raise ValueError(f"a state of {count_D.size} domains for {n_domains} domains")
    return int(state["step"]), carry_D, count_D


def change_domains(
    state: Mapping[str, Any], before: Sequence[str], after: Sequence[str], *, shift: int = 0
) -> dict[str, Any]:
    """Return a planner's state for other domains: the carries and counts of those that stay.

    A domain that comes begins at zero. The carry of one that goes is dropped, as if it sat out at a
    share of zero from here on, so the bounds for domains that come and go hold.

    Args:
        state: From `dump_state`, for the domains `before`.
        before: Names of the domains so far.
        after: Names of the domains from here on.
        shift: Bits that carries gain (or lose, below zero), where their unit changes.
    """
    step, carry_D, count_D = load_state(state, len(before))
    carry_D = carry_D << shift if shift > 0 else carry_D >> -shift
    carry, count = (
        dict(zip(before, values.tolist(), strict=True)) for values in (carry_D, count_D)
    )
    arrays = (
        np.array([values.get(name, 0) for name in after], dtype=np.int64)
        for values in (carry, count)
    )
    return dump_state(step, *arrays)


def _dump(values: Ints) -> list[int] | str:
    """Return a list of up to 256 values, beyond that packed text."""
    if values.size <= _MAX_LIST:
        return values.tolist()
    return base64.b64encode(zlib.compress(values.astype("<i8").tobytes(), 6)).decode()


def _load(dumped: list[int] | str) -> Ints:
    if isinstance(dumped, str):
        raw = zlib.decompress(base64.b64decode(dumped))
        return np.frombuffer(raw, dtype="<i8").astype(np.int64)
    return np.array(dumped, dtype=np.int64)
