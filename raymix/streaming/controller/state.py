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
schedule or the next window of an adaptive mixer.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from raymix.errors import RecipeError, TrainingError
from raymix.mixers import DomainStats, Mixer, MixerContext, PlannedMixer, Shares, shares_by_name
from raymix.sampling import MixtureEntry, MixtureLog
from raymix.streaming.controller.journal import Journal, plain
from raymix.streaming.controller.leases import Lease, Leases
from raymix.streaming.controller.requests import (
    REQUESTED,
    SharesTuple,
    logged_requests,
    parse_requests,
)
from raymix.streaming.controller.windows import LOSS_WEIGHTS, NOTE, Windows, loss_weight_stats

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
        self.kind = kind
        self.interval = interval
        self.log = MixtureLog(context.domains)
        self.windows = Windows(mixer, interval, context.domains) if mixer.needs else None
        self._mixer = mixer
        self._journal = journal
        self._session = session
        # Requested shares by first step; those in the log already are not among them.
        self._requests: dict[int, SharesTuple] = {}
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
        return complete

    def set_weights(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None = None
    ) -> int:
        """Request shares from `first_step` on and return that step.

        Without `first_step` it is the first step that no rank may read yet. Repeating a request
        changes nothing. Needs `all_ranks_reported`.

        Raises:
            RecipeError: If they are not shares of the domains, or the step is taken.
        """
        names = self.context.domains
        if not isinstance(weights, Mapping):
            if len(weights) != len(names):
                raise RecipeError.at(
                    "weights", list(weights), f"not one weight per domain; there are {len(names)}"
                )
            weights = dict(zip(names, map(float, weights), strict=True))
        shares = tuple(shares_by_name(weights, self.context, path="weights").tolist())
        earliest = self.first_free_step
        # Ray repeats a call that was lost with the actor, after which the step would be another.
        if (repeated := self._equal_request(shares, first_step, earliest)) is not None:
            return repeated
        if first_step is not None and first_step < earliest:
            raise RecipeError.at(
                "first_step",
                first_step,
                f"workers may already have read it; the first free step is {earliest}",
            )
        step = earliest if first_step is None else first_step
        self._requests[step] = shares
        # Before the answer: the caller may rely on a request that was acknowledged.
        self._save()
        return step

    def _equal_request(
        self, shares: SharesTuple, first_step: int | None, earliest: int
    ) -> int | None:
        """Return the step of an equal request that would still hold, None without one."""
        requests = dict(self._requests)
        newest = self.log.entries[-1] if self.log.entries else None
        if newest is not None and newest.mixer == REQUESTED:
            requests.setdefault(newest.first_step, newest.weights)
        if first_step is None:
            first_step = max((step for step in requests if step <= earliest), default=-1)
        return first_step if requests.get(first_step) == shares else None

    def _extend_log(self, until: int) -> None:
        """Append all entries that start before step `until`."""
        # The first entry must start at step 0, whatever step a fresh log is extended from.
        first = self._decided_until if self.log.entries else 0
        if until <= first:
            return
        n_entries = len(self.log.entries)
        mixer_steps = self._mixer_steps(first, until)
        request_steps = {step for step in self._requests if first <= step < until}
        for step in sorted(mixer_steps | request_steps):
            self._decide_step(step, by_mixer=step in mixer_steps)
        self._decided_until = until
        if self.windows:
            self.windows.drop_shares(-(-until // self.interval))
        # A lease that adds no entry, the usual case, costs no write.
        if len(self.log.entries) > n_entries:
            self._save()

    def _mixer_steps(self, first: int, end: int) -> set[int]:
        """Return the steps in [first, end) at which the mixer may change the shares."""
        steps = set(range(-(-first // self.interval) * self.interval, end, self.interval))
        if isinstance(self._mixer, PlannedMixer):
            steps.update(step for step in self._mixer.boundaries if first <= step < end)
        return steps

    def _decide_step(self, step: int, *, by_mixer: bool) -> None:
        """Append the entry that starts at `step`, if the shares change there."""
        shares: SharesTuple | None = None
        stats: dict[str, Any] | None = None
        if by_mixer:
            shares_D, stats = self._mixer_shares(step)
            shares = tuple(shares_D.tolist())
        # A note makes an entry even with equal shares: it says why nothing changed.
        noted = bool(stats and NOTE in stats)
        decision = (shares, _loss_factors(stats))
        changed = shares is not None and (noted or decision != self._last_mixer_decision())
        if step in self._requests:
            # The mixer's own shares are logged with the request, so that the same shares in the
            # next window are no change and do not end the request.
            stats = {"mixer": shares, **_request_stats(stats)} if changed else None
            self._append(step, self._requests.pop(step), REQUESTED, stats)
        elif shares is not None and changed:
            self._append(step, shares, self.kind, stats)

    def _append(
        self, step: int, shares: SharesTuple, mixer: str, stats: dict[str, Any] | None
    ) -> None:
        version = self.log.entries[-1].version + 1 if self.log.entries else 0
        self.log.append(MixtureEntry(version, step, shares, mixer, stats))
        if self._journal:
            self._journal.append(self.log.to_line(self.log.entries[-1]))

    def _last_mixer_decision(self) -> tuple[SharesTuple, dict[str, float] | None] | None:
        """Return the shares and loss factors the mixer last decided on."""
        for entry in reversed(self.log.entries):
            if entry.mixer != REQUESTED:
                return entry.weights, _loss_factors(entry.stats)
            if entry.stats:
                return tuple(entry.stats["mixer"]), _loss_factors(entry.stats)
        return None

    def _mixer_shares(self, step: int) -> tuple[Shares, dict[str, Any] | None]:
        """Return the mixer's shares at `step` and the `stats` of their log entry."""
        if self.windows:
            return self.windows.shares(step // self.interval)
        assert isinstance(self._mixer, PlannedMixer)
        planned = getattr(self._mixer, "planned_loss_weights", None)
        factors_D = planned(step) if planned else None
        stats = None if factors_D is None else loss_weight_stats(self.context.domains, factors_D)
        return self._mixer.planned(step), stats

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
            "asks": self._requests,
            "windows": self.windows.state_dict() if self.windows else None,
            "mixer": None if self.windows else self._mixer.state_dict(),
        }

    def status(self) -> dict[str, Any]:
        """Return attempt, leases, shares and windows in JSON types, for people."""
        newest = self.log.entries[-1] if self.log.entries else None
        return {
            "attempt": self._leases.attempt,
            "world_size": self._leases.world_size,
            "leased_until": plain(self._leases.leased_until),
            "version": newest.version if newest else None,
            "weights": newest and dict(zip(self.context.domains, newest.weights, strict=True)),
            "asks": sorted(self._requests),
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
        requests = logged_requests(self._journal.read_log(), self.context.domains)
        if saved is not None and tuple(saved["domains"]) == self.context.domains:
            requests |= parse_requests(saved["asks"])
        self._requests |= {
            step: shares for step, shares in requests.items() if step >= self._decided_until
        }
        self._journal.rewrite(self.log.to_lines())
        self._save()

    def _restore(self, journal: Journal, saved: Mapping[str, Any]) -> None:
        lines = journal.read_log()
        self._load({**saved, "log": lines})
        # A kill between the two writes leaves an entry in the log that the state does not have yet.
        # Ranks may have read it, so the log wins.
        for entry in self.log.entries:
            self._requests.pop(entry.first_step, None)
            self._decided_until = max(self._decided_until, entry.first_step + 1)
        self._leases.load_state_dict(saved["leases"])
        # Removes a torn last line, which the next append would continue.
        journal.rewrite(self.log.to_lines())

    def _load(self, state: Mapping[str, Any]) -> None:
        self.log = MixtureLog.from_lines(state["log"], self.context.domains)
        self._requests = parse_requests(state["asks"])
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
                **self._state(),
            }
        )


def _loss_factors(stats: Mapping[str, Any] | None) -> dict[str, float] | None:
    return stats.get(LOSS_WEIGHTS) if stats else None


def _request_stats(stats: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of a mixer's `stats` that holds although a request replaces its shares."""
    return {key: stats[key] for key in (LOSS_WEIGHTS, NOTE) if stats and key in stats}
