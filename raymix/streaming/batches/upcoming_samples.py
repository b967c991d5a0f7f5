"""Upcoming samples of each domain, located before it is known when they are read.

Shares decide when a domain's next sample is read, never which one it is. So samples are located
hundreds at a time, domain by domain, and the order of coming blocks is known whatever the shares
will be. Letters: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raymix.sampling import CorpusOrder

Ints = npt.NDArray[np.int64]

# Samples located at once: a multiple of those requested, so that most requests find theirs; enough
# to pay for the call, and few enough for the memory of 10,000 domains.
_REQUEST_MULTIPLE = 16
_MIN_LOCATED = 16
_MAX_LOCATED = 8192
# From this many samples on, a call per domain is faster than one for several domains, which looks
# up the parameters of the permutation sample by sample.
_SEPARATE_CALL_SAMPLES = 1024


@dataclass(slots=True)
class _Located:
    first: int
    group_N: Ints
    unit_N: Ints

    @property
    def end(self) -> int:
        return self.first + len(self.group_N)


class UpcomingSamples:
    """Group (block) and position in the group of each domain's next samples."""

    def __init__(self, order: CorpusOrder) -> None:
        self._order = order
        self._located: dict[int, _Located] = {}

    def locate(self, spans: Mapping[int, tuple[int, int]]) -> list[tuple[Ints, Ints]]:
        """Return (group, position in the group) of samples [first, end) of each domain.

        Samples before `first` are dropped.
        """
        self._extend(spans)
        locations = []
        for domain, (first, end) in spans.items():
            located = self._located[domain]
            part = slice(first - located.first, end - located.first)
            locations.append((located.group_N[part], located.unit_N[part]))
        return locations

    def _extend(self, spans: Mapping[int, tuple[int, int]]) -> None:
        together: list[tuple[int, Ints]] = []
        for domain, (first, end) in spans.items():
            located = self._located.get(domain)
            # A resume jumps to another sample: what is located does not join on to it.
            if located is None or not located.first <= first <= located.end:
                empty = np.empty(0, dtype=np.int64)
                located = self._located[domain] = _Located(first, empty, empty)
            if end <= located.end:
                continue
            count = min(_MAX_LOCATED, max(_MIN_LOCATED, _REQUEST_MULTIPLE * (end - first)))
            count = max(end - located.end, count)
            n = np.arange(located.end, located.end + count)
            self._drop_before(located, first)
            if count >= _SEPARATE_CALL_SAMPLES:
                _, group_N, unit_N = self._order.of(domain).locate(n)
                self._append(domain, group_N, unit_N)
            else:
                together.append((domain, n))
        if together:
            self._extend_together(together)

    def _extend_together(self, parts: list[tuple[int, Ints]]) -> None:
        sizes = [len(n) for _, n in parts]
        domain_N = np.repeat([domain for domain, _ in parts], sizes)
        _, group_N, unit_N = self._order.locate(domain_N, np.concatenate([n for _, n in parts]))
        ends = np.cumsum(sizes).tolist()
        for (domain, _), size, end in zip(parts, sizes, ends, strict=True):
            self._append(domain, group_N[end - size : end], unit_N[end - size : end])

    def _append(self, domain: int, group_N: Ints, unit_N: Ints) -> None:
        located = self._located[domain]
        located.group_N = np.concatenate([located.group_N, group_N])
        located.unit_N = np.concatenate([located.unit_N, unit_N])

    @staticmethod
    def _drop_before(located: _Located, first: int) -> None:
        located.group_N = located.group_N[first - located.first :]
        located.unit_N = located.unit_N[first - located.first :]
        located.first = first
