"""The planner of ranks as an actor, and how a rank asks it: `assign_remotely`.

One actor plans for all ranks, each step once, and the next steps while these are worked on. It
keeps nothing that cannot be made again: a rank that finds it new, after it died, brings it the
layout, the mixture log and the state of the order of documents, and gets the plans it would have
had.
Only steps whose weights stand in the log are planned: those under the leases of those who ask.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from raymix.errors import RaymixError, TrainingError
from raymix.recipe.training import DocumentData
from raymix.sampling import DocumentStep, MixtureEntry, batch_hash
from raymix.schedule import MicroBatch
from raymix.store import Corpus
from raymix.streaming.actor_options import actor_options
from raymix.streaming.batches.assign import AssignmentContext, Assignments, RankAssignment
from raymix.streaming.controller.client import get
from raymix.streaming.sequences.step_plans import RankMicroBatches, SchedulingConfig, StepPlans

_AHEAD = 2
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A rank asks for its part of a step."""

    attempt: str
    """Names the worker group."""
    rank: int
    step: int
    until: int
    """The step before which the asker's log is final."""
    version: int
    """Of the newest log entry the asker knows."""
    entries: tuple[MixtureEntry, ...] = ()
    """The asker's log, where it was told that it is needed."""
    state: Mapping[str, Any] | None = None
    """With them, the state of the order of documents at `step` or before."""
    how: SchedulingConfig | None = None
    """With them, how documents are dealt out."""


class SequenceScheduler:
    """Plans the ranks of a run, some steps ahead.

    Args of the constructor:
        corpus_path: The prepared corpus.
        data: The recipe's `data` section, in document mode.
        ahead: Steps that are planned before anybody asks.
    """

    def __init__(self, corpus_path: str, data: DocumentData, *, ahead: int = _AHEAD) -> None:
        self._corpus = Corpus.open(corpus_path)
        self._data = data
        self._ahead = ahead
        self._plans: StepPlans | None = None
        self._attempt: str | None = None
        self._over: set[str] = set()
        self._asked: dict[int, int] = {}
        self._at_work = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "raymix-bucketer")

    async def plan(self, request: PlanRequest) -> RankMicroBatches | None:
        """Return the rank's part of a step; None: ask again with log and state.

        Raises:
            TrainingError: If a later attempt has taken the asker's place.
            CorpusError: If limits leave no documents.
            ScheduleError: If a document is too long for a group of ranks.
        """
        async with self._at_work:
            plans = self._informed(request)
            if plans is None:
                return None
            if request.step not in plans.held:
                await self._plan(plans, request.step)
            found = plans.planned(request.step).of(request.rank)
        self._asked[request.rank] = request.step
        if len(self._asked) == plans.ranks:
            plans.forget(min(self._asked.values()))
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look_ahead())
        return found

    async def status(self) -> dict[str, Any]:
        """Return where things stand, in JSON types, for people."""
        return {
            "attempt": self._attempt,
            "held": list(self._plans.held) if self._plans else [],
            "next_step": self._plans.next_step if self._plans else 0,
            "version": self._plans.version if self._plans else -1,
            "pid": os.getpid(),
        }

    def _informed(self, request: PlanRequest) -> StepPlans | None:
        """Take what the asker brings; return the plans, if its step is one of them or can be."""
        plans = self._plans
        if request.attempt in self._over:
            raise TrainingError.at(
                "attempt",
                request.attempt,
                f"a later attempt, {self._attempt}, is being planned for",
            )
        fresh = request.attempt != self._attempt
        if plans and not fresh and (request.entries or plans.version >= request.version):
            plans.learn(request.entries, request.until)
            if plans.can(request.step):
                return plans
        if request.state is None or request.how is None:
            return None
        if fresh:
            if self._attempt is not None:
                self._over.add(self._attempt)
            self._attempt = request.attempt
            self._asked = {}
        if plans is None or fresh:
            plans = self._plans = StepPlans(self._corpus, self._data, request.how)
        plans.begin(request.state, request.entries, request.until)
        return plans if plans.can(request.step) else None

    async def _look_ahead(self) -> None:
        """Plan the next steps, one at a time: whoever asks goes first."""
        while self._asked and self._plans:
            async with self._at_work:
                plans, step = self._plans, self._plans.next_step
                if step > max(self._asked.values(), default=-1) + self._ahead:
                    return
                if not plans.can(step):
                    return
                # Whoever asks for the step is told what is wrong with it.
                with suppress(RaymixError):
                    await self._plan(plans, step)
                if plans.next_step == step:
                    return

    async def _plan(self, plans: StepPlans, step: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, plans.planned, step)


