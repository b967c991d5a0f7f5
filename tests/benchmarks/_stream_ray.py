"""The rows of the stream benchmark that need Ray: raymix, a bare actor, Ray Data's own mix.

Run as a module it makes a private cluster, measures the rows named, and prints one JSON document
per row. Consumers are actors, so each is a process of its own; the reference is timed in it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.benchmarks._stream_common import (
    BATCH,
    CACHE,
    DOMAINS,
    LENGTH,
    ROWS,
    SECONDS,
    WARM_UP,
    WEIGHTS,
    Fill,
    Staging,
    consume,
    cpu_seconds,
    fill_from,
    finished,
    first_keys,
    make_rows,
    memmap,
    reference,
    rows_file,
    weighted_order,
)

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_ENABLE_AUTO_CONNECT="0",
    # Ray Data's new Parquet reader starts 32 actors per data set; this is kinder to the peer.
    RAY_DATA_USE_DATASOURCE_V2="0",
)

import ray

from raymix.mixers import DomainStats, MixerContext
from raymix.recipe.training import PackedData
from raymix.sampling import realized_error_bound
from raymix.streaming.batches.stream import MixtureStream
from raymix.streaming.blocks.actor import start_plane
from raymix.streaming.blocks.shared_source import PlaneSource
from raymix.streaming.controller.client import RemoteController, start_controller
from tests.benchmarks._stream_corpus import NAMES, corpus

WINDOW = 100
_MOST, _TOGETHER = 400_000, 200_000
STORE_BYTES = 1_500_000_000


class Restless:
    """A mixer for the benchmark that wants other weights every window."""

    kind = "restless"
    needs: frozenset[str] = frozenset()
    boundaries = (0,)

    def planned(self, step: int) -> npt.NDArray[np.float64]:
        factor_D = 0.6 + 0.8 * np.random.default_rng(step).random(DOMAINS)
        return WEIGHTS * factor_D / (WEIGHTS * factor_D).sum()

    def update(self, stats: DomainStats) -> npt.NDArray[np.float64]:
        return self.planned(stats.step + 2 * stats.window)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Learning(Restless):
    """The same, but each window's weights wait for the statistics of the last but one."""

    kind = "learning"
    needs = frozenset({"tokens"})
    initial = WEIGHTS


