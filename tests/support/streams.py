"""Streams over small corpora for tests: how to open one, and a slow reader to compare with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raymix.mixers import DomainStats, Mixer, MixerContext, Planned
from raymix.recipe.training import DocumentData, PackedData
from raymix.sampling import DomainOrder, MixtureEntry, MixtureLog, PackedPlanner
from raymix.store import Corpus
from raymix.streaming.batches.step_batch import DocumentBatch
from raymix.streaming.batches.stream import MixtureStream, row_tokens
from raymix.streaming.blocks.geometry import row_geometry
from raymix.streaming.blocks.sources import LocalSource
from raymix.streaming.controller.build import build_mixture_state
from raymix.streaming.controller.local import LocalController
from tests.support.corpora import labeled_domain, write_corpus

BLOCK = 96
ROW = 16


class TokensMixer:
    """An adaptive mixer for tests: the next shares are a hash-like function of what was read."""

    kind = "tokens"
    needs = frozenset({"tokens"})

    def __init__(self, n_domains: int) -> None:
        self.initial = np.arange(1.0, n_domains + 1) / np.arange(1.0, n_domains + 1).sum()
        self.seen = 0

    def update(self, stats: DomainStats) -> npt.NDArray[np.float64]:
        self.seen += int(stats.tokens_D.sum())
        salt_D = self.seen * np.arange(1, stats.tokens_D.size + 1)
        raw = (stats.tokens_D * 7919 + salt_D) % 101 + 1.0
        return raw / raw.sum()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


def small_corpus(root: Path, domains: int = 3, tokens: int = 5 * BLOCK + 40) -> Corpus:
    """Return a corpus of some domains of different sizes, the last block of each shorter."""
    return write_corpus(
        root,
        {f"d{d}": labeled_domain(d, tokens + 2 * d * BLOCK, 11.0) for d in range(domains)},
        block_tokens=BLOCK,
        shard_blocks=3,
    )


def context(corpus: Corpus, steps: int = 1000) -> MixerContext:
    names = corpus.domain_names
    tokens_D = np.array([corpus.split(name, "train").tokens for name in names])
    return MixerContext(names, tokens_D, total_tokens=10**6, total_steps=steps)


def fixed(shares: Sequence[float]) -> Planned:
    return Planned("fixed", [np.array(shares)])


def packed(**changes: Any) -> PackedData:
    return PackedData(**{"sequence_length": ROW, "rows_per_step": 6, "shuffle_blocks": 3} | changes)


def local(mixer: Mixer, corpus: Corpus, **options: Any) -> LocalController:
    return LocalController(build_mixture_state(mixer, context(corpus), **options))


def local_stream(
    corpus: Corpus,
    controller: LocalController,
    data: PackedData | DocumentData | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    budget_bytes: int = 1 << 30,
    **options: Any,
) -> MixtureStream:
    data = data or packed()
    source = LocalSource(corpus, row_tokens=row_tokens(data), budget_bytes=budget_bytes)
    return MixtureStream(
        corpus,
        data,
        seed=5,
        rank=rank,
        world_size=world_size,
        controller=controller,
        source=source,
        **options,
    )


@dataclass
class Seen:
    """The batch of one step."""

    step: int
    version: int
    tokens: npt.NDArray[np.unsignedinteger]
    starts: list[list[int]]
    label_tokens: int
    batch_hash: str
    counts: list[int]
    micro_batches: list[list[SeenDocument]] = field(default_factory=list)
    """Of whole documents."""


SeenDocument = tuple[int, tuple[int, ...], list[int]]
"""Domain, ranks and tokens of a document."""


def read(stream: MixtureStream, steps: int) -> list[Seen]:
    seen = []
    for _ in range(steps):
        batch = stream.next()
        known = batch.label_tokens, batch.batch_hash, batch.counts_D.tolist()
        if isinstance(batch, DocumentBatch):
            micro_batches = [
                [(d.domain, d.ranks, d.tokens.tolist()) for d in micro]
                for micro in batch.micro_batches
            ]
            none = np.zeros(0, np.uint16)
            seen.append(Seen(batch.step, batch.version, none, [], *known, micro_batches))
            continue
        offsets, positions = batch.row_starts
        starts = [positions[a:b].tolist() for a, b in pairwise(offsets)]
        seen.append(Seen(batch.step, batch.version, batch.tokens.copy(), starts, *known))
    return seen


def slow_rows(
    corpus: Corpus, entries: Sequence[MixtureEntry], data: PackedData, steps: int
) -> list[tuple[npt.NDArray[np.unsignedinteger], list[list[int]], int]]:
    """Return (tokens, document starts per row, labels) of each step, read row by row."""
    planner = PackedPlanner(
        n_domains=len(corpus.domain_names),
        rows_per_step=data.rows_per_step,
        seed=5,
        log=MixtureLog(corpus.domain_names, list(entries)),
    )
    length = data.sequence_length
    orders = [
        DomainOrder(geometry, seed=5, window=data.shuffle_blocks)
        for geometry in row_geometry(corpus, length)
    ]
    result = []
    for _ in range(steps):
        plan = planner.plan(1)
        rows, starts, labels = [], [], 0
        for domain, n in zip(plan.domain_SB[0].tolist(), plan.index_SB[0].tolist(), strict=True):
            _, group, unit = (int(part[0]) for part in orders[domain].locate(np.array([n])))
            block = corpus.read_block(corpus.domain_names[domain], "train", group)
            first = unit * length
            rows.append(block.tokens[first : first + length])
            mine = block.starts[(block.starts >= first) & (block.starts < first + length)] - first
            starts.append(mine.tolist())
            labels += length - 1 - int((mine > 0).sum())
        result.append((np.stack(rows), starts, labels))
    return result


class Reader:
    """A rank in a process of its own; an actor in the tests that need Ray."""

    def open(
        self,
        path: str,
        controller: Any,
        plane: Any,
        *,
        data: PackedData | DocumentData | None = None,
        rank: int = 0,
        world_size: int = 1,
        attempt: str = "one",
        **options: Any,
    ) -> None:
        """Open a stream; `read` reads from it."""
        from raymix.streaming.blocks.shared_source import PlaneSource
        from raymix.streaming.controller.client import RemoteController

        data = data or packed()
        self._names = Corpus.open(path).domain_names
        self._control = RemoteController(
            controller, attempt=attempt, rank=rank, world_size=world_size
        )
        self._stream = MixtureStream(
            Corpus.open(path),
            data,
            seed=5,
            rank=rank,
            world_size=world_size,
            controller=self._control,
            source=PlaneSource(
                plane, row_tokens=row_tokens(data), rank=rank, world_size=world_size
            ),
            **options,
        )

    def read(self, steps: int, window: int = 0) -> list[Seen]:
        """Return the next steps; with `window`, push statistics after every so many steps."""
        seen = []
        for _ in range(steps):
            seen += read(self._stream, 1)
            step = seen[-1].step
            if window and (step + 1) % window == 0:
                recent = [s for s in seen if s.step // window == step // window]
                self._control.push(step // window, window_stats(recent, window, self._names))
        return seen

    def read_slowly(
        self, steps: int, seconds: float, asks: Mapping[int, Sequence[float]]
    ) -> tuple[list[Seen], dict[int, int]]:
        """Return the steps, and for each ask, made during a step, the step it holds from."""
        seen, first_steps = [], {}
        for _ in range(steps):
            seen += read(self._stream, 1)
            if seen[-1].step in asks:
                first_steps[seen[-1].step] = self._control.set_weights(asks[seen[-1].step])
            time.sleep(seconds)
        return seen, first_steps

    def state(self) -> dict[str, Any]:
        return self._stream.state_dict()


def window_stats(seen: Sequence[Seen], window: int, names: Sequence[str]) -> DomainStats:
    """Return the statistics of a window: rows of the whole batches, whatever the rank."""
    rows_D = np.sum([s.counts for s in seen], axis=0)
    return DomainStats(
        step=seen[0].step // window * window,
        window=window,
        tokens_D=rows_D * ROW,
        loss_D=np.full(len(names), 1.0),
    )
