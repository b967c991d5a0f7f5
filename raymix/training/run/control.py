"""Control of a run in work through the files of its directory: `raymix.connect`.

It needs no connection to Ray: the owner of the mixture (the controller's actor, or the controller
in the training process) looks for requests at every lease. So it works for every kind of run, on
any machine that sees the directory which that process writes to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import takewhile
from typing import Any

from raymix._utils.json import parse_json
from raymix.errors import CorpusError, RecipeError, TrainingError
from raymix.sampling import MixtureEntry, MixtureLog
from raymix.streaming.controller.journal import STATE
from raymix.streaming.controller.request_files import ControlRequest, SentRequest
from raymix.streaming.controller.requests import (
    REQUESTED,
    ShareRequests,
    held_at,
    parse_holds,
)
from raymix.training.run.rundir import RunDirectory

TIMEOUT_S = 60.0
_POLL_S = 0.05
# A request that was taken is applied at once: what is left is the write of the answer.
_TAKEN_S = 5.0


class RunControl:
    """A run as seen from its directory: its mixture, and requests to change it.

    Args of the constructor:
        run_dir: The directory of a run of `raymix train`, or of a `MixtureLoader`. A URL means the
            working directory of that run on this machine.
        timeout_s: Time limit of an answer, seconds.

    Raises:
        RecipeError: If it is no run directory, or the run at the URL is not on this machine.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, timeout_s: float = TIMEOUT_S) -> None:
        self._run = RunDirectory.at(os.fspath(run_dir))
        self._timeout_s = timeout_s
        # A loader writes no recipe.
        if not any((self._run.path / name).is_file() for name in (STATE, "resolved.yaml")):
            raise self._no_run()

    def weights(self) -> dict[str, Any]:
        """Return the mixture of the run, in JSON types.

        `shares` are those newest in the mixture log, the same since `first_step` by the decision
        of `by` (the mixer's kind, or `request`); `hold` says whether they stay when the mixer
        changes its own. `to_come` are the requests for later steps, each with `first_step`,
        `shares` (None for a release) and `hold`. `in_work` is None where that cannot be told.
        """
        saved, entries = self._saved(), self._entries()
        newest = entries[-1] if entries else None
        names = saved["domains"] if saved else []
        requests, holds = ShareRequests(), parse_holds(saved or {})
        if saved:
            requests.load_state_dict(saved)
        since = newest.first_step if newest else 0
        later = sorted(requests.steps(since + (newest is not None), 1 << 63))
        by = None if newest is None else newest.mixer
        # A hold has an entry for every window in which the mixer would have changed the shares.
        unchanged = takewhile(lambda entry: _origin(entry) == _origin(entries[-1]), entries[::-1])
        first_step = min((entry.first_step for entry in unchanged), default=None)
        return {
            "run": self._run.where,
            "in_work": self._in_work(),
            "shares": dict(zip(names, newest.weights, strict=True)) if newest else None,
            "first_step": first_step,
            "by": "request" if by == REQUESTED else by,
            "hold": held_at(holds, since) is not None,
            "to_come": [
                {
                    "first_step": step,
                    "shares": dict(zip(names, requests.pending[step], strict=True))
                    if step in requests.pending
                    else None,
                    "hold": requests.held_at(step) is not None,
                }
                for step in later
            ],
        }

    def set_weights(
        self, weights: Mapping[str, float], first_step: int | None = None, *, hold: bool = False
    ) -> dict[str, Any]:
        """Request shares and return the run's answer.

        Args:
            weights: Shares by domain; they sum to 1, and a domain left out gets 0.
            first_step: The step they begin at; left out, the first that no worker has read.
            hold: Keep them in force when the mixer changes its own, until `release` or the next
                request.

        Returns:
            `first_step`, and `until`: the step at which the mixer may change them again, None
            where it will not.

        Raises:
            RecipeError: If they are not shares of the run's domains, the step may have been read,
                or the run is not in work.
            TrainingError: If the run does not answer in time; the request is withdrawn then.
        """
        plain = {name: float(share) for name, share in weights.items()}
        return self._send(ControlRequest(plain, first_step, hold))

    def release(self, first_step: int | None = None) -> dict[str, Any]:
        """Request the mixer's own shares again and return the run's answer, as `set_weights` does.

        Raises:
            RecipeError: If no requested shares are in force, or the run is not in work.
            TrainingError: If the run does not answer in time; the request is withdrawn then.
        """
        return self._send(ControlRequest(None, first_step))

    def _send(self, request: ControlRequest) -> dict[str, Any]:
        if self._in_work() is False:
            raise self._not_in_work()
        sent = SentRequest(self._run.path, request)
        answer = None
        try:
            answer = self._wait(sent, self._timeout_s)
        finally:
            # Also after Ctrl-C: a request that nobody waits for must not change the run later.
            taken = answer is None and not sent.withdraw()
        if taken:
            answer = self._wait(sent, _TAKEN_S)
        if answer is None:
            if self._in_work() is False or self._finished():
                raise self._not_in_work()
            raise TrainingError.at(
                "timeout",
                self._timeout_s,
                "the run has not answered; "
                + ("it has taken the request" if taken else "the request is withdrawn"),
                fix="A run answers when a worker reads its next step: give a longer time limit, or "
                "see whether the run is in work",
            )
        if "problems" in answer:
            raise RecipeError(*answer["problems"])
        return answer

    def _wait(self, sent: SentRequest, timeout_s: float) -> dict[str, Any] | None:
        end = time.monotonic() + timeout_s
        while (answer := sent.answer()) is None and time.monotonic() < end:
            # A run that has ended meanwhile will not answer.
            if self._in_work() is False:
                return sent.answer()
            time.sleep(_POLL_S)
        return answer

    def _in_work(self) -> bool | None:
        """Return whether a process trains the run; None where that cannot be told."""
        # A loader has no lock.
        return self._run.in_use() if self._run.resolved.is_file() else None

    def _saved(self) -> dict[str, Any] | None:
        with suppress(FileNotFoundError):
            saved: dict[str, Any] = parse_json((self._run.path / STATE).read_bytes())
            return saved
        return None

    def _entries(self) -> list[MixtureEntry]:
        with suppress(FileNotFoundError, CorpusError):
            # The text after the last line end is being written.
            lines = self._run.mixture_log.read_text("utf-8").split("\n")[:-1]
            return list(MixtureLog.from_lines(lines).entries) if lines else []
        return []

    def _no_run(self) -> RecipeError:
        if self._run.url is not None:
            return RecipeError.at(
                "run",
                self._run.where,
                f"a run at a URL is controlled on the machine that trains it, in {self._run.path}; "
                "there is no such run on this machine",
                fix="Run the command where `raymix train` was started",
            )
        return RecipeError.at(
            "run",
            self._run.where,
            "not a run directory: it has neither resolved.yaml nor controller.json",
            fix="Name a directory of a run",
        )

    def _finished(self) -> bool:
        if not self._run.resolved.is_file():
            return False
        # Imported here: the statistics that reports load take longer than the rest of a command.
        from raymix.report.data.live import LiveRun

        live = LiveRun(self._run.path)
        live.poll()
        return live.finished

    def _not_in_work(self) -> RecipeError:
        return RecipeError.at(
            "run",
            self._run.where,
            "the run is finished" if self._finished() else "the run is not in work",
            fix="Shares can be requested while a run trains",
        )


def _origin(entry: MixtureEntry) -> tuple[tuple[float, ...], str]:
    return entry.weights, entry.mixer


def connect(run_dir: str | os.PathLike[str], *, timeout_s: float = TIMEOUT_S) -> RunControl:
    """Return the control of a run, to look at its mixture and to change it while it trains.

    Args:
        run_dir: Its directory; see `RunControl`.
        timeout_s: Time limit of an answer, seconds.

    Raises:
        RecipeError: If it is no run directory, or the run at the URL is not on this machine.
    """
    return RunControl(run_dir, timeout_s=timeout_s)
