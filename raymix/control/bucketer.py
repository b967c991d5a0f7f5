"""The planner of ranks as an actor, and how a rank asks: `RemoteBucketer`, or `LocalBucketer`.

One actor plans for all ranks, each step once, and the next steps while these are worked on. It
keeps nothing that cannot be made again: a rank that finds it new, after it died, brings it
the mixture log and the state of the order of documents, and gets the plans it would have had.
Only steps whose weights stand in the log are planned: those under the leases of those who ask.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymix.control.bucketing import Assignment, BucketPlan, StepPlans
from raymix.control.client import get
from raymix.errors import RaymixError, TrainingError, problem
from raymix.recipe.training import DocumentData
from raymix.sampling import MixtureEntry, MixtureLog
from raymix.store import Corpus

_AHEAD = 2
_CALLS_AT_ONCE = 10_000


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


class LengthBucketer:
    """Plans the ranks of a run, some steps ahead.

    Args of the constructor:
        corpus_path: The prepared corpus.
        data: The recipe's `data` section, in document mode.
        how: How documents are dealt out.
        ahead: Steps that are planned before anybody asks.
    """

    def __init__(
        self, corpus_path: str, data: DocumentData, how: BucketPlan, *, ahead: int = _AHEAD
    ) -> None:
        self._plans = StepPlans(Corpus.open(corpus_path), data, how)
        self._ranks = how.layout.ranks
        self._ahead = ahead
        self._attempt: str | None = None
        self._over: set[str] = set()
        self._asked: dict[int, int] = {}
        self._at_work = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "raymix-bucketer")

    async def plan(self, request: PlanRequest) -> Assignment | None:
        """Return the rank's part of a step; None: ask again with log and state.

        Raises:
            TrainingError: If a later attempt has taken the asker's place.
            CorpusError: If limits leave no documents.
        """
        async with self._at_work:
            if not self._informed(request):
                return None
            if request.step not in self._plans.held:
                await self._plan(request.step)
            found = self._plans.planned(request.step).of(request.rank)
        self._asked[request.rank] = request.step
        if len(self._asked) == self._ranks:
            self._plans.forget(min(self._asked.values()))
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look_ahead())
        return found

    async def status(self) -> dict[str, Any]:
        """Return where things stand, in JSON types, for people."""
        return {
            "attempt": self._attempt,
            "held": list(self._plans.held),
            "next_step": self._plans.next_step,
            "version": self._plans.version,
            "pid": os.getpid(),
        }

    def _informed(self, request: PlanRequest) -> bool:
        """Take what the asker brings; return whether its step can be planned."""
        plans = self._plans
        if request.attempt in self._over:
            wrong = f"a later attempt, {self._attempt}, is being planned for"
            raise TrainingError(problem("attempt", request.attempt, wrong))
        fresh = request.attempt != self._attempt
        if not fresh and (request.entries or plans.version >= request.version):
            plans.learn(request.entries, request.until)
            if plans.can(request.step):
                return True
        if request.state is None:
            return False
        if fresh:
            if self._attempt is not None:
                self._over.add(self._attempt)
            self._attempt = request.attempt
            self._asked = {}
        plans.begin(request.state, request.entries, request.until)
        return plans.can(request.step)

    async def _look_ahead(self) -> None:
        """Plan the next steps, one at a time: whoever asks goes first."""
        while len(self._asked) and self._plans.next_step <= max(self._asked.values()) + self._ahead:
            async with self._at_work:
                step = self._plans.next_step
                if not self._plans.can(step):
                    return
                # Whoever asks for the step is told what is wrong with it.
                with suppress(RaymixError):
                    await self._plan(step)
                if self._plans.next_step == step:
                    return

    async def _plan(self, step: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._plans.planned, step)


RemoteLengthBucketer = ray.remote(LengthBucketer)


class Bucketer(Protocol):
    """What a training loop needs: its part of every step."""

    def assignment(self, step: int) -> Assignment:
        """Return this rank's part of a step, waiting for it if need be."""
        ...


Origin = Callable[[int], Mapping[str, Any]]
"""Returns the state of a `DocumentPlanner` at a step or before it."""


