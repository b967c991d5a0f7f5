"""The sequence scheduler: an actor that assigns documents to ranks, and its client.

It is the length-bucketing actor of the design. One actor plans for all ranks, each step once, and
the next steps while the present ones are trained on. It has no state that cannot be computed
again: after a restart a rank sends it the layout, the mixture log and the state of the document
order, and it returns the same plans as before.
Only steps whose shares are in the log are planned: those under the leases of the ranks that ask.
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
from raymix.streaming.actors import start_actor
from raymix.streaming.batches.assign import AssignmentContext, Assignments, RankAssignment
from raymix.streaming.controller.client import get_result
from raymix.streaming.sequences.step_plans import RankMicroBatches, SchedulingConfig, StepPlans

_LOOKAHEAD_STEPS = 2
# Planning takes seconds; this is the time after which an actor counts as lost.
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A rank's request for its part of a step."""

    attempt: str
    """Id of the worker group."""
    rank: int
    step: int
    until: int
    """The rank's log is final below this step."""
    version: int
    """Version of the rank's newest log entry."""
    # Sent only after an answer of None: per step, a log of 10,000 domains would be megabytes.
    entries: tuple[MixtureEntry, ...] = ()
    """The rank's log; empty where the actor should have it."""
    state: Mapping[str, Any] | None = None
    """With the log, the state of the document order at `step` or before."""
    config: SchedulingConfig | None = None
    """With the log, layout, cost model and planner."""


class SequenceScheduler:
    """Assigns the documents of a run to its ranks, some steps ahead.

    Args of the constructor:
        corpus_path: The prepared corpus.
        data: The recipe's `data` section, in document mode.
        lookahead_steps: Steps that are planned before a rank requests them.
    """

    def __init__(
        self, corpus_path: str, data: DocumentData, *, lookahead_steps: int = _LOOKAHEAD_STEPS
    ) -> None:
        self._corpus = Corpus.open(corpus_path)
        self._data = data
        self._lookahead_steps = lookahead_steps
        self._plans: StepPlans | None = None
        self._attempt: str | None = None
        self._ended_attempts: set[str] = set()
        # By rank, the newest step requested.
        self._requested: dict[int, int] = {}
        # Plans build on one another, so they are made one at a time.
        self._planning = asyncio.Lock()
        self._lookahead: asyncio.Task[None] | None = None
        # A thread, as planning is CPU work that would block the event loop; one, for the lock.
        self._thread = ThreadPoolExecutor(1, "raymix-sequences")

    async def plan(self, request: PlanRequest) -> RankMicroBatches | None:
        """Return the rank's part of a step; None: repeat the request with log and state.

        Raises:
            TrainingError: If a later attempt has replaced the rank's.
            CorpusError: If limits leave no documents.
            ScheduleError: If a document is too long for a group of ranks.
        """
        async with self._planning:
            plans = self._plans_for(request)
            if plans is None:
                return None
            if request.step not in plans.planned_steps:
                await self._plan(plans, request.step)
            part = plans.plan(request.step).for_rank(request.rank)
        self._requested[request.rank] = request.step
        # Before all ranks have asked, a rank further behind may still need older steps.
        if len(self._requested) == plans.ranks:
            plans.drop_before(min(self._requested.values()))
        if self._lookahead is None or self._lookahead.done():
            self._lookahead = asyncio.get_running_loop().create_task(self._plan_ahead())
        return part

    async def status(self) -> dict[str, Any]:
        """Return attempt and planned steps in JSON types, for people."""
        return {
            "attempt": self._attempt,
            "held": list(self._plans.planned_steps) if self._plans else [],
            "next_step": self._plans.next_step if self._plans else 0,
            "version": self._plans.version if self._plans else -1,
            "pid": os.getpid(),
        }

    def _plans_for(self, request: PlanRequest) -> StepPlans | None:
        """Add the request's log entries; return the plans if they have or can have its step."""
        plans = self._plans
        # Ranks of a group that was replaced may still run, and must not reset the plans.
        if request.attempt in self._ended_attempts:
            raise TrainingError.at(
                "attempt",
                request.attempt,
                f"a later attempt, {self._attempt}, is being planned for",
            )
        new_attempt = request.attempt != self._attempt
        if plans and not new_attempt and (request.entries or plans.version >= request.version):
            plans.extend_log(request.entries, request.until)
            if plans.can_plan(request.step):
                return plans
        if request.state is None or request.config is None:
            return None
        if new_attempt:
            if self._attempt is not None:
                self._ended_attempts.add(self._attempt)
            self._attempt = request.attempt
            self._requested = {}
        if plans is None or new_attempt:
            plans = self._plans = StepPlans(self._corpus, self._data, request.config)
        plans.reset(request.state, request.entries, request.until)
        return plans if plans.can_plan(request.step) else None

    async def _plan_ahead(self) -> None:
        """Plan the next steps, one at a time."""
        while self._requested and self._plans:
            # The lock is released between steps, so that requests go first.
            async with self._planning:
                plans, step = self._plans, self._plans.next_step
                if step > max(self._requested.values(), default=-1) + self._lookahead_steps:
                    return
                if not plans.can_plan(step):
                    return
                # Not raised here: the rank that requests the step gets the same error.
                with suppress(RaymixError):
                    await self._plan(plans, step)
                if plans.next_step == step:
                    return

    async def _plan(self, plans: StepPlans, step: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, plans.plan, step)