class Consumer:
    """A process that copies batches into a staging array."""

    def ready(self) -> int:
        return os.getpid()

    def reference(self, seed: int) -> dict[str, float]:
        return reference(seed)

    def open(
        self, controller: Any, plane: Any, rank: int, world_size: int, *, learns: bool
    ) -> float:
        """Open a stream, read the first batch, and return when that was done (wall clock)."""
        self._control = RemoteController(
            controller, attempt="bench", rank=rank, world_size=world_size
        )
        source = PlaneSource(plane, row_tokens=LENGTH, rank=rank, world_size=world_size)
        self._stream = MixtureStream(
            corpus(),
            PackedData(sequence_length=LENGTH, rows_per_step=BATCH * world_size),
            seed=1,
            rank=rank,
            world_size=world_size,
            controller=self._control,
            source=source,
        )
        self._learns = learns
        self._tokens_D = np.zeros(DOMAINS, dtype=np.int64)
        self._first = first_keys(self._fill)
        return time.time()

    def run(self, seconds: float, most: int, root: int | None) -> dict[str, Any]:
        done = consume(self._fill, seconds, self._first, most=most, pid=root)
        return done | {"log": self._stream.log.entries}

    def _fill(self, staging: Staging) -> None:
        batch = self._stream.next()
        np.copyto(staging, batch.tokens)
        if not self._learns:
            return
        self._tokens_D += batch.counts_D
        if (batch.step + 1) % WINDOW == 0:
            self._push(batch.step // WINDOW)

    def _push(self, window: int) -> None:
        self._control.push(
            window,
            DomainStats(
                step=window * WINDOW,
                window=WINDOW,
                tokens_D=self._tokens_D * LENGTH,
                loss_D=np.zeros(DOMAINS),
            ),
        )
        self._tokens_D = np.zeros(DOMAINS, dtype=np.int64)

    def pull(self, root: int, producers: int) -> dict[str, Any]:
        """Return the row of a bare actor that gathers blocks of 2,048 rows in the right order."""
        actors = [ray.remote(Producer).options(num_cpus=0).remote() for _ in range(producers)]
        return _alone(lambda: fill_from(_pulled(actors)), root)

    def mix(self, root: int) -> dict[str, Any]:
        """Return the row of `Dataset.mix` with small blocks and a shuffle buffer."""
        return _alone(_mixed, root)


def _alone(make: Callable[[], Fill], root: int) -> dict[str, Any]:
    begun = time.perf_counter()
    fill = make()
    keys = first_keys(fill)
    first = time.perf_counter() - begun
    return {"first": first, **consume(fill, SECONDS, keys, pid=root)}


class Producer:
    """Gathers blocks of rows in a given order."""

    def __init__(self) -> None:
        self._rows = memmap()

    def block(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        return np.take(self._rows, order, axis=0)


def _pulled(actors: list[Any]) -> Any:
    order = weighted_order(3, 128 * 1200).reshape(-1, 2048)
    pending: deque[Any] = deque()
    for at, part in enumerate(order):
        pending.append(actors[at % len(actors)].block.remote(part))
        if len(pending) > 4:
            block = ray.get(pending.popleft())
            for first in range(0, 2048, BATCH):
                yield block[first : first + BATCH]


def _mixed() -> Fill:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for domain in range(DOMAINS):
        path = CACHE / "parquet" / f"d{domain}.parquet"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            flat = pa.array(make_rows(domain).reshape(-1))
            table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, LENGTH)})
            pq.write_table(
                table, path, row_group_size=256, compression="none", use_dictionary=False
            )
        files.append(str(path))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Blocks of 256 rows straight from the reader: large ones are one domain at a time.
    context.target_max_block_size = 256 * LENGTH * 2
    first, *others = [ray.data.read_parquet(file) for file in files]
    mixed = first.mix(*others, weights=WEIGHTS.tolist())
    batches = mixed.iter_batches(
        batch_size=BATCH,
        batch_format="pyarrow",
        local_shuffle_buffer_size=1024,
        local_shuffle_seed=1,
        prefetch_batches=4,
    )

    def arrays() -> Any:
        for batch in batches:
            column = batch.column("tokens").combine_chunks()
            yield column.flatten().to_numpy(zero_copy_only=False).reshape(-1, LENGTH)

    return fill_from(arrays())


def raymix_row(
    consumers: list[Any], cache_bytes: int, mixer: type[Restless] = Restless
) -> dict[str, Any]:
    """Return raymix's row for some consumers; the first sees the CPU time of all processes."""
    data = corpus()
    references = [ray.get(consumers[0].reference.remote(1))]
    called = time.time()
    tokens_D = np.full(DOMAINS, ROWS * LENGTH)
    context = MixerContext(NAMES, tokens_D, total_tokens=10**9, total_steps=10**6)
    controller = start_controller(recipe_mixer=mixer(), context=context, probe_interval=WINDOW)
    plane = start_plane(data, row_tokens=LENGTH, cache_bytes=cache_bytes)
    world_size = len(consumers)
    opened = [
        consumer.open.remote(controller, plane, rank, world_size, learns=bool(mixer.needs))
        for rank, consumer in enumerate(consumers)
    ]
    first = max(ray.get(opened)) - called
    # Ranks end at the same step, else one would wait for the other's statistics.
    seconds, most = (SECONDS, _MOST) if world_size == 1 else (60.0, _TOGETHER)
    done = ray.get(
        [
            consumer.run.remote(seconds, most, os.getpid() if rank == 0 else None)
            for rank, consumer in enumerate(consumers)
        ]
    )
    used_bytes = ray.get(plane.describe.remote())["used_bytes"]
    references.append(ray.get(consumers[0].reference.remote(2)))
    for actor in (plane, controller):
        ray.kill(actor)
    batches = [len(part["keys"]) - WARM_UP for part in done]
    steps = min(map(len, (part["keys"] for part in done)))
    rate = sum(1 / part["us"] for part in done)
    late = sum(1 / part["late_us"] for part in done)
    keys = np.concatenate([part["keys"][:steps] for part in done], axis=1)
    total = {
        "us": 1 / rate,
        "late_us": 1 / late,
        "cpu_us": done[0]["cpu_us"] * batches[0] / sum(batches),
        "keys": keys,
    }
    exact = exactness(keys, done[0]["log"])
    return finished(total, references, first, held_mb=used_bytes / 1e6, **exact)


