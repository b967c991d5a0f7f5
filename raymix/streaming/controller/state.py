"""What the controller decides: when which weights hold, and who may read how far.

No clock, no waiting, no Ray: `MixtureState` answers or says "not yet" (None), and its shells
wait. Two rules make the order of the data a pure function of the log:

* **Leases.** A rank may read step t only under a lease with `until` > t. A lease is granted only
  once the weights of all its steps stand in the log; so whatever comes later starts at a step
  that nobody has read, and all ranks switch at the same step without a broadcast.
* **Windows.** A mixer that needs statistics fixes the weights of window k + 1 when every rank has
  pushed window k - 1, one window ahead. So they follow from the statistics alone, not from timing.

An ask (`set_weights`) waits until the leases reach its first step and enters the log then. It
holds until the mixer next changes its mind: for ever under a static mixer, up to the next piece
of a schedule or the next window of an adaptive mixer.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raymix.errors import CorpusError, RecipeError, TrainingError
from raymix.mixers import (
    DomainStats,
    Mixer,
    MixerContext,
    PlannedMixer,
    Shares,
    shares_by_name,
)
from raymix.sampling import MixtureEntry, MixtureLog
from raymix.streaming.controller.journal import Journal, plain
from raymix.streaming.controller.leases import Lease, Leases
from raymix.streaming.controller.windows import LOSS_WEIGHTS, NOTE, Windows, by_domain

ASKED = "asked"
FOR_EVER = (1 << 63) - 1


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
        """Start at the snapshot's step, or 0; or where this session's journal says it was.

        Args:
            mixer: Decides the weights.
            context: What the mixer was built with.
            kind: The mixer's name in log entries.
            interval: Steps per window.
            journal: Keeps log and state on disk.
            snapshot: From `snapshot`, to continue a run.
            session: Names this start of the run; a journal of the same session means that the
                controller itself was restarted under running workers.
        """
        self.life = uuid.uuid4().hex[:12]
        self.context = context
        self.kind = kind
        self.interval = interval
        self.log = MixtureLog(context.domains)
        self.windows = Windows(mixer, interval, context.domains) if mixer.needs else None
        self._mixer = mixer
        self._journal = journal
        self._session = session
        self._asks: dict[int, tuple[float, ...]] = {}
        self._decided = 0
        self._leases = Leases()
        kept = journal.read_state() if journal else None
        if journal and kept and session is not None and kept["session"] == session:
            self._revive(journal, kept)
        else:
            self._begin(snapshot)

    # -- who reads how far -------------------------------------------------------------------

    def register(self, attempt: str, world_size: int) -> str:
        """Serve the worker group `attempt` from now on, and return the life of the controller.

        Every rank may call it; a new attempt ends the leases and unfinished windows of the old.

        Raises:
            TrainingError: If a later attempt has taken its place.
        """
        if self._leases.begin(attempt, world_size):
            if self.windows:
                self.windows.forget_unfinished()
            self._save()
        return self.life

    def lease(
        self,
        attempt: str,
        rank: int,
        *,
        step: int,
        held_until: int,
        want: int,
        version: int,
        life: str | None = None,
    ) -> Lease | None:
        """Return a lease up to `step` + `want`, or as far as weights are known; None: not yet.

        Args:
            attempt: The worker group.
            rank: The asker.
            step: The step it reads next.
            held_until: What it may read already.
            want: Steps it would like to hold from `step` on.
            version: Newest log entry it has, -1 for none.
            life: The life of the controller it last heard of; if that is not this one, the
                answer comes at once and grants nothing new, so that the rank can push its recent
                windows again and ask again.

        Raises:
            TrainingError: If the attempt is over, or knows entries that the controller lost.
        """
        self._leases.check(attempt)
        last = self.log.entries[-1].version if self.log.entries else -1
        if version > last:
            raise TrainingError.at(
                "mixture_log.version",
                version,
                f"a worker has this entry, the restarted controller knows up to {last}",
                fix="A controller needs a run directory to survive its death",
            )
        held = self._leases.held
        until = held[rank] = max(held_until, held.get(rank, 0))
        if life in (None, self.life):
            until = max(until, min(step + want, self.known_until))
            if held_until == until < step + want:
                return None
            self._decide(until)
            held[rank] = until
        return Lease(until, tuple(self.log.since(version)), self.life)

    @property
    def known_until(self) -> int:
        """Return the step from which on weights depend on statistics not yet in."""
        return self.windows.known_until if self.windows else FOR_EVER

    @property
    def gathered(self) -> bool:
        """Return whether it is known how far every rank may read."""
        return self._leases.gathered

    # -- what weights hold -------------------------------------------------------------------

    def push(self, attempt: str, window: int, rank: int, stats: DomainStats) -> bool:
        """Take a rank's statistics of a window; return whether the window is complete by that.

        What comes late, twice or from an earlier attempt is dropped.
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
        """Ask for weights from `first_step` on and return that step.

        Left out, it is the first step that nobody may read yet. Asking again for what already
        holds there changes nothing, so a call may be repeated. Needs `gathered`.

        Raises:
            RecipeError: If the weights are no shares of the domains, or the step is taken.
        """
        names = self.context.domains
        if not isinstance(weights, Mapping):
            if len(weights) != len(names):
                raise RecipeError.at(
                    "weights", list(weights), f"not one weight per domain; there are {len(names)}"
                )
            weights = dict(zip(names, map(float, weights), strict=True))
        shares = tuple(shares_by_name(weights, self.context, path="weights").tolist())
        earliest = max(self._leases.horizon, self._decided)
        if (repeated := self._asked_before(shares, first_step, earliest)) is not None:
            return repeated
        if first_step is not None and first_step < earliest:
            raise RecipeError.at(
                "first_step",
                first_step,
                f"workers may already have read it; the first free step is {earliest}",
            )
        step = earliest if first_step is None else first_step
        self._asks[step] = shares
        self._save()
        return step

    def _asked_before(
        self, shares: tuple[float, ...], first_step: int | None, earliest: int
    ) -> int | None:
        """Return the step of an equal ask that would still hold, if there is one."""
        asked = dict(self._asks)
        newest = self.log.entries[-1] if self.log.entries else None
        if newest is not None and newest.mixer == ASKED:
            asked.setdefault(newest.first_step, newest.weights)
        if first_step is None:
            first_step = max((step for step in asked if step <= earliest), default=-1)
        return first_step if asked.get(first_step) == shares else None

    def _decide(self, until: int) -> None:
        """Put into the log whatever starts before step `until`."""
        first = self._decided if self.log.entries else 0
        if until <= first:
            return
        before = len(self.log.entries)
        own = self._own_points(first, until)
        for step in sorted(own | {ask for ask in self._asks if first <= ask < until}):
            self._decide_at(step, own=step in own)
        self._decided = until
        if self.windows:
            self.windows.forget_weights(-(-until // self.interval))
        if len(self.log.entries) > before:
            self._save()

    def _own_points(self, first: int, end: int) -> set[int]:
        """Return the steps at which the mixer may change its mind."""
        points = set(range(-(-first // self.interval) * self.interval, end, self.interval))
        if isinstance(self._mixer, PlannedMixer):
            points.update(step for step in self._mixer.boundaries if first <= step < end)
        return points

    def _decide_at(self, step: int, *, own: bool) -> None:
        """Append the entry that starts at `step`, if the weights change there."""
        newest: tuple[float, ...] | None = None
        stats: dict[str, Any] | None = None
        if own:
            shares, stats = self._mixer_shares(step)
            newest = tuple(shares.tolist())
        # Why nothing changed is to be read in the log, too.
        noted = bool(stats and NOTE in stats)
        changed = newest is not None and (noted or (newest, _factors(stats)) != self._issued())
        if step in self._asks:
            # What the mixer said is kept, so that saying it again later is no change.
            kept = {"mixer": newest, **_kept(stats)} if changed else None
            self._append(step, self._asks.pop(step), ASKED, kept)
        elif newest is not None and changed:
            self._append(step, newest, self.kind, stats)

    def _append(
        self, step: int, weights: tuple[float, ...], mixer: str, stats: dict[str, Any] | None
    ) -> None:
        version = self.log.entries[-1].version + 1 if self.log.entries else 0
        self.log.append(MixtureEntry(version, step, weights, mixer, stats))
        if self._journal:
            self._journal.append(self.log.to_line(self.log.entries[-1]))

    def _issued(self) -> tuple[tuple[float, ...], dict[str, float] | None] | None:
        """Return the shares and loss factors the mixer last decided on."""
        for entry in reversed(self.log.entries):
            if entry.mixer != ASKED:
                return entry.weights, _factors(entry.stats)
            if entry.stats:
                return tuple(entry.stats["mixer"]), _factors(entry.stats)
        return None

    def _mixer_shares(self, step: int) -> tuple[Shares, dict[str, Any] | None]:
        """Return the mixer's shares at `step`, and what the log is to say of them."""
        if self.windows:
            return self.windows.weights(step // self.interval)
        assert isinstance(self._mixer, PlannedMixer)
        planned = getattr(self._mixer, "planned_loss_weights", None)
        factors_D = planned(step) if planned else None
        stats = None if factors_D is None else by_domain(self.context.domains, factors_D)
        return self._mixer.planned(step), stats

    # -- what survives -----------------------------------------------------------------------

    def snapshot(self, step: int | None = None) -> dict[str, Any] | None:
        """Return, in JSON types, what a run needs to continue at `step`; None: not yet.

        It is the present state: what has been decided beyond `step` stays decided. But under an
        adaptive mixer the windows before the one that `step` (the step read next) lies in must
        be complete, as a run that continues there will not push them again.
        """
        if self.windows and step is not None and self.windows.done < step // self.interval:
            return None
        return plain({"log": self.log.to_lines(), **self._state()})

    def _state(self) -> dict[str, Any]:
        return {
            "decided": self._decided,
            "asks": self._asks,
            "windows": self.windows.state_dict() if self.windows else None,
            "mixer": None if self.windows else self._mixer.state_dict(),
        }

    def status(self) -> dict[str, Any]:
        """Return where things stand, in JSON types, for people."""
        newest = self.log.entries[-1] if self.log.entries else None
        return {
            "attempt": self._leases.attempt,
            "world_size": self._leases.world_size,
            "leased_until": plain(self._leases.held),
            "version": newest.version if newest else None,
            "weights": newest and dict(zip(self.context.domains, newest.weights, strict=True)),
            "asks": sorted(self._asks),
            "windows_done": self.windows.done if self.windows else None,
        }

    def _begin(self, snapshot: Mapping[str, Any] | None) -> None:
        if snapshot is not None:
            self._load(snapshot)
        if self._journal is None:
            return
        # Asks are the one thing that cannot be computed again: those still to come are kept.
        kept = self._journal.read_state()
        asked = _asked(self._journal.read_log(), self.context.domains)
        if kept is not None and tuple(kept["domains"]) == self.context.domains:
            asked |= _asks(kept["asks"])
        self._asks |= {step: shares for step, shares in asked.items() if step >= self._decided}
        self._journal.rewrite(self.log.to_lines())
        self._save()

    def _revive(self, journal: Journal, kept: Mapping[str, Any]) -> None:
        lines = journal.read_log()
        self._load({**kept, "log": lines})
        # An entry may have reached the log and not the state: it was decided all the same.
        for entry in self.log.entries:
            self._asks.pop(entry.first_step, None)
            self._decided = max(self._decided, entry.first_step + 1)
        self._leases.load(kept["leases"])
        journal.rewrite(self.log.to_lines())

    def _load(self, state: Mapping[str, Any]) -> None:
        self.log = MixtureLog.from_lines(state["log"], self.context.domains)
        self._asks = _asks(state["asks"])
        self._decided = int(state["decided"])
        if self.windows:
            self.windows.load(state["windows"])
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


def _factors(stats: Mapping[str, Any] | None) -> dict[str, float] | None:
    return stats.get(LOSS_WEIGHTS) if stats else None


def _kept(stats: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what of `stats` outlives an ask in the place of the mixer's shares."""
    return {key: stats[key] for key in (LOSS_WEIGHTS, NOTE) if stats and key in stats}


def _asks(raw: Mapping[Any, Iterable[float]]) -> dict[int, tuple[float, ...]]:
    return {int(step): tuple(map(float, shares)) for step, shares in raw.items()}


def _asked(lines: Sequence[str], domains: tuple[str, ...]) -> dict[int, tuple[float, ...]]:
    """Return the asks in a log; none if it is of other domains."""
    try:
        entries = MixtureLog.from_lines(lines, domains).entries
    except CorpusError:
        return {}
    return {entry.first_step: entry.weights for entry in entries if entry.mixer == ASKED}