RemoteLengthBucketer = ray.remote(SequenceScheduler)


class RemoteSequenceScheduler:
    """The actor as one rank sees it; the next step is asked for while this one is worked on.

    Args of the constructor:
        handle: The actor.
        how: How documents are dealt out.
        attempt: Names the worker group, the same on all its ranks.
        reader: The rank.
    """

    def __init__(
        self, handle: Any, how: SchedulingConfig, reader: AssignmentContext, *, attempt: str
    ) -> None:
        self._handle = handle
        self._how = how
        self._attempt = attempt
        self._reader = reader
        self._asked: tuple[int, Any] | None = None

    def assignment(self, step: int) -> RankMicroBatches:
        """Return this rank's part of a step, which the log must cover.

        Raises:
            TrainingError: If another attempt is being planned for, or the step has no weights yet.
            ClusterError: If the actor is gone or does not answer.
        """
        until = self._reader.until()
        if step >= until:
            raise TrainingError.at(
                "step", step, f"the weights of steps from {until} on are not decided"
            )
        asked, self._asked = self._asked, None
        answer = asked[1] if asked is not None and asked[0] == step else self._ask(step)
        found = self._get(answer)
        if found is None:
            found = self._get(self._ask(step, everything=True))
        if found is None:
            raise TrainingError.at("step", step, "the state it was planned from lies behind it")
        if step + 1 < until:
            self._asked = step + 1, self._ask(step + 1)
        return found

    def _ask(self, step: int, *, everything: bool = False) -> Any:
        reader = self._reader
        entries: Sequence[MixtureEntry] = reader.log.entries
        request = PlanRequest(
            attempt=self._attempt,
            rank=reader.rank,
            step=step,
            until=reader.until(),
            version=entries[-1].version if entries else -1,
            entries=tuple(entries) if everything else (),
            state=reader.origin(step) if everything else None,
            how=self._how if everything else None,
        )
        return self._handle.plan.remote(request)

    def _get(self, answer: Any) -> RankMicroBatches | None:
        found: RankMicroBatches | None = get(
            answer, timeout_s=_PATIENCE_S, what="the planner of ranks"
        )
        return found


def assign_remotely(handle: Any, how: SchedulingConfig, *, attempt: str) -> Assignments:
    """Return assignments that the actor plans, each held against what the rank itself reads.

    Args:
        handle: The actor.
        how: How documents are dealt out, the same on all ranks.
        attempt: Names the worker group, the same on all its ranks.
    """

    def assignments(reader: AssignmentContext) -> RankAssignment:
        bucketer = RemoteSequenceScheduler(handle, how, reader, attempt=attempt)

        def deal(step: DocumentStep) -> tuple[MicroBatch, ...]:
            found = bucketer.assignment(step.step)
            if found.batch_hash != batch_hash(step.domain_N, step.index_N):
                raise TrainingError.at(
                    "step", step.step, "ranks were planned for other documents than are read"
                )
            return found.micro_batches

        return deal

    return assignments


def start_sequence_scheduler(corpus: Corpus, data: DocumentData, *, name: str | None = None) -> Any:
    """Return the actor of a new planner of ranks on this node, owned by this process.

    Args:
        corpus: The corpus; this node must be able to read its path.
        data: The recipe's `data` section.
        name: Name to find it by; none needed where the handle is passed on.
    """
    return RemoteLengthBucketer.options(**actor_options(name)).remote(corpus.path, data)
