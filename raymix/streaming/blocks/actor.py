"""The block plane: an actor that caches the blocks needed next in the object store.

One per run. It holds references only; tokens go from the read tasks to the workers through the
object store and never through an actor. It has no state worth saving: after a kill it restarts
empty, and the workers request again the blocks they lack.
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

from raymix.errors import ClusterLostError
from raymix.recipe.training import AUTO_CACHE_SHARE
from raymix.store import Corpus, Split
from raymix.streaming.actors import start_actor
from raymix.streaming.blocks.cache import BlockCache
from raymix.streaming.blocks.geometry import BlockNumbers

Ints = npt.NDArray[np.int64]

_MAX_FAILURES = 3
_BACKOFF_S = 0.2
# Sizes of bundles: small where a rank waits for the first one, large where the cost of a task
# counts, and the number of them per execution of Ray Data.
_URGENT_BUNDLE_BYTES = 8 << 20
_MAX_BUNDLE_BYTES = 32 << 20
_BUNDLES_PER_READ = 4
# Of a small budget a bundle takes a part only: eviction works by bundles.
_MIN_BUNDLES = 16


class BlockPlane:
    """Loads the blocks that ranks need, and returns references to them.

    Args of the constructor:
        corpus: The corpus' path.
        row_tokens: Blocks are cut to whole rows of this many tokens; 1 leaves them whole.
        cache_bytes: Budget of the blocks in the object store.
        split: The split to read.
        concurrency: Concurrent read tasks.
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
        token_bytes = self._corpus.dtype.itemsize
        self._total_bytes = numbers.total_tokens * token_bytes
        self._cache: BlockCache[Any] = BlockCache(
            cache_bytes,
            size_of=lambda number: numbers.tokens(number) * token_bytes,
            domain_of=numbers.domain,
        )
        self._split: Split = split
        self._row_tokens = row_tokens
        self._concurrency = concurrency
        # A corpus that fits is never evicted, so large bundles do no harm there.
        fits = self._total_bytes <= cache_bytes
        self._bundle_bytes = (
            _MAX_BUNDLE_BYTES if fits else min(_URGENT_BUNDLE_BYTES, cache_bytes // _MIN_BUNDLES)
        )
        self._urgent_bytes = min(_URGENT_BUNDLE_BYTES, self._bundle_bytes)
        # One thread: Ray Data blocks, which the event loop must not.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="refill")
        self._thread.submit(self._warm_up)
        self._refilling: asyncio.Task[None] | None = None
        self._has_work = asyncio.Event()
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

    async def prefetch(
        self, rank: int, world_size: int, step: int, numbers: Ints, steps: npt.NDArray[np.float64]
    ) -> None:
        """Replace the blocks that a rank at `step` needs next; they are loaded within the budget.

        Args:
            rank: The rank.
            world_size: Ranks that read from the plane.
            step: The step the rank reads next.
            numbers: Global block numbers.
            steps: Step at which each block is needed, about.
        """
        self._cache.announce(rank, world_size, step, numbers.tolist(), steps.tolist())
        self._start_refill()

    async def get_refs(self, numbers: Ints, *, urgent: bool) -> list[Any]:
        """Return references to tables with those of the blocks that are cached, at least one.

        Args:
            numbers: Global block numbers.
            urgent: Whether the caller waits for them; else they are loaded within the budget.

        Raises:
            ClusterLostError: If reading failed several times in a row.
        """
        requested = numbers.tolist()
        # Failures of earlier calls are no reason to give up on this one.
        n_failures = len(self._failures)
        while not (refs := self._cache.refs(requested)):
            if len(self._failures) > n_failures:
                raise self._failures[-1]
            self._cache.request(requested, urgent=urgent)
            self._start_refill()
            await self._changed.wait()
        # The caller takes what is cached now and asks again for the rest, loaded meanwhile.
        if urgent:
            self._cache.request(requested, urgent=True)
            self._start_refill()
        return refs

    async def drop(self, numbers: Sequence[int]) -> None:
        """Drop the objects of these blocks: they were lost, or the blocks are to be read again."""
        self._cache.drop(numbers)

    def _start_refill(self) -> None:
        self._has_work.set()
        # Not in the constructor: Ray runs it outside of the actor's event loop.
        if self._refilling is None:
            self._refilling = asyncio.ensure_future(self._refill())

    async def _refill(self) -> None:
        failures = 0
        while True:
            empty = not len(self._cache)
            bundles = self._cache.plan(
                _BUNDLES_PER_READ * (self._urgent_bytes if empty else self._bundle_bytes),
                self._bundle_bytes,
                urgent_bytes=self._urgent_bytes,
            )
            if not bundles:
                self._has_work.clear()
                await self._has_work.wait()
                continue
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._thread, self._read, bundles, loop)
                failures = 0
            except Exception as error:  # noqa: BLE001 - any error must reach those who wait
                failures += 1
                if failures >= _MAX_FAILURES:
                    self._give_up(error)
                    failures = 0
                await asyncio.sleep(_BACKOFF_S * 2**failures)
            finally:
                # After success too: it changes nothing for blocks that were added.
                for bundle in bundles:
                    self._cache.end_loading(bundle)
            self._refills += 1

    def _warm_up(self) -> None:
        """Import Ray Data and start its worker processes before a block is requested."""
        # Imported on this thread: it takes seconds, during which the actor must answer.
        from raymix.streaming.blocks.datasource import quiet_data_context, read_bundles

        quiet_data_context()
        # Any block serves, one read per concurrent task: the first execution starts the workers.
        first_block = [[0]] * self._concurrency
        for _ in read_bundles(
            self._corpus, self._split, self._row_tokens, first_block, concurrency=self._concurrency
        ):
            pass

    def _read(self, bundles: list[list[int]], loop: asyncio.AbstractEventLoop) -> None:
        from raymix.streaming.blocks.datasource import read_bundles

        for numbers, ref in read_bundles(
            self._corpus, self._split, self._row_tokens, bundles, concurrency=self._concurrency
        ):
            # The cache has no lock: only the event loop's thread changes it.
            loop.call_soon_threadsafe(self._add, list(numbers), ref)

    def _add(self, numbers: list[int], ref: Any) -> None:
        self._cache.add(numbers, ref)
        self._notify()

    def _give_up(self, error: Exception) -> None:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        self._failures.append(
            ClusterLostError.at(
                "corpus.path",
                self._corpus.path,
                f"reading blocks failed {_MAX_FAILURES} times in a row: {first_line}",
                fix="Can every node read it?",
            )
        )
        self._cache.drop_urgent()
        self._notify()

    def _notify(self) -> None:
        # A new event per change, as in the controller's actor.
        self._changed.set()
        self._changed = asyncio.Event()


BlockPlaneActor = ray.remote(BlockPlane)


def auto_cache_bytes() -> int:
    """Return 40 % of the smallest node's object store."""
    # The smallest, as each node that reads a block may get a copy of it.
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
        name: Name for `ray.get_actor`; none needed where the handle is passed on.
    """
    nodes = sum(node["Alive"] for node in ray.nodes())
    arguments = {
        "corpus": corpus.path,
        "row_tokens": row_tokens,
        "cache_bytes": auto_cache_bytes() if cache_bytes == "auto" else cache_bytes,
        "split": split,
        # One task per node reads faster than any model trains, and leaves the cores to the ranks.
        "concurrency": nodes,
    }
    return start_actor(BlockPlaneActor, name, arguments=arguments)
