"""The worker's end of the stream: what this rank reads, step by step.

`MixtureStream` holds a lease, plans up to it, gets the blocks, and hands out batches. The next
lease covers about `lease_s` seconds of reading: a training loop of more than that per step gets
one step at a time, so a change of weights asked for during step t is in the batch of step t + 2
at the latest; a faster reader does not pay a call per step. With a controller elsewhere, all this
is done by a thread while the steps before are worked on: then `next` only copies rows. A reader
that does nothing but read gains nothing by a thread, as both want the interpreter all the time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from raymix.errors import CorpusError, RecipeError
from raymix.recipe.training import DocumentData, PackedData
from raymix.sampling import MixtureLog
from raymix.store import Corpus
from raymix.streaming.batches.assign import Assignments, assign_whole_documents
from raymix.streaming.batches.background import BackgroundCall
from raymix.streaming.batches.builder import BatchBuilder, Chunk, RankInfo
from raymix.streaming.batches.documents import DocumentBatchBuilder
from raymix.streaming.batches.packed import PackedBatchBuilder
from raymix.streaming.batches.step_batch import DocumentBatch, StepBatch
from raymix.streaming.blocks.sources import BlockSource
from raymix.streaming.controller.client import Controller
from raymix.streaming.controller.windows import LOSS_WEIGHTS, NOTE

_MOST_LEASED = 4096
# Steps per lease from which on a reader is so fast that it prepares its batches itself.
_FAST = 64


class MixtureStream:
    """Batches of one rank, in order.

    Args of the constructor:
        corpus: The prepared corpus; its train split is read.
        data: The recipe's `data` section.
        seed: The run's seed.
        rank: This rank.
        world_size: Ranks that share each batch.
        controller: Grants leases and tells the weights.
        source: Gives blocks; its `row_tokens` must be those of `row_tokens(data)`.
        assignments: Say which rank holds which document, the same on every rank; left out, each
            document stays on one rank, and one rank holds a sequence length at once.
        state: From `state_dict`, to continue.
        limit: Steps in the whole run; nothing beyond is asked for.

    Attributes:
        waited_s: Seconds that the last `next` took: leases, blocks and assembly.
        log: The mixture log as far as this rank knows it.

    Raises:
        CorpusError: If `state` belongs to a corpus of other content.
        RecipeError: If `state` belongs to another way of cutting it.
    """

    def __init__(
        self,
        corpus: Corpus,
        data: PackedData | DocumentData,
        *,
        seed: int,
        rank: int,
        world_size: int,
        controller: Controller,
        source: BlockSource,
        assignments: Assignments | None = None,
        state: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> None:
        self.waited_s = 0.0
        self.log = MixtureLog(corpus.domain_names)
        self._controller = controller
        self._limit = limit
        self._about = {
            "fingerprint": corpus.fingerprint,
            "mode": data.mode,
            "sequence_length": data.sequence_length,
        }
        place = RankInfo(seed=seed, rank=rank, world_size=world_size)
        self._feed: BatchBuilder
        if isinstance(data, PackedData):
            self._feed = PackedBatchBuilder(corpus, data, place, log=self.log, source=source)
        else:
            assign = assignments or assign_whole_documents(world_size, data.sequence_length)
            self._feed = DocumentBatchBuilder(
                corpus, data, place, log=self.log, source=source, assignments=assign
            )
        self._step = 0
        if state is not None:
            self._check(state, accept_changed=data.accept_changed_corpus)
            self._step = self._feed.load(state)
        self._begin = self._feed.state_dict()
        self._chunk: Chunk | None = None
        self._planned = self._held_until = self._ready_until = self._step
        self._want = 1
        self._asked = False
        self._paced: tuple[float, int] | None = None
        self._background: BackgroundCall[Chunk] | None = None
        self._upcoming: Future[Chunk] | None = None
        if controller.remote and not self.done:
            self._background = BackgroundCall("raymix-stream")
            self._upcoming = self._background.submit(self._prepare, self._step)

    @property
    def step(self) -> int:
        """Return the step that `next` hands out next."""
        return self._step

    @property
    def done(self) -> bool:
        """Return whether all steps up to the limit have been handed out."""
        return self._limit is not None and self._step >= self._limit

    def next(self) -> StepBatch | DocumentBatch:
        """Return the next batch, waiting for lease and blocks if need be.

        Raises:
            StopIteration: After the last step, if there is a limit.
            CorpusError: If a block is corrupt; it names the file and the block.
            ClusterError: If controller or blocks cannot be had within a time limit.
        """
        begun = time.perf_counter()
        if self._chunk is None or self._step == self._ready_until:
            self._chunk = self._next_chunk()
        batch = self._chunk.batch(self._step)
        self._step += 1
        self.waited_s = time.perf_counter() - begun
        return batch

    def loss_weights(self, step: int) -> list[float] | None:
        """Return the factor of each domain's loss at a step already handed out; None: all 1."""
        stats = self.log.at(step).stats
        factors = stats.get(LOSS_WEIGHTS) if stats else None
        return None if factors is None else [factors[name] for name in self.log.domains]

    def note(self, step: int) -> str | None:
        """Return what the mixer had to say about the shares that begin at `step`, if anything."""
        entry = self.log.at(step)
        found: str | None = entry.stats.get(NOTE) if entry.stats else None
        return found if entry.first_step == step else None

    def state_dict(self) -> dict[str, Any]:
        """Return, in JSON types, what it takes to continue after the batch last handed out.

        It is the same on every rank. The weights are not part of it: the controller's snapshot
        has them.
        """
        state = self._begin if self._chunk is None else self._chunk.state_at(self._step)
        return {**state, **self._about}

    def _next_chunk(self) -> Chunk:
        """Return the chunk that begins at this step, and have the one after it prepared."""
        if self.done:
            raise StopIteration
        # A chunk that failed stays: whoever asks again hears the same.
        chunk = self._upcoming.result() if self._upcoming else self._prepare(self._step)
        self._ready_until = chunk.end
        self._upcoming = None
        more = self._limit is None or chunk.end < self._limit
        if self._background and more and self._want < _FAST:
            self._upcoming = self._background.submit(self._prepare, self._step + 1)
        return chunk

    def _prepare(self, step: int) -> Chunk:
        """Return the next steps, as far as leases reach, while `step` is the one read next."""
        self._pace(step)
        self._ask_early(step)
        while self._held_until <= self._planned:
            if not self._asked:
                self._ask(max(step, self._planned))
            lease = self._controller.take()
            self._asked = False
            for entry in lease.entries:
                self.log.append(entry)
            self._held_until = max(self._held_until, lease.until)
        self._ask_early(step)
        # Half a lease at a time: the next one is on its way while the other half is read.
        most = max(1, self._want // 2)
        chunk = self._feed.plan(min(most, self._held_until - self._planned))
        self._planned = chunk.end
        return chunk

    def _pace(self, step: int) -> None:
        """Work out how many steps `lease_s` covers, from chunk to chunk."""
        if self._chunk is None:
            return
        now, before = time.perf_counter(), self._paced
        self._paced = (now, step)
        if before is not None:
            seconds = (now - before[0]) / (step - before[1])
            # One quick step is no pace: grow step by step, shrink at once.
            paced = int(self._controller.lease_s / max(seconds, 1e-9))
            self._want = max(1, min(paced, 2 * self._want, _MOST_LEASED))

    def _ask_early(self, step: int) -> None:
        if not self._asked and self._held_until - step <= self._want // 2:
            self._ask(step)

    def _ask(self, step: int) -> None:
        want = self._want
        if self._limit is not None:
            want = min(want, self._limit - step)
        if step + want <= self._held_until:
            return
        version = self.log.entries[-1].version if self.log.entries else -1
        self._controller.ask(step=step, held_until=self._held_until, want=want, version=version)
        self._asked = True

    def _check(self, state: Mapping[str, Any], *, accept_changed: bool) -> None:
        if state["fingerprint"] != self._about["fingerprint"] and not accept_changed:
            raise CorpusError.at(
                "corpus.fingerprint",
                self._about["fingerprint"],
                f"the checkpoint was made with another corpus, {state['fingerprint']}",
                fix="Restore that corpus, or set data.accept_changed_corpus",
            )
        for field in ("mode", "sequence_length"):
            if state[field] != self._about[field]:
                raise RecipeError.at(
                    f"data.{field}",
                    self._about[field],
                    f"the checkpoint was made with {state[field]!r}",
                    fix="What has been read is counted in its units",
                )


def row_tokens(data: PackedData | DocumentData) -> int:
    """Return the `row_tokens` that a block source must cut to: rows, or nothing in particular."""
    return data.sequence_length if isinstance(data, PackedData) else 1
