"""The stream of one rank: leases requested, blocks fetched, batches returned step by step.

`MixtureStream` requests leases, plans up to them, fetches the blocks and returns batches. A lease
covers about `lease_s` seconds of reading: a training loop with longer steps gets one step at a
time, so a change of shares requested during step t takes effect by step t + 2; a faster reader
does not pay for a call per step. With a remote controller all this is done by a thread while the
steps before are trained on, and `next` only copies rows. A reader that does nothing but read gains
nothing by a thread, as both compete for Python's interpreter lock.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from raymix.errors import CorpusError, RecipeError, TrainingError
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
from raymix.streaming.controller.base import Controller
from raymix.streaming.controller.windows import LOSS_WEIGHTS, NOTE

_MAX_LEASE_STEPS = 4096
# From this many steps per lease on, batches are prepared in the caller: see the module's docstring.
_FAST_LEASE_STEPS = 64


class MixtureStream:
    """Batches of one rank, in order.

    Args of the constructor:
        corpus: The prepared corpus; its train split is read.
        data: The recipe's `data` section.
        seed: The run's seed.
        rank: This rank.
        world_size: Ranks that share each batch.
        controller: Grants leases and sends log entries.
        source: Reads blocks; its `row_tokens` must be those of `row_tokens(data)`.
        assignments: Assign documents to ranks, the same on all ranks; None: each document stays on
            one rank, and a micro-batch has room for one of full length.
        state: From `state_dict`, to continue.
        limit: Steps in the whole run; no lease goes beyond.
        keep_past: Whether `state_dict` can return the state of any step since `release`, for loops
            that read ahead of what they train on.

    Attributes:
        waited_s: Seconds that the last `next` took: leases, blocks and assembly.
        log: The mixture log as far as this rank has it.

    Raises:
        CorpusError: If `state` belongs to a corpus of other content.
        RecipeError: If `state` belongs to another mode or sequence length.
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
        keep_past: bool = False,
    ) -> None:
        self.waited_s = 0.0
        self._keep_past = keep_past
        self.log = MixtureLog(corpus.domain_names)
        self._controller = controller
        self._limit = limit
        self._identity = {
            "fingerprint": corpus.fingerprint,
            "mode": data.mode,
            "sequence_length": data.sequence_length,
        }
        rank_info = RankInfo(seed=seed, rank=rank, world_size=world_size)
        self._builder: BatchBuilder
        if isinstance(data, PackedData):
            self._builder = PackedBatchBuilder(corpus, data, rank_info, log=self.log, source=source)
        else:
            assign = assignments or assign_whole_documents(world_size, data.sequence_length)
            self._builder = DocumentBatchBuilder(
                corpus, data, rank_info, log=self.log, source=source, assignments=assign
            )
        self._step = 0
        if state is not None:
            self._check(state, accept_changed=data.accept_changed_corpus)
            self._step = self._builder.load(state)
        # The builder runs ahead of the caller; until the first batch this is the caller's state.
        self._start_state, self._first_step = self._builder.state_dict(), self._step
        self._chunk: Chunk | None = None
        # Chunks before this one, as far as `release` has not given them up: their states.
        self._past: list[Chunk] = []
        self._planned_until = self._leased_until = self._ready_until = self._step
        self._lease_steps = 1
        self._lease_requested = False
        # (time in seconds, step) of the chunk before.
        self._last_pace: tuple[float, int] | None = None
        self._background: BackgroundCall[Chunk] | None = None
        self._next_chunk: Future[Chunk] | None = None
        if controller.remote and not self.done:
            self._background = BackgroundCall("raymix-stream")
            # At once, while the caller still builds its model.
            self._next_chunk = self._background.submit(self._prepare, self._step)

    @property
    def step(self) -> int:
        """Return the step whose batch `next` returns next."""
        return self._step

    @property
    def done(self) -> bool:
        """Return whether all batches up to the limit have been returned."""
        return self._limit is not None and self._step >= self._limit

    def next(self) -> StepBatch | DocumentBatch:
        """Return the next batch, waiting for lease and blocks if needed.

        Raises:
            StopIteration: After the last step, if there is a limit.
            CorpusError: If a block is corrupt; it names the file and the block.
            ClusterError: If controller or block plane do not answer within a time limit.
        """
        started = time.perf_counter()
        if self._chunk is None or self._step == self._ready_until:
            chunk = self._advance()
            if self._keep_past and self._chunk is not None:
                self._past.append(self._chunk)
            self._chunk = chunk
        batch = self._chunk.batch(self._step)
        self._step += 1
        self.waited_s = time.perf_counter() - started
        return batch

    def skip_to(self, step: int) -> None:
        """Go on at `step` as if the steps before it had been returned, without reading them.

        Only before the first batch, and with a controller in this process.

        Raises:
            CorpusError: If limits leave too little for these steps.
            TrainingError: If their shares depend on statistics, as under an adaptive mixer.
        """
        while self._planned_until < step:
            self._lease_steps = min(step - self._planned_until, _MAX_LEASE_STEPS)
            self._wait_for_lease(self._planned_until)
            n_steps = min(step, self._leased_until) - self._planned_until
            self._planned_until += self._builder.skip(n_steps)
        self._lease_steps = 1
        self._step = self._first_step = self._ready_until = step
        self._start_state = self._builder.state_dict()

    def loss_weights(self, step: int) -> list[float] | None:
        """Return the factor of each domain's loss at a step already returned; None: all 1."""
        stats = self.log.at(step).stats
        factors = stats.get(LOSS_WEIGHTS) if stats else None
        return None if factors is None else [factors[name] for name in self.log.domains]

    def note(self, step: int) -> str | None:
        """Return the mixer's note on the shares that begin at `step`, None without one."""
        entry = self.log.at(step)
        note: str | None = entry.stats.get(NOTE) if entry.stats else None
        return note if entry.first_step == step else None

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return, in JSON types, the state to continue at `step`, else after the last batch.

        It is the same on all ranks. Shares are not part of it: the controller's snapshot has them.

        Raises:
            TrainingError: If `step` was not returned yet, or was released.
        """
        step = self._step if step is None else step
        if step == self._first_step:
            return {**self._start_state, **self._identity}
        chunks = [*self._past, *([] if self._chunk is None else [self._chunk])]
        for chunk in chunks:
            if step <= chunk.end and step >= chunk.first and step <= self._step:
                return {**chunk.state_at(step), **self._identity}
        raise TrainingError.at(
            "step",
            step,
            "the stream has no state for it",
            allowed=f"Allowed: {chunks[0].first if chunks else self._first_step} to {self._step}",
        )

    def release(self, step: int) -> None:
        """Give up the states before `step`, those of a loop that has trained up to it."""
        self._past = [chunk for chunk in self._past if chunk.end > step]

    def _advance(self) -> Chunk:
        """Return the chunk that begins at this step, and have the one after it prepared."""
        if self.done:
            raise StopIteration
        # A failed chunk stays: `next` raises the same error again when it is repeated.
        chunk = self._next_chunk.result() if self._next_chunk else self._prepare(self._step)
        self._ready_until = chunk.end
        self._next_chunk = None
        more = self._limit is None or chunk.end < self._limit
        if self._background and more and self._lease_steps < _FAST_LEASE_STEPS:
            # + 1: by the time the thread runs, the caller has the batch of this step.
            self._next_chunk = self._background.submit(self._prepare, self._step + 1)
        return chunk

    def _prepare(self, step: int) -> Chunk:
        """Return the next steps, as far as leases reach, while `step` is the one read next."""
        self._adapt_lease_steps(step)
        self._request_early(step)
        self._wait_for_lease(step)
        self._request_early(step)
        # Half a lease at a time: the next one is under way while the other half is read.
        max_steps = max(1, self._lease_steps // 2)
        chunk = self._builder.plan(min(max_steps, self._leased_until - self._planned_until))
        self._planned_until = chunk.end
        return chunk

    def _wait_for_lease(self, step: int) -> None:
        """Wait for a lease of the next step to be planned, while `step` is the one read next."""
        while self._leased_until <= self._planned_until:
            if not self._lease_requested:
                self._request_lease(max(step, self._planned_until))
            lease = self._controller.wait_lease()
            self._lease_requested = False
            for entry in lease.entries:
                self.log.append(entry)
            # A restarted controller may answer with the old lease first.
            self._leased_until = max(self._leased_until, lease.until)

    def _adapt_lease_steps(self, step: int) -> None:
        """Set the steps per lease so that they cover `lease_s`, by the time of the last chunk."""
        if self._chunk is None:
            return
        now, last = time.perf_counter(), self._last_pace
        self._last_pace = (now, step)
        if last is not None:
            seconds = (now - last[0]) / (step - last[1])
            # A single quick step says little, and too long a lease delays a change of shares: it
            # doubles at most, and shrinks at once.
            steps = int(self._controller.lease_s / max(seconds, 1e-9))
            self._lease_steps = max(1, min(steps, 2 * self._lease_steps, _MAX_LEASE_STEPS))

    def _request_early(self, step: int) -> None:
        if not self._lease_requested and self._leased_until - step <= self._lease_steps // 2:
            self._request_lease(step)

    def _request_lease(self, step: int) -> None:
        n_steps = self._lease_steps
        if self._limit is not None:
            n_steps = min(n_steps, self._limit - step)
        # The controller answers once it can grant more: this request would wait forever.
        if step + n_steps <= self._leased_until:
            return
        self._controller.request_lease(
            step=step,
            leased_until=self._leased_until,
            n_steps=n_steps,
            version=self.log.entries[-1].version if self.log.entries else -1,
        )
        self._lease_requested = True

    def _check(self, state: Mapping[str, Any], *, accept_changed: bool) -> None:
        if state["fingerprint"] != self._identity["fingerprint"] and not accept_changed:
            raise CorpusError.at(
                "corpus.fingerprint",
                self._identity["fingerprint"],
                f"the checkpoint was made with another corpus, {state['fingerprint']}",
                fix="Restore that corpus, or set data.accept_changed_corpus",
            )
        for field in ("mode", "sequence_length"):
            if state[field] != self._identity[field]:
                raise RecipeError.at(
                    f"data.{field}",
                    self._identity[field],
                    f"the checkpoint was made with {state[field]!r}",
                    fix="Set it to that: the checkpoint counts what was read in these units",
                )


def row_tokens(data: PackedData | DocumentData) -> int:
    """Return the `row_tokens` of a block source: the tokens of a row, or 1 for whole documents."""
    return data.sequence_length if isinstance(data, PackedData) else 1