def exactness(keys: npt.NDArray[np.uint16], log: list[Any]) -> dict[str, Any]:
    """Return how far what the tokens show strays from what was asked, at any step, in rows."""
    steps, rows = keys.shape[:2]
    counts_SD = np.stack([(keys[..., 0] == d).sum(axis=1) for d in range(DOMAINS)], axis=1)
    starts = [entry.first_step for entry in log]
    entry_S = np.searchsorted(starts, np.arange(steps), side="right") - 1
    requested_SD = np.array([entry.weights for entry in log])[entry_S]
    behind_SD = np.cumsum(requested_SD * rows - counts_SD, axis=0)
    requested_D = requested_SD.mean(axis=0)
    return {
        "tv": float(np.abs(requested_D - counts_SD.sum(axis=0) / counts_SD.sum()).sum() / 2),
        "most_rows_off": float(np.abs(behind_SD).max()),
        "bound": realized_error_bound(DOMAINS),
        "changes": int((np.array(starts) < steps).sum()) - 1,
    }


def plain_row(consumer: Any, method: str, *args: Any) -> dict[str, Any]:
    """Return a row that the consumer makes by itself."""
    before = ray.get(consumer.reference.remote(1))
    done = ray.get(getattr(consumer, method).remote(os.getpid(), *args))
    after = ray.get(consumer.reference.remote(2))
    return finished(done, [before, after], done["first"])


def settle() -> None:
    """Wait for the processes that Ray starts in advance: only then the cluster is warm."""
    for _ in range(60):
        before = cpu_seconds()
        time.sleep(0.5)
        if cpu_seconds() - before < 0.1:
            return


def main(names: list[str]) -> None:
    """Measure the rows named, in order, on one cluster."""
    ray.init(
        num_cpus=8,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    corpus()
    rows_file()
    consumers = [ray.remote(Consumer).options(num_cpus=0).remote() for _ in range(2)]
    ray.get([consumer.ready.remote() for consumer in consumers])
    # The cluster is warm once Ray Data has run on it: later starts are what users see.
    ray.data.range(10).materialize()
    settle()
    rows = {
        "raymix, 1 consumer": lambda: raymix_row(consumers[:1], 600_000_000),
        "raymix, 2 consumers": lambda: raymix_row(consumers, 600_000_000),
        "raymix, 1 consumer, weights from its statistics": lambda: raymix_row(
            consumers[:1], 600_000_000, Learning
        ),
        "raymix, cache of 120 MB": lambda: raymix_row(consumers[:1], 120_000_000),
        "bare Ray actor, blocks of 2048": lambda: plain_row(consumers[0], "pull", 1),
        "two bare Ray actors, blocks of 2048": lambda: plain_row(consumers[0], "pull", 2),
        "Ray Data mix, tuned, shuffle buffer": lambda: plain_row(consumers[0], "mix"),
    }
    for name in names:
        print(json.dumps({"name": name, **rows[name]()}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