class LocalBucketer:
    """Plans in this process, for a run without Ray; steps are asked for in order.

    Args of the constructor:
        corpus: The prepared corpus.
        data: The recipe's `data` section.
        how: How documents are dealt out.
        log: The mixture log, shared with whoever extends it; read up to the step asked for.
        origin: Where to begin.
        rank: This rank.
    """

    def __init__(
        self,
        corpus: Corpus,
        data: DocumentData,
        how: BucketPlan,
        *,
        log: MixtureLog,
        origin: Origin,
        rank: int = 0,
    ) -> None:
        self._plans = StepPlans(corpus, data, how)
        self._log = log
        self._origin = origin
        self._rank = rank

    def assignment(self, step: int) -> Assignment:
        """Return this rank's part of a step.

        Raises:
            CorpusError: If limits leave no documents.
        """
        plans = self._plans
        plans.learn(self._log.since(plans.version), step + 1)
        if not plans.can(step):
            plans.begin(self._origin(step), self._log.entries, step + 1)
        found = plans.planned(step).of(self._rank)
        plans.forget(step)
        return found


class RemoteBucketer:
    """The actor as one rank sees it; the next step is asked for while this one is worked on.

    Args of the constructor:
        handle: The actor.
        attempt: Names the worker group, the same on all its ranks.
        rank: This rank.
        log: The mixture log as far as this rank knows it; grows.
        until: Returns the step before which that log is final: the end of the rank's lease.
        origin: Where planning may begin, for an actor that knows nothing.
        patience_s: How long an answer may take.
    """

    def __init__(
        self,
        handle: Any,
        *,
        attempt: str,
        rank: int,
        log: MixtureLog,
        until: Callable[[], int],
        origin: Origin,
        patience_s: float = 600.0,
    ) -> None:
        self._handle = handle
        self._attempt = attempt
        self._rank = rank
        self._log = log
        self._until = until
        self._origin = origin
        self._patience_s = patience_s
        self._asked: tuple[int, Any] | None = None

    def assignment(self, step: int) -> Assignment:
        """Return this rank's part of a step, which the log must cover.

        Raises:
            TrainingError: If another attempt is being planned for, or the step has no weights yet.
            ClusterError: If the actor is gone or does not answer.
        """
        if step >= self._until():
            wrong = f"the weights of steps from {self._until()} on are not decided"
            raise TrainingError(problem("step", step, wrong))
        asked, self._asked = self._asked, None
        answer = asked[1] if asked is not None and asked[0] == step else self._ask(step)
        found = self._get(answer)
        if found is None:
            found = self._get(self._ask(step, everything=True))
        if found is None:
            wrong = "the state it was planned from lies behind it"
            raise TrainingError(problem("step", step, wrong))
        if step + 1 < self._until():
            self._asked = step + 1, self._ask(step + 1)
        return found

    def _ask(self, step: int, *, everything: bool = False) -> Any:
        entries: Sequence[MixtureEntry] = self._log.entries
        request = PlanRequest(
            attempt=self._attempt,
            rank=self._rank,
            step=step,
            until=self._until(),
            version=entries[-1].version if entries else -1,
            entries=tuple(entries) if everything else (),
            state=self._origin(step) if everything else None,
        )
        return self._handle.plan.remote(request)

    def _get(self, answer: Any) -> Assignment | None:
        found: Assignment | None = get(
            answer, timeout_s=self._patience_s, what="the planner of ranks"
        )
        return found


def start_bucketer(
    corpus: Corpus, data: DocumentData, how: BucketPlan, *, name: str | None = None
) -> Any:
    """Return the actor of a new planner of ranks on this node, owned by this process.

    Args:
        corpus: The corpus; this node must be able to read its path.
        data: The recipe's `data` section.
        how: How documents are dealt out.
        name: Name to find it by; none needed where the handle is passed on.
    """
    here = ray.get_runtime_context().get_node_id()
    return RemoteLengthBucketer.options(
        name=name,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=_CALLS_AT_ONCE,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
    ).remote(corpus.path, data, how)
