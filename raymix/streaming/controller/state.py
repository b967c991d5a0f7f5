"""Mixture state: the log, the leases and the mixer of a run, without Ray.

No clock and no waiting: `MixtureState` answers or returns None for "not yet", and its callers
wait. Two rules make the order of the data a pure function of the log:

* **Leases.** A rank may read step t only under a lease with `until` > t. A lease is granted only
  once the log has the shares of all its steps; so later changes start at a step that no rank has
  read, and all ranks switch at the same step without a broadcast.
* **Windows.** A mixer that needs statistics fixes the shares of window k + 1 when all ranks have
  pushed window k - 1. So shares follow from the statistics alone, not from timing.

A request (`set_weights`) waits until the leases reach its first step and enters the log then. It
holds until the mixer's next change: forever under a static mixer, up to the next boundary of a
schedule or the next window of an adaptive mixer. One with `hold` stays in force until the next
request or release; the mixer goes on learning, and its own shares stand in the log beside them.
Requests come by calls, or as files in the run directory (`request_files`).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from raymix.errors import RecipeError, TrainingError
from raymix.mixers import DomainStats, Mixer, MixerContext
from raymix.sampling import MixtureEntry, MixtureLog
from raymix.streaming.controller.decisions import Decision, Decisions
from raymix.streaming.controller.journal import Journal, plain
from raymix.streaming.controller.leases import Lease, Leases
from raymix.streaming.controller.request_files import ControlRequest
from raymix.streaming.controller.requests import (
    ShareRequests,
    logged_requests,
    requested_shares,
)
from raymix.streaming.controller.windows import Windows

NO_STEP_LIMIT = (1 << 63) - 1


class MixtureState:
    """The mixture log of a run, the mixer that extends it, and the leases of the ranks."""

    def __init__(
        self,
        mixer: Mixer,
        context: MixerContext,
        *,
        kind: str,
        interval: int,
        journal: Journal | None = None,
        snapshot: Mapping[str, Any] | None = None,
        session: str | None = None,
    ) -> None:
        """Start at step 0, at the snapshot's step, or at the state in this session's journal.

        Args:
            mixer: Decides the shares.
            context: The context that the mixer was built with.
            kind: The mixer's name in log entries.
            interval: Steps per window.
            journal: Files of log and state.
            snapshot: From `snapshot`, to resume a run.
            session: Id of this start of the run; a journal of the same session means that the
                controller itself was restarted under running workers.
        """
        self.incarnation = uuid.uuid4().hex[:12]
        self.context = context
        self.interval = interval
        self.log = MixtureLog(context.domains)
        self.windows = Windows(mixer, interval, context.domains) if mixer.needs else None
        self._mixer = mixer
        self._decisions = Decisions(
            mixer, self.windows, kind=kind, interval=interval, domains=context.domains
        )
        self._journal = journal
        self._session = session
        self._requests = ShareRequests()
        # The request file applied last: the only one that a kill can leave without its answer.
        self._applied: dict[str, Any] = {}
        self._refusal: RecipeError | None = None
        # The log is final below this step.
        self._decided_until = 0
        self._leases = Leases()
        saved = journal.read_state() if journal else None
        if journal and saved and session is not None and saved["session"] == session:
            self._restore(journal, saved)
        else:
            self._start(snapshot)

    # -- leases --------------------------------------------------------------------------------

    def register(self, attempt: str, world_size: int) -> str:
        """Serve the worker group `attempt` from now on, and return the incarnation.

        All ranks may call it; a new attempt ends the leases and unfinished windows of the old.

        Raises:
            TrainingError: If a later attempt has replaced it.
        """
        if self._leases.register(attempt, world_size):
            # The new group repeats the steps since its checkpoint, and pushes these windows again.
            if self.windows:
                self.windows.drop_unfinished()
            self._save()
        return self.incarnation

    def lease(
        self,
        attempt: str,
        rank: int,
        *,
        step: int,
        leased_until: int,
        n_steps: int,
        version: int,
        incarnation: str | None = None,
    ) -> Lease | None:
        """Return a lease up to `step` + `n_steps`, or to the last known shares; None: not yet.

        Args:
            attempt: The worker group.
            rank: The rank that requests it.
            step: The step it reads next.
            leased_until: Steps below this it may read already.
            n_steps: Steps it requests from `step` on.
            version: Its newest log entry, -1 for none.
            incarnation: The incarnation of the controller it knows; if that is not this one, the
                answer comes at once and grants nothing new, so that the rank can push its recent
                windows and request again.

        Raises:
            TrainingError: If the attempt is over, or has entries that the controller lost.
        """
        self._leases.check(attempt)
        last_version = self.log.entries[-1].version if self.log.entries else -1
        if version > last_version:
            raise TrainingError.at(
                "mixture_log.version",
                version,
                f"a worker has this entry, the restarted controller knows up to {last_version}",
                fix="A controller needs a run directory to survive its death",
            )
        leases = self._leases.leased_until
        # The larger of both: the rank knows more than a restarted controller, and less than one
        # whose answer was lost on the way.
        until = leases[rank] = max(leased_until, leases.get(rank, 0))
        self._answer_files()
        if incarnation in (None, self.incarnation):
            until = max(until, min(step + n_steps, self.known_until))
            if leased_until == until < step + n_steps:
                return None
            # The log first: a lease may only cover steps whose shares are final.
            self._extend_log(until)
            leases[rank] = until
        return Lease(until, tuple(self.log.since(version)), self.incarnation)

    @property
    def known_until(self) -> int:
        """Return the first step whose shares depend on statistics still missing."""
        return self.windows.known_until if self.windows else NO_STEP_LIMIT

    @property
    def first_free_step(self) -> int:
        """Return the first step that no reported rank may read yet."""
        # Either may be the larger: a new attempt starts without leases, and a restarted controller
        # with a saved `decided` from before the last leases, as those are not saved.
        return max(self._leases.first_unleased_step, self._decided_until)

    @property
    def _newest(self) -> MixtureEntry | None:
        return self.log.entries[-1] if self.log.entries else None

    @property
    def all_ranks_reported(self) -> bool:
        """Return whether each rank's lease is known."""
        return self._leases.all_ranks_reported

    # -- shares --------------------------------------------------------------------------------

    def push(self, attempt: str, window: int, rank: int, stats: DomainStats) -> bool:
        """Add a rank's statistics of a window; return whether they completed it.

        Late and repeated pushes, and those of an earlier attempt, are dropped.
        """
        if self.windows is None or attempt != self._leases.attempt:
            return False
        complete = self.windows.push(window, rank, stats, world_size=self._leases.world_size)
        if complete:
            self._save()
        self._answer_files()
        return complete

    def set_weights(
        self,
        weights: Mapping[str, float] | Sequence[float],
        first_step: int | None = None,
        *,
        hold: bool = False,
    ) -> int:
        """Request shares from `first_step` on and return that step.

        Without `first_step` it is the first step that no rank may read yet. Repeating a request
        changes nothing. With `hold` the mixer's next change does not end it. Needs
        `all_ranks_reported`.

        Raises:
            RecipeError: If they are not shares of the domains, or the step is taken.
        """
        step = self._request(weights, first_step, hold)
        # Before the answer: the caller may rely on a request that was acknowledged.
        self._save()
        return step

    def release(self, first_step: int | None = None) -> int:
        """Request the mixer's own shares from `first_step` on and return that step.

        A request for that very step is dropped, later ones stay. Needs `all_ranks_reported`.

        Raises:
            RecipeError: If no requested shares are in force there, or the step is taken.
        """
        step = self._release(first_step)
        self._save()
        return step

    def refuse_files(self, refusal: RecipeError) -> None:
        """Answer all requests in the run directory with this error from now on."""
        self._refusal = refusal

    def _request(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None, hold: bool
    ) -> int:
        shares = requested_shares(weights, self.context)
        # Ray repeats a call lost with the actor, after which the step would be another.
        repeated = self._requests.equal(
            shares, first_step, hold=hold, earliest=self.first_free_step, newest=self._newest
        )
        if repeated is not None:
            return repeated
        step = self._free_step(first_step)
        self._requests.add(step, shares, hold=hold)
        return step

    def _release(self, first_step: int | None) -> int:
        step = self._free_step(first_step)
        self._requests.release(step, self._newest)
        return step

    def _free_step(self, first_step: int | None) -> int:
        """Return `first_step`, or the first step that no rank may read yet."""
        earliest = self.first_free_step
        if first_step is not None and first_step < earliest:
            raise RecipeError.at(
                "first_step",
                first_step,
                f"workers may already have read it; the first free step is {earliest}",
            )
        return earliest if first_step is None else first_step

    def _answer_files(self) -> None:
        """Apply the requests in the run directory, once it is known what the ranks may read."""
        if self._journal and (self._refusal or self.all_ranks_reported):
            self._journal.requests.answer_all(self._apply)

    def _apply(self, name: str, request: ControlRequest) -> dict[str, Any]:
        """Apply the request in file `name` and return its answer."""
        if self._applied.get("name") == name:
            return dict(self._applied["answer"])
        if self._refusal:
            raise self._refusal
        request.check(self.first_free_step, self.context.total_steps)
        if request.weights is None:
            step = self._release(request.first_step)
        else:
            step = self._request(request.weights, request.first_step, request.hold)
        ends = request.weights is not None and not request.hold
        until = self._decisions.next_change(step) if ends else None
        within = until is not None and until < self.context.total_steps
        answer = {"first_step": step, "until": until if within else None}
        self._applied = {"name": name, "answer": answer}
        # In one write with the request: it must not be applied again after a kill.
        self._save()
        return answer

    def _extend_log(self, until: int) -> None:
        """Append all entries that start before step `until`."""
        # The first entry must start at step 0, whatever step a fresh log is extended from.
        first = self._decided_until if self.log.entries else 0
        if until <= first:
            return
        n_entries = len(self.log.entries)
        mixer_steps = self._decisions.mixer_steps(first, until)
        for step in sorted(mixer_steps | self._requests.steps(first, until)):
            decision = self._decisions.decide(
                step, self.log, self._requests, by_mixer=step in mixer_steps
            )
            if decision is not None:
                self._append(step, decision)
            self._requests.pending.pop(step, None)
        self._decided_until = until
        if self.windows:
            self.windows.drop_shares(-(-until // self.interval))
        # A lease that adds no entry, the usual case, costs no write.
        if len(self.log.entries) > n_entries:
            self._save()

    def _append(self, step: int, decision: Decision) -> None:
        version = self._newest.version + 1 if self._newest else 0
        self.log.append(MixtureEntry(version, step, *decision))
        if self._journal:
            self._journal.append(self.log.to_line(self.log.entries[-1]))

    # -- persistence ---------------------------------------------------------------------------

    def snapshot(self, step: int | None = None) -> dict[str, Any] | None:
        """Return, in JSON types, the state to resume a run at `step`; None: not yet.

        It is the present state: entries beyond `step` stay. But under an adaptive mixer the windows
        before that of `step` (the step read next) must be complete, as a run that resumes there
        will not push them again.
        """
        if self.windows and step is not None and self.windows.done < step // self.interval:
            return None
        return plain({"log": self.log.to_lines(), **self._state()})

    def _state(self) -> dict[str, Any]:
        # The keys are a file format: checkpoints and run directories have them.
        return {
            "decided": self._decided_until,
            **self._requests.state_dict(),
            "windows": self.windows.state_dict() if self.windows else None,
            "mixer": None if self.windows else self._mixer.state_dict(),
        }

    def status(self) -> dict[str, Any]:
        """Return attempt, leases, shares and windows in JSON types, for people."""
        newest = self._newest
        return {
            "attempt": self._leases.attempt,
            "world_size": self._leases.world_size,
            "leased_until": plain(self._leases.leased_until),
            "version": newest.version if newest else None,
            "weights": newest and dict(zip(self.context.domains, newest.weights, strict=True)),
            "asks": sorted(self._requests.pending),
            "windows_done": self.windows.done if self.windows else None,
        }

    def _start(self, snapshot: Mapping[str, Any] | None) -> None:
        if snapshot is not None:
            self._load(snapshot)
        if self._journal is None:
            return
        # Requests are the one thing that cannot be computed again: those that the run before had
        # accepted and that are still to come are taken over from its files.
        saved = self._journal.read_state()
        logged = logged_requests(self._journal.read_log(), self.context.domains)
        if saved is not None:
            self._applied = saved.get("applied", {})
            if tuple(saved["domains"]) != self.context.domains:
                saved = None
        self._requests.take_over(saved, logged, self._decided_until)
        self._journal.rewrite(self.log.to_lines())
        self._save()

    def _restore(self, journal: Journal, saved: Mapping[str, Any]) -> None:
        lines = journal.read_log()
        self._load({**saved, "log": lines})
        # A kill between the two writes leaves an entry in the log that the state does not have yet.
        # Ranks may have read it, so the log wins.
        for entry in self.log.entries:
            self._requests.pending.pop(entry.first_step, None)
            self._decided_until = max(self._decided_until, entry.first_step + 1)
        self._leases.load_state_dict(saved["leases"])
        self._applied = saved.get("applied", {})
        # Removes a torn last line, which the next append would continue.
        journal.rewrite(self.log.to_lines())

    def _load(self, state: Mapping[str, Any]) -> None:
        self.log = MixtureLog.from_lines(state["log"], self.context.domains)
        self._requests.load_state_dict(state)
        self._decided_until = int(state["decided"])
        if self.windows:
            self.windows.load_state_dict(state["windows"])
        else:
            self._mixer.load_state_dict(state["mixer"])

    def _save(self) -> None:
        if self._journal is None:
            return
        self._journal.save(
            {
                "session": self._session,
                "domains": self.context.domains,
                "leases": self._leases.state_dict(),
                "applied": self._applied,
                **self._state(),
            }
        )