SequenceSchedulerActor = ray.remote(SequenceScheduler)


class RemoteSequenceScheduler:
    """The actor, seen from one rank; the next step is requested while this one is trained on.

    Args of the constructor:
        handle: The actor.
        config: Layout, cost model and planner, the same on all ranks.
        context: The rank and its mixture log.
        attempt: Id of the worker group, the same on all its ranks.
    """

    def __init__(
        self, handle: Any, config: SchedulingConfig, context: AssignmentContext, *, attempt: str
    ) -> None:
        self._handle = handle
        self._config = config
        self._attempt = attempt
        self._context = context
        # The step requested ahead, and the reference of its answer.
        self._pending: tuple[int, Any] | None = None

    def assignment(self, step: int) -> RankMicroBatches:
        """Return this rank's part of a step, which the log must cover.

        Raises:
            TrainingError: If another attempt is being planned for, or the step has no shares yet.
            ClusterLostError: If the actor is gone or does not answer.
        """
        until = self._context.until()
        if step >= until:
            raise TrainingError.at(
                "step", step, f"the weights of steps from {until} on are not decided"
            )
        pending, self._pending = self._pending, None
        # After a resume or a rewind the step requested ahead is another one.
        answer = pending[1] if pending is not None and pending[0] == step else self._request(step)
        part = self._get(answer)
        if part is None:
            part = self._get(self._request(step, with_state=True))
        if part is None:
            raise TrainingError.at("step", step, "the state it was planned from lies behind it")
        if step + 1 < until:
            self._pending = step + 1, self._request(step + 1)
        return part

    def _request(self, step: int, *, with_state: bool = False) -> Any:
        context = self._context
        entries: Sequence[MixtureEntry] = context.log.entries
        request = PlanRequest(
            attempt=self._attempt,
            rank=context.rank,
            step=step,
            until=context.until(),
            version=entries[-1].version if entries else -1,
            entries=tuple(entries) if with_state else (),
            state=context.planner_state(step) if with_state else None,
            config=self._config if with_state else None,
        )
        return self._handle.plan.remote(request)

    def _get(self, answer: Any) -> RankMicroBatches | None:
        part: RankMicroBatches | None = get_result(
            answer, timeout_s=_TIMEOUT_S, actor="the sequence scheduler"
        )
        return part


def assign_remotely(handle: Any, config: SchedulingConfig, *, attempt: str) -> Assignments:
    """Return assignments by the actor, each checked against the documents that the rank reads.

    Args:
        handle: The actor.
        config: Layout, cost model and planner, the same on all ranks.
        attempt: Id of the worker group, the same on all its ranks.
    """

    def assignments(context: AssignmentContext) -> RankAssignment:
        scheduler = RemoteSequenceScheduler(handle, config, context, attempt=attempt)

        def assign(step: DocumentStep) -> tuple[MicroBatch, ...]:
            part = scheduler.assignment(step.step)
            # Micro-batches name documents by position, so another batch would go unnoticed.
            if part.batch_hash != batch_hash(step.domain_N, step.index_N):
                raise TrainingError.at(
                    "step", step.step, "ranks were planned for other documents than are read"
                )
            return part.micro_batches

        return assign

    return assignments


def start_sequence_scheduler(corpus: Corpus, data: DocumentData, *, name: str | None = None) -> Any:
    """Return the actor of a new sequence scheduler on this node, owned by this process.

    Args:
        corpus: The corpus; this node must be able to read its path.
        data: The recipe's `data` section.
        name: Name for `ray.get_actor`; none needed where the handle is passed on.
    """
    arguments = {"corpus_path": corpus.path, "data": data}
    return start_actor(SequenceSchedulerActor, name, arguments=arguments)
