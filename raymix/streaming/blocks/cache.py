"""Cache policy of the block plane: which blocks to load next and which to evict, without Ray.

Blocks are loaded in bundles, one object each, because a Ray Data task costs about 20 ms whatever
it reads. Blocks that a rank waits for go first, then those needed first. When the budget is used
up, the bundle needed last is evicted (Belady's rule: the future is known, as ranks announce what
they will need); the needs of the slowest rank count as much as those of the fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Ref = TypeVar("Ref")

# Pseudo-steps at which a block is needed; they sort before and after all steps.
_NOW = -math.inf
_NEVER = math.inf
# A domain with fewer blocks in a refill shares bundles with others: half-empty bundles would cost
# a task each.
_MIN_DOMAIN_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class _Bundle(Generic[Ref]):
    ref: Ref
    numbers: list[int]
    size: int
    """Bytes."""


class BlockCache(Generic[Ref]):
    """The cached bundles, the announced needs, and the blocks being loaded.

    Args of the constructor:
        budget_bytes: Bytes of all bundles; exceeded only for blocks that a rank waits for.
        size_of: Returns the bytes of a block.
        domain_of: Returns the domain of a block; blocks of one domain share bundles.
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
        # A dict as an ordered set: first requested, first loaded.
        self._urgent: dict[int, None] = {}
        # By rank: its step, and the step at which it needs each block.
        self._needs: dict[int, tuple[int, dict[int, float]]] = {}
        self._requested: set[int] = set()
        self._next_key = 0

    def announce(
        self, rank: int, world_size: int, step: int, numbers: Sequence[int], steps: Sequence[float]
    ) -> None:
        """Replace the blocks that a rank at `step` needs next, and the step of each need."""
        # The order of the data is the same for all ranks, so ranks at the same step share one
        # mapping: thousands of ranks cost the memory and the time of a few.
        same = [n for s, n in self._needs.values() if s == step and len(n) == len(numbers)]
        needs = same[0] if same else dict(zip(numbers, steps, strict=True))
        # Ranks of a larger group before must not hold blocks forever.
        self._needs = {r: need for r, need in self._needs.items() if r < world_size}
        self._needs[rank] = (step, needs)

    def request(self, numbers: Iterable[int], *, urgent: bool) -> None:
        """Request blocks that are not cached; `urgent` puts them before all others."""
        absent = [number for number in numbers if number not in self._bundle_of]
        if urgent:
            self._urgent.update(dict.fromkeys(absent))
        else:
            self._requested.update(absent)

    def refs(self, numbers: Iterable[int]) -> list[Ref]:
        """Return the bundles that contain those of the blocks that are cached."""
        # Each bundle once, although many of the blocks share it.
        keys = {self._bundle_of[number]: None for number in numbers if number in self._bundle_of}
        return [self._bundles[key].ref for key in keys]

    def plan(
        self, max_bytes: int, bundle_bytes: int, *, urgent_bytes: int | None = None
    ) -> list[list[int]]:
        """Return bundles to load now, about `max_bytes` in all, the most urgent first.

        Urgent blocks, and all blocks while the cache is empty, are in bundles of `urgent_bytes`, in
        the order in which they are needed.

        The blocks count as being loaded until `add` or `end_loading` is called for them. Bundles
        that are needed later than these are evicted.
        """
        need = self._earliest_needs()
        victims = self._victims(need)
        chosen: list[int] = []
        size = 0
        for number in self._queue(need):
            needed_at = _NOW if number in self._urgent else need[number]
            block_size = self._size_of(number)
            # At least one block, however large.
            if chosen and size + block_size > max_bytes:
                break
            # Urgent blocks are loaded over the budget: a rank that waits never frees any.
            if (
                not self._free_space(size + block_size, needed_at, victims)
                and number not in self._urgent
            ):
                break
            chosen.append(number)
            size += block_size
        self._loading.update(chosen)
        first = [n for n in chosen if n in self._urgent] if self._bundles else chosen
        others = chosen[len(first) :]
        in_order = self._in_order(first, bundle_bytes if urgent_bytes is None else urgent_bytes)
        return in_order + self._by_domain(others, bundle_bytes)

    def add(self, numbers: list[int], ref: Ref) -> None:
        """Add a bundle that was loaded."""
        size = sum(map(self._size_of, numbers))
        self._bundles[self._next_key] = _Bundle(ref, numbers, size)
        for number in numbers:
            self._bundle_of[number] = self._next_key
            self._loading.discard(number)
            self._urgent.pop(number, None)
            self._requested.discard(number)
        self.used_bytes += size
        self._next_key += 1

    def end_loading(self, numbers: Iterable[int]) -> None:
        """Mark blocks as no longer being loaded; `plan` returns them again if still needed."""
        self._loading.difference_update(numbers)

    def drop_urgent(self) -> None:
        """Drop the urgent requests, whose callers get an error instead."""
        self._urgent.clear()

    def drop(self, numbers: Iterable[int]) -> None:
        """Evict the bundles that contain these blocks."""
        for key in {self._bundle_of[n] for n in numbers if n in self._bundle_of}:
            self._evict(key)

    def __len__(self) -> int:
        """Return the number of cached blocks."""
        return len(self._bundle_of)

    def _earliest_needs(self) -> dict[int, float]:
        need = dict.fromkeys(self._requested, _NEVER)
        # By identity, as ranks at the same step share a mapping.
        seen: set[int] = set()
        for _, needs in self._needs.values():
            if id(needs) not in seen:
                seen.add(id(needs))
                for number, step in needs.items():
                    need[number] = min(step, need.get(number, _NEVER))
        return need

    def _queue(self, need: dict[int, float]) -> list[int]:
        """Return the needed blocks that are neither cached nor loading, most urgent first."""
        present = self._bundle_of.keys() | self._loading
        urgent = [number for number in self._urgent if number not in present]
        later = [n for n in need if n not in present and n not in self._urgent]
        return urgent + sorted(later, key=need.__getitem__)

    def _victims(self, need: dict[int, float]) -> list[tuple[float, int]]:
        """Return (step at which it is needed, key) of each bundle; the last needed at the end."""
        return sorted(
            (min(need.get(number, _NEVER) for number in bundle.numbers), key)
            for key, bundle in self._bundles.items()
        )

    def _free_space(self, size: int, step: float, victims: list[tuple[float, int]]) -> bool:
        """Return whether `size` bytes more fit, evicting bundles needed after `step`."""
        while self.used_bytes + size > self.budget_bytes:
            # <= and not <: exchanging blocks that are needed at the same step would never end.
            if not victims or victims[-1][0] <= step:
                return False
            self._evict(victims.pop()[1])
        return True

    def _evict(self, key: int) -> None:
        bundle = self._bundles.pop(key)
        self.used_bytes -= bundle.size
        for number in bundle.numbers:
            # A block that was read again is in a newer bundle by now.
            if self._bundle_of.get(number) == key:
                del self._bundle_of[number]

    def _in_order(self, numbers: list[int], max_bytes: int) -> list[list[int]]:
        """Return `numbers` in bundles of up to `max_bytes`, in order."""
        bundles: list[list[int]] = []
        size = math.inf
        for number in numbers:
            block_size = self._size_of(number)
            if size + block_size > max_bytes:
                bundles.append([])
                size = 0
            bundles[-1].append(number)
            size += block_size
        return bundles

    def _by_domain(self, numbers: list[int], max_bytes: int) -> list[list[int]]:
        """Return `numbers` in bundles of one domain each, but for domains with few blocks."""
        groups: dict[int, list[int]] = {}
        for number in numbers:
            groups.setdefault(self._domain_of(number), []).append(number)
        mixed = [n for n in numbers if len(groups[self._domain_of(n)]) < _MIN_DOMAIN_BLOCKS]
        unmixed = [group for group in groups.values() if len(group) >= _MIN_DOMAIN_BLOCKS]
        bundles = [b for group in [mixed, *unmixed] for b in self._in_order(group, max_bytes)]
        # Ray Data reads bundles in list order, so that of the most urgent block comes first.
        position = {number: at for at, number in enumerate(numbers)}
        return sorted(bundles, key=lambda bundle: position[bundle[0]])
