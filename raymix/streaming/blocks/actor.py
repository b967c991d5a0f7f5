"""The block plane: keeps the blocks that come next in the object store.

One actor per run. It holds references only; tokens go from the read tasks to the workers through
the object store and never through an actor. It has no state worth saving: killed, it starts
again empty, and the workers ask again for what they lack.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import ray

from raymix.errors import ClusterError
from raymix.recipe.training import AUTO_CACHE_SHARE
from raymix.store import Corpus, Split
from raymix.streaming.actor_options import actor_options
from raymix.streaming.blocks.cache import BlockCache
from raymix.streaming.blocks.geometry import BlockNumbers

Ints = npt.NDArray[np.int64]

_TRIES = 3
# Bytes of a bundle, and bundles per execution of Ray Data.
_SOON, _LARGE, _AT_ONCE = 8 << 20, 32 << 20, 4


class BlockPlane:
    """Loads blocks when ranks want them, and hands out references to them.

    Args of the constructor:
        corpus: The corpus' path.
        row_tokens: Blocks are cut to whole rows of this; 1 leaves them whole.
        cache_bytes: What the blocks may take up in the object store.
        split: The split to read.
        concurrency: Read tasks at once.
    """

    def __init__(
        self,
        corpus: str,
        *,
        row_tokens: int,
        cache_bytes: int,
        split: Split = "train",
        concurrency: int = 1,
    ) -> None:
        self._corpus = Corpus.open(corpus)
        numbers = BlockNumbers(self._corpus, split)
        item = self._corpus.dtype.itemsize
        self._total_bytes = numbers.total_tokens * item
        self._cache: BlockCache[Any] = BlockCache(
            cache_bytes,
            size_of=lambda number: numbers.tokens(number) * item,
            domain_of=numbers.domain,
        )
        self._split: Split = split
        self._row_tokens = row_tokens
        self._concurrency = concurrency
        # Where nothing is ever evicted, bundles may be large, so few and cheap.
        fits = self._total_bytes <= cache_bytes
        self._most_bytes = _LARGE if fits else min(_SOON, cache_bytes // 16)
        self._soon_bytes = min(_SOON, self._most_bytes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="refill")
        self._thread.submit(self._warm_up)
        self._refilling: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._changed = asyncio.Event()
        self._failures: list[Exception] = []
        self._refills = 0

    async def describe(self) -> dict[str, int]:
        """Return budget, use and size of the whole split in bytes, and more for people."""
        return {
            "budget_bytes": self._cache.budget_bytes,
            "total_bytes": self._total_bytes,
            "used_bytes": self._cache.used_bytes,
            "blocks": len(self._cache),
            "refills": self._refills,
            "pid": os.getpid(),
        }

    async def want(
        self, rank: int, world_size: int, step: int, numbers: Ints, steps: npt.NDArray[np.float64]
    ) -> None:
        """Note what a rank at `step` needs next and when, and load it when there is room."""
        self._cache.want(rank, world_size, step, numbers.tolist(), steps.tolist())
        self._start()

    async def take(self, numbers: Ints, *, urgent: bool) -> list[Any]:
        """Return references to tables that hold these blocks: all that are here, at least one.

        Args:
            numbers: Global block numbers.
            urgent: Whether somebody waits for them; else they are loaded when there is room.

        Raises:
            ClusterError: If reading failed several times in a row.
        """
        wanted = numbers.tolist()
        failures = len(self._failures)
        while not (refs := self._cache.refs(wanted)):
            if len(self._failures) > failures:
                raise self._failures[-1]
            self._cache.ask(wanted, waiting=urgent)
            self._start()
            await self._changed.wait()
        if urgent:
            self._cache.ask(wanted, waiting=True)
            self._start()
        return refs

    async def forget(self, numbers: Sequence[int]) -> None:
        """Drop the objects that hold these blocks: they were lost, or are to be read anew."""
        self._cache.drop(numbers)

    def _start(self) -> None:
        self._work.set()
        if self._refilling is None:
            self._refilling = asyncio.ensure_future(self._refill())

    async def _refill(self) -> None:
        failures = 0
        while True:
            empty = not len(self._cache)
            bundles = self._cache.plan(
                _AT_ONCE * (self._soon_bytes if empty else self._most_bytes),
                self._most_bytes,
                urgent_bytes=self._soon_bytes,
            )
            if not bundles:
                self._work.clear()
                await self._work.wait()
                continue
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._thread, self._read, bundles, loop)
                failures = 0
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear
                failures += 1
                if failures >= _TRIES:
                    self._give_up(error)
                    failures = 0
                await asyncio.sleep(0.2 * 2**failures)
            finally:
                for bundle in bundles:
                    self._cache.fail(bundle)
            self._refills += 1

    def _warm_up(self) -> None:
        """Have everything imported and started, seconds of work, before a block is asked for."""
        from raymix.streaming.blocks.datasource import quiet_data_context, read_bundles

        quiet_data_context()
        first = [[0]] * self._concurrency
        for _ in read_bundles(
            self._corpus, self._split, self._row_tokens, first, concurrency=self._concurrency
        ):
            pass

    def _read(self, bundles: list[list[int]], loop: asyncio.AbstractEventLoop) -> None:
        from raymix.streaming.blocks.datasource import read_bundles

        for numbers, ref in read_bundles(
            self._corpus, self._split, self._row_tokens, bundles, concurrency=self._concurrency
        ):
            loop.call_soon_threadsafe(self._loaded, list(numbers), ref)

    def _loaded(self, numbers: list[int], ref: Any) -> None:
        self._cache.add(numbers, ref)
        self._notify()

    def _give_up(self, error: Exception) -> None:
        first = (str(error) or type(error).__name__).splitlines()[0]
        self._failures.append(
            ClusterError.at(
                "corpus.path",
                self._corpus.path,
                f"reading blocks failed {_TRIES} times in a row: {first}",
                fix="Can every node read it?",
            )
        )
        self._cache.give_up_waiting()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


RemoteBlockPlane = ray.remote(BlockPlane)


def auto_cache_bytes() -> int:
    """Return 40 % of the smallest node's object store."""
    stores = [
        node["Resources"]["object_store_memory"]
        for node in ray.nodes()
        if node["Alive"] and "object_store_memory" in node["Resources"]
    ]
    return int(AUTO_CACHE_SHARE * min(stores))


def start_plane(
    corpus: Corpus,
    *,
    row_tokens: int,
    cache_bytes: int | Literal["auto"] = "auto",
    split: Split = "train",
    name: str | None = None,
) -> Any:
    """Return the actor of a new plane on this node, owned by this process.

    Args:
        corpus: The corpus; every node must be able to read its path.
        row_tokens: See `raymix.streaming.batches.stream.row_tokens`.
        cache_bytes: The recipe's `data.cache_bytes`.
        split: The split to read.
        name: Name to find it by; none needed where the handle is passed on.
    """
    nodes = sum(node["Alive"] for node in ray.nodes())
    return RemoteBlockPlane.options(**actor_options(name)).remote(
        corpus.path,
        row_tokens=row_tokens,
        cache_bytes=auto_cache_bytes() if cache_bytes == "auto" else cache_bytes,
        split=split,
        # One per node reads faster than any model does, and leaves the cores to the ranks.
        concurrency=nodes,
    )
