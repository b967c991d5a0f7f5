"""Segments of causal attention: runs of queries of a flat row and the keys they see.

A segment is a run of queries and a run of keys that ends with the last query: query r of n sees
all keys but the last n - 1 - r. A whole document is one segment with as many keys as queries; a
shard is two segments (its front and back span), each with the document's keys up to its end.
Letters: P segments.
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

    first_query: int
    """Row of the first query."""
    n_queries: int
    first_key: int
    """Row of the first key in the key buffer."""
    n_keys: int
    """At least `n_queries`: the causal mask is aligned to the bottom right."""

    @property
    def n_prefix_keys(self) -> int:
        """Return the number of keys before the segment's own run, visible to all its queries."""
        return self.n_keys - self.n_queries


class AttentionSegments:
    """Segments in the order of their queries, which are contiguous."""

    def __init__(self, segments: Iterable[AttentionSegment]) -> None:
        """Store the segments that have queries."""
        # The back span of a one-token shard is empty, and kernels reject sequences of length 0.
        self.segments = tuple(segment for segment in segments if segment.n_queries)

    @classmethod
    def of_documents(cls, lengths: Sequence[int]) -> AttentionSegments:
        """Return one segment per document of a row of concatenated documents."""
        first, segments = 0, list[AttentionSegment]()
        for length in lengths:
            segments.append(AttentionSegment(first, length, first, length))
            first += length
        return cls(segments)

    @cached_property
    def n_queries(self) -> int:
        """Return the number of queries in all segments."""
        return sum(segment.n_queries for segment in self.segments)

    @cached_property
    def keys_contiguous(self) -> bool:
        """Return whether the keys of the segments are contiguous and disjoint, too."""
        end = 0
        for segment in self.segments:
            if segment.first_key != end:
                return False
            end += segment.n_keys
        return True

    def varlen(self, device: torch.device) -> Varlen:
        """Return the arguments of variable-length kernels, computed once per device."""
        # All layers of a model attend to the same segments: one host-to-device copy serves them.
        if device not in self._varlen:
            self._varlen[device] = Varlen.of(self, device)
        return self._varlen[device]

    @cached_property
    def _varlen(self) -> dict[torch.device, Varlen]:
        return {}


@dataclass(frozen=True, slots=True)
class Varlen:
    """Segment offsets on a device, as variable-length kernels take them."""

    query_offsets: torch.Tensor
    """Offsets of the queries, int32, shape (P + 1,)."""
    key_offsets: torch.Tensor
    """Offsets of the keys once gathered by `key_rows`, int32, shape (P + 1,)."""
    key_rows: torch.Tensor | None
    """Rows of the key buffer that the segments see, in order; None: the buffer as it is."""
    max_queries: int
    """Queries of the longest segment; an int, as reading it from a CUDA tensor would block."""
    max_keys: int

    @classmethod
    def of(cls, segments: AttentionSegments, device: torch.device) -> Varlen:
        """Return the offsets of `segments` on `device`."""
        queries = [segment.n_queries for segment in segments.segments]
        keys = [segment.n_keys for segment in segments.segments]
        key_rows = None
        # The kernels take disjoint runs of keys; segments of one document share a prefix, which
        # is therefore duplicated.
        if not segments.keys_contiguous:
            runs = [torch.arange(s.first_key, s.first_key + s.n_keys) for s in segments.segments]
            key_rows = torch.cat(runs).to(device)
        # int32: the type of cumulative lengths in both CUDA kernels.
        offsets = [
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device)
            for counts in (queries, keys)
        ]
        return cls(offsets[0], offsets[1], key_rows, max(queries), max(keys))
