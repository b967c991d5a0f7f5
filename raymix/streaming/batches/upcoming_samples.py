"""The next samples of every domain, looked up before it is known when their turn comes.

Weights decide when a domain's next sample is read, never which it is. So samples are located
some hundreds at a time, domain by domain, and the order of blocks to come is known whatever the
weights will be. Letters: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raymix.sampling import CorpusOrder

Ints = npt.NDArray[np.int64]

# Samples located at once: enough to pay for the call, few enough to hold for 10,000 domains.
_LEAST, _MOST, _TIMES = 16, 8192, 16
# From here on a domain by itself is quicker than together with others.
_ALONE = 1024


@dataclass(slots=True)
class _Located:
    first: int
    group_N: Ints
    unit_N: Ints

    @property
    def end(self) -> int:
        return self.first + len(self.group_N)


class UpcomingSamples:
    """Group (block) and place in it of each domain's next samples."""

    def __init__(self, order: CorpusOrder) -> None:
        self._order = order
        self._located: dict[int, _Located] = {}

    def locate(self, spans: Mapping[int, tuple[int, int]]) -> list[tuple[Ints, Ints]]:
        """Return (group, place in the group) of samples [first, end) of each domain given.

        What comes before `first` is forgotten.
        """
        self._extend(spans)
        found = []
        for domain, (first, end) in spans.items():
            at = self._located[domain]
            part = slice(first - at.first, end - at.first)
            found.append((at.group_N[part], at.unit_N[part]))
        return found

    def _extend(self, spans: Mapping[int, tuple[int, int]]) -> None:
        together: list[tuple[int, Ints]] = []
        for domain, (first, end) in spans.items():
            at = self._located.get(domain)
            if at is None or not at.first <= first <= at.end:
                empty = np.empty(0, dtype=np.int64)
                at = self._located[domain] = _Located(first, empty, empty)
            if end <= at.end:
                continue
            more = max(end - at.end, min(_MOST, max(_LEAST, _TIMES * (end - first))))
            n = np.arange(at.end, at.end + more)
            self._forget(at, first)
            if more >= _ALONE:
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
        at = self._located[domain]
        at.group_N = np.concatenate([at.group_N, group_N])
        at.unit_N = np.concatenate([at.unit_N, unit_N])

    @staticmethod
    def _forget(at: _Located, first: int) -> None:
        at.group_N = at.group_N[first - at.first :]
        at.unit_N = at.unit_N[first - at.first :]
        at.first = first
