"""Names for batches and compact forms of state: what two runs compare to know they are equal."""

from __future__ import annotations

import base64
import zlib
from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raymix.sampling.shares import Ints

_LISTED = 256


def batch_hash(domain_B: ArrayLike, index_B: ArrayLike) -> str:
    """Return 16 hex digits that name a global batch: blake2b of its samples' identities in order.

    Hashed are pairs (domain, how many samples of the domain came before) as little-endian int64.
    """
    domains: NDArray[np.int64] = np.asarray(domain_B, dtype="<i8")
    pairs = np.empty((domains.size, 2), dtype="<i8")
    pairs[:, 0] = domains
    pairs[:, 1] = index_B
    return blake2b(pairs.tobytes(), digest_size=8).hexdigest()


def dump_ints(values: Ints) -> list[int] | str:
    """Return int64 values for JSON: a list up to 256 of them, beyond that packed text."""
    if values.size <= _LISTED:
        return values.tolist()
    return base64.b64encode(zlib.compress(values.astype("<i8").tobytes(), 6)).decode()


def load_ints(dumped: list[int] | str | Ints) -> Ints:
    """Return what `dump_ints` was given."""
    if isinstance(dumped, str):
        raw = zlib.decompress(base64.b64decode(dumped))
        return np.frombuffer(raw, dtype="<i8").astype(np.int64)
    return np.array(dumped, dtype=np.int64)
