"""Which blocks the plane loads next and which it gives up: the policy, without Ray.

Blocks are loaded in bundles, one object each, because a Ray Data task costs some 20 ms whatever
it reads. What is waited for goes first, then what is needed first. When the budget is used up,
the bundle that is needed last goes (Belady's rule: the future is known, as ranks say what they
will need); the slowest rank's needs count as much as the fastest's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Ref = TypeVar("Ref")

_WAITED_FOR = -math.inf
_NOT_NEEDED = math.inf
# A domain with fewer blocks in a refill shares bundles with others.
_OWN_BUNDLE = 4


@dataclass(frozen=True, slots=True)
class _Bundle(Generic[Ref]):
    ref: Ref
    numbers: list[int]
    size: int


class BlockCache(Generic[Ref]):
    """Bundles by the blocks in them, what is wanted, and what is being loaded.

    Args of the constructor:
        budget_bytes: What bundles may take up; exceeded only for blocks that are waited for.
        size_of: Bytes of a block.
        domain_of: Domain of a block; blocks of one domain share bundles.
    """

    def __init__(
        self, budget_bytes: int, *, size_of: Callable[[int], int], domain_of: Callable[[int], int]
    ) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._size_of = size_of
        self._domain_of = domain_of
        self._bundles: dict[int, _Bundle[Ref]] = {}
        self._bundle_of: dict[int, int] = {}
        self._loading: set[int] = set()
        self._waiting: dict[int, None] = {}
        self._wants: dict[int, tuple[int, dict[int, float]]] = {}
        self._asked: set[int] = set()
        self._next = 0

    def want(
        self, rank: int, world_size: int, step: int, numbers: Sequence[int], steps: Sequence[float]
    ) -> None:
        """Note what a rank at `step` needs next and when, in place of what it said before."""
        # Ranks at the same step need the same: the order of the data is one for all.
        same = [n for s, n in self._wants.values() if s == step and len(n) == len(numbers)]
        needs = same[0] if same else dict(zip(numbers, steps, strict=True))
        self._wants = {r: want for r, want in self._wants.items() if r < world_size}
        self._wants[rank] = (step, needs)

    def ask(self, numbers: Iterable[int], *, waiting: bool) -> None:
        """Note blocks that are asked for and not here; `waiting` puts them before all others."""
        absent = [number for number in numbers if number not in self._bundle_of]
        if waiting:
            self._waiting.update(dict.fromkeys(absent))
        else:
            self._asked.update(absent)

    def refs(self, numbers: Iterable[int]) -> list[Ref]:
        """Return the bundles that hold those of the blocks that are here."""
        keys = {self._bundle_of[number]: None for number in numbers if number in self._bundle_of}
        return [self._bundles[key].ref for key in keys]

    def plan(
        self, most_bytes: int, bundle_bytes: int, *, urgent_bytes: int | None = None
    ) -> list[list[int]]:
        """Return bundles to load now, about `most_bytes` in all, the most urgent first.

        Blocks that are waited for, and all while none is here yet, are in bundles of
        `urgent_bytes`, in the order in which they are needed.

        They count as being loaded until `add` or `fail` is called for them. Room is made by
        dropping bundles that are needed later than what is loaded.
        """
        need = self._needs()
        victims = self._victims(need)
        taken: list[int] = []
        size = 0
        for number in self._queue(need):
            wanted_at = _WAITED_FOR if number in self._waiting else need[number]
            block = self._size_of(number)
            if taken and size + block > most_bytes:
                break
            if (
                not self._make_room(size + block, wanted_at, victims)
                and number not in self._waiting
            ):
                break
            taken.append(number)
            size += block
        self._loading.update(taken)
        first = [n for n in taken if n in self._waiting] if self._bundles else taken
        others = taken[len(first) :]
        soon = self._in_order(first, bundle_bytes if urgent_bytes is None else urgent_bytes)
        return soon + self._by_domain(others, bundle_bytes)

    def add(self, numbers: list[int], ref: Ref) -> None:
        """Hold a bundle that was loaded."""
        size = sum(map(self._size_of, numbers))
        self._bundles[self._next] = _Bundle(ref, numbers, size)
        for number in numbers:
            self._bundle_of[number] = self._next
            self._loading.discard(number)
            self._waiting.pop(number, None)
            self._asked.discard(number)
        self.used_bytes += size
        self._next += 1

    def fail(self, numbers: Iterable[int]) -> None:
        """Note that loading these came to nothing; they will be tried again if still wanted."""
        self._loading.difference_update(numbers)

    def give_up_waiting(self) -> None:
        """Forget what is waited for; whoever waits is told by other means."""
        self._waiting.clear()

    def drop(self, numbers: Iterable[int]) -> None:
        """Drop the bundles that hold these blocks, because they were lost."""
        for key in {self._bundle_of[n] for n in numbers if n in self._bundle_of}:
            self._evict(key)

    def __len__(self) -> int:
        """Return how many blocks are held."""
        return len(self._bundle_of)

    def _needs(self) -> dict[int, float]:
        need = dict.fromkeys(self._asked, _NOT_NEEDED)
        seen: set[int] = set()
        for _, wanted in self._wants.values():
            if id(wanted) not in seen:
                seen.add(id(wanted))
                for number, step in wanted.items():
                    need[number] = min(step, need.get(number, _NOT_NEEDED))
        return need

    def _queue(self, need: dict[int, float]) -> list[int]:
        """Return what is not here, the most urgent first."""
        here = self._bundle_of.keys() | self._loading
        waiting = [number for number in self._waiting if number not in here]
        later = [n for n in need if n not in here and n not in self._waiting]
        return waiting + sorted(later, key=need.__getitem__)

    def _victims(self, need: dict[int, float]) -> list[tuple[float, int]]:
        """Return when each bundle is needed, and its key; the last needed at the end."""
        return sorted(
            (min(need.get(number, _NOT_NEEDED) for number in bundle.numbers), key)
            for key, bundle in self._bundles.items()
        )

    def _make_room(self, size: int, step: float, victims: list[tuple[float, int]]) -> bool:
        """Return whether `size` bytes more fit, once what is needed after `step` is dropped."""
        while self.used_bytes + size > self.budget_bytes:
            if not victims or victims[-1][0] <= step:
                return False
            self._evict(victims.pop()[1])
        return True

    def _evict(self, key: int) -> None:
        bundle = self._bundles.pop(key)
        self.used_bytes -= bundle.size
        for number in bundle.numbers:
            if self._bundle_of.get(number) == key:
                del self._bundle_of[number]

    def _in_order(self, numbers: list[int], most_bytes: int) -> list[list[int]]:
        """Return `numbers` in bundles, one after the other."""
        bundles: list[list[int]] = []
        size = math.inf
        for number in numbers:
            block = self._size_of(number)
            if size + block > most_bytes:
                bundles.append([])
                size = 0
            bundles[-1].append(number)
            size += block
        return bundles

    def _by_domain(self, numbers: list[int], most_bytes: int) -> list[list[int]]:
        """Return `numbers` in bundles, by domain where that gives bundles worth having."""
        groups: dict[int, list[int]] = {}
        for number in numbers:
            groups.setdefault(self._domain_of(number), []).append(number)
        mixed = [n for n in numbers if len(groups[self._domain_of(n)]) < _OWN_BUNDLE]
        whole = [group for group in groups.values() if len(group) >= _OWN_BUNDLE]
        bundles = [b for group in [mixed, *whole] for b in self._in_order(group, most_bytes)]
        rank = {number: place for place, number in enumerate(numbers)}
        return sorted(bundles, key=lambda bundle: rank[bundle[0]])
