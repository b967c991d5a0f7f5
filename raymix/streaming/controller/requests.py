"""Requests for shares: those still to come, those that hold, and how they are saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raymix.errors import CorpusError, RecipeError
from raymix.mixers import MixerContext, shares_by_name
from raymix.sampling import MixtureEntry, MixtureLog

REQUESTED = "asked"
"""`MixtureEntry.mixer` of entries that a user requested."""

SharesTuple = tuple[float, ...]


class ShareRequests:
    """The requests of a run: shares from a step on, with or without a hold, and releases.

    Shares that hold stay in force when the mixer changes its own. A hold ends at the next request
    or release, whichever begins first.

    Attributes:
        pending: Requested shares by first step; those in the log already are not among them.
    """

    def __init__(self) -> None:
        self.pending: dict[int, SharesTuple] = {}
        # Of the whole run, as a run that resumes from an earlier checkpoint decides them again:
        # shares by the step from which they hold, None where a hold ends.
        self._holds: dict[int, SharesTuple | None] = {}

    def add(self, step: int, shares: SharesTuple, *, hold: bool) -> None:
        """Request shares from `step` on, in place of what was requested for that step."""
        self.pending[step] = shares
        if hold:
            self._holds[step] = shares
            for later in self.pending:
                if later > step:
                    self._holds.setdefault(later, None)
        elif step in self._holds or self.held_at(step) is not None:
            self._holds[step] = None

    def release(self, step: int, newest: MixtureEntry | None) -> None:
        """Request the mixer's own shares from `step` on, given the newest entry of the log.

        Raises:
            RecipeError: If no requested shares can be in force there.
        """
        in_force = newest is not None and newest.mixer == REQUESTED
        if not in_force and not any(at <= step for at in self.pending):
            raise RecipeError.at(
                "release", step, "the shares are the mixer's own already, none were requested"
            )
        self.pending.pop(step, None)
        self._holds[step] = None

    def held_at(self, step: int) -> SharesTuple | None:
        """Return the shares that hold at `step` whatever the mixer decides, None without a hold."""
        return held_at(self._holds, step)

    def releases_at(self, step: int) -> bool:
        """Return whether the mixer's own shares were requested from `step` on."""
        return step not in self.pending and step in self._holds and self._holds[step] is None

    def steps(self, first: int, end: int) -> set[int]:
        """Return the steps in [first, end) at which a request or a release begins."""
        changes = {step for step in self._holds if self.releases_at(step)} | self.pending.keys()
        return {step for step in changes if first <= step < end}

    def equal(
        self,
        shares: SharesTuple,
        first_step: int | None,
        *,
        hold: bool,
        earliest: int,
        newest: MixtureEntry | None,
    ) -> int | None:
        """Return the step of an equal request that would still hold, None without one.

        Args:
            shares: The shares.
            first_step: Their first step; None for the first free one.
            hold: Whether they are to hold.
            earliest: The first free step.
            newest: The newest entry of the log.
        """
        known: dict[int, SharesTuple | None] = dict(self.pending)
        since = newest.first_step + 1 if newest else 0
        known |= {step: None for step in self._holds if step >= since and self.releases_at(step)}
        if newest is not None and newest.mixer == REQUESTED:
            known.setdefault(newest.first_step, newest.weights)
        if first_step is None:
            first_step = max((step for step in known if step <= earliest), default=-1)
        holds = self.held_at(first_step) is not None
        return first_step if known.get(first_step) == shares and holds == hold else None

    def take_over(
        self, saved: Mapping[str, Any] | None, logged: Mapping[int, SharesTuple], first: int
    ) -> None:
        """Add what an earlier start of the run had accepted from step `first` on.

        Args:
            saved: Its `state_dict`, if there is one for the same domains.
            logged: The requests in its log; see `logged_requests`.
            first: The step at which this start begins to decide.
        """
        earlier = ShareRequests()
        if saved is not None:
            earlier.load_state_dict(saved)
        self._holds |= {step: held for step, held in earlier._holds.items() if step >= first}
        taken = earlier.pending | {
            step: shares
            for step, shares in logged.items()
            # A renewal follows from its hold; taken for a request, it would outlive it.
            if step in self._holds or self.held_at(step) is None
        }
        # Released after the checkpoint that still has them.
        for step in [
            s for s in self.pending if s not in taken and earlier._holds.get(s, ()) is None
        ]:
            del self.pending[step]
        self.pending |= {step: shares for step, shares in taken.items() if step >= first}

    def state_dict(self) -> dict[str, Any]:
        """Return the requests to come and the holds; the keys are a file format."""
        return {"asks": self.pending, "holds": self._holds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; those of versions without holds lack that key."""
        self.pending = parse_requests(state["asks"])
        self._holds = parse_holds(state)


def requested_shares(
    weights: Mapping[str, float] | Sequence[float], context: MixerContext
) -> SharesTuple:
    """Return the shares in a request, by domain or in their order.

    Raises:
        RecipeError: If they are not shares of the domains.
    """
    names = context.domains
    if not isinstance(weights, Mapping):
        if len(weights) != len(names):
            raise RecipeError.at(
                "weights", list(weights), f"not one weight per domain; there are {len(names)}"
            )
        weights = dict(zip(names, map(float, weights), strict=True))
    unreadable = [name for name in context.empty if weights.get(name, 0) > 0]
    if unreadable:
        raise RecipeError.at(
            f"weights.{unreadable[0]}",
            weights[unreadable[0]],
            "the domain has no samples: no whole row, or no document",
            fix="Its share must be 0",
        )
    return tuple(shares_by_name(weights, context, path="weights").tolist())


def parse_requests(raw: Mapping[Any, Iterable[float]]) -> dict[int, SharesTuple]:
    """Return saved requests: shares by first step."""
    # JSON turns the keys of a mapping into strings.
    return {int(step): tuple(map(float, shares)) for step, shares in raw.items()}


def parse_holds(state: Mapping[str, Any]) -> dict[int, SharesTuple | None]:
    """Return the saved holds: shares by the step from which they hold, None for its end."""
    return {
        int(step): None if shares is None else tuple(map(float, shares))
        for step, shares in state.get("holds", {}).items()
    }


def held_at(holds: Mapping[int, SharesTuple | None], step: int) -> SharesTuple | None:
    """Return the shares that hold at `step`, None without a hold."""
    newest = max((first for first in holds if first <= step), default=None)
    return None if newest is None else holds[newest]


def logged_requests(lines: Sequence[str], domains: tuple[str, ...]) -> dict[int, SharesTuple]:
    """Return the requests in a log; none if it is of other domains."""
    try:
        entries = MixtureLog.from_lines(lines, domains).entries
    except CorpusError:
        return {}
    return {entry.first_step: entry.weights for entry in entries if entry.mixer == REQUESTED}
