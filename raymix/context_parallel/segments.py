"""Causal attention in pieces: which queries of a flat row look at which keys.

A piece is a run of queries and a run of keys that ends where the queries end: query r of n sees
all keys but the last n - 1 - r. A whole document is a piece with as many keys as queries; a shard
is two pieces whose keys are the document up to the end of the stretch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch


@dataclass(frozen=True, slots=True)
class AttentionSegment:
    """A run of queries and the keys that the last of them sees."""

    query: int
    """First query in the row."""
    queries: int
    key: int
    """First key in the buffer of keys."""
    keys: int
    """At least as many as queries: causal from the bottom right."""

    @property
    def before(self) -> int:
        """Return the keys that every query of the piece sees, its own run left out."""
        return self.keys - self.queries


class AttentionSegments:
    """Pieces in the order of their queries, which follow one another without gaps."""

    def __init__(self, pieces: Iterable[AttentionSegment]) -> None:
        """Keep the pieces that have queries."""
        self.every = tuple(piece for piece in pieces if piece.queries)

    @classmethod
    def whole(cls, lengths: Sequence[int]) -> AttentionSegments:
        """Return one piece per document, documents one after the other."""
        begin, pieces = 0, list[AttentionSegment]()
        for length in lengths:
            pieces.append(AttentionSegment(begin, length, begin, length))
            begin += length
        return cls(pieces)

    @cached_property
    def queries(self) -> int:
        """Return the queries of all pieces."""
        return sum(piece.queries for piece in self.every)

    @cached_property
    def apart(self) -> bool:
        """Return whether the keys of the pieces, too, follow one another without gaps."""
        end = 0
        for piece in self.every:
            if piece.key != end:
                return False
            end += piece.keys
        return True

    def varlen(self, device: torch.device) -> Varlen:
        """Return what kernels for sequences of unequal length ask for, made once per device."""
        if device not in self._varlen:
            self._varlen[device] = Varlen.of(self, device)
        return self._varlen[device]

    @cached_property
    def _varlen(self) -> dict[torch.device, Varlen]:
        return {}


@dataclass(frozen=True, slots=True)
class Varlen:
    """The pieces as offsets on a device; P pieces."""

    query_P1: torch.Tensor
    """Offsets of the queries, int32, shape (P + 1,)."""
    key_P1: torch.Tensor
    """Offsets of the keys, int32, shape (P + 1,), once they lie one run after the other."""
    rows: torch.Tensor | None
    """Which rows of the buffer of keys, in order, the pieces see; None: the buffer as it is."""
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, pieces: AttentionSegments, device: torch.device) -> Varlen:
        """Return the offsets of `pieces` on `device`."""
        queries = [piece.queries for piece in pieces.every]
        keys = [piece.keys for piece in pieces.every]
        rows = None
        if not pieces.apart:
            runs = [torch.arange(p.key, p.key + p.keys) for p in pieces.every]
            rows = torch.cat(runs).to(device)
        offsets = [
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device)
            for counts in (queries, keys)
        ]
        return cls(offsets[0], offsets[1], rows, max(queries), max(keys))
