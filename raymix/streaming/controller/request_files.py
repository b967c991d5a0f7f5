"""Requests to a run as files, so that a command on the same files can change its shares.

A command writes `RUN/requests/ID.json`; the owner of the mixture, the only one that reads them,
claims a request by renaming it to `ID.taken`, applies it, writes `ID.answer` and removes its file.
The command reads the answer and removes it. A request that nobody has claimed can be withdrawn:
of a rename and a removal of one file only one succeeds.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raymix._utils.json import parse_json
from raymix.errors import RaymixError, RecipeError
from raymix.store import atomic_write_text

REQUESTS = "requests"
"""Name of the folder in a run directory."""

_MAX_NUMBER = 1e9
_NEW, _TAKEN, _ANSWER = ".json", ".taken", ".answer"


@dataclass(frozen=True, slots=True)
class ControlRequest:
    """A command's request to a run."""

    weights: dict[str, float] | None
    """Shares by domain; None for the mixer's own, which is a release."""
    first_step: int | None = None
    """The step they begin at; None for the first that no worker may read."""
    hold: bool = False
    """Whether they stay in force when the mixer changes its own."""

    @classmethod
    def parse(cls, raw: Any) -> ControlRequest:
        """Return the request in a file's JSON.

        Raises:
            RecipeError: If it is none.
        """
        if isinstance(raw, dict) and raw.keys() == {"weights", "first_step", "hold"}:
            weights, first_step, hold = raw["weights"], raw["first_step"], raw["hold"]
            # Not `isinstance` for numbers: True is an int to it. And an int that no float can hold
            # would end the sum of the shares, and the run with it.
            numbers = weights is None or (
                isinstance(weights, dict)
                and {type(v) for v in weights.values()} <= {int, float}
                and not any(abs(v) > _MAX_NUMBER for v in weights.values())
            )
            if numbers and (first_step is None or type(first_step) is int) and type(hold) is bool:
                return cls(weights, first_step, hold)
        raise RecipeError.at("request", raw, "not a request", fix="Use `raymix weights`")

    def check(self, first_free: int, steps: int) -> None:
        """Raise RecipeError if no step of the run is left for the request.

        Args:
            first_free: The first step that no worker may read yet.
            steps: Steps of the run.
        """
        if max(first_free, self.first_step or 0) >= steps:
            raise RecipeError.at(
                "first_step",
                self.first_step,
                f"the run ends with step {steps - 1}, and its workers may have read all steps "
                f"before {first_free}",
            )


class RequestFiles:
    """The owner's side of the requests in a run directory."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._folder = os.path.join(run_dir, REQUESTS)

    def answer_all(self, apply: Callable[[str, ControlRequest], Mapping[str, Any]]) -> None:
        """Apply the requests that are there, the oldest first, and write their answers.

        Args:
            apply: Takes the id of a request and the request, and returns the answer. It is called
                again for a request whose answer could not be written.
        """
        # Called at every lease: without the folder, the usual case, it costs one system call. A
        # look at the folder's time would save little, and miss changes within a tick of the clock.
        try:
            names = os.listdir(self._folder)
        except OSError:
            return
        for name in sorted(names):
            stem, kind = os.path.splitext(name)
            if kind in (_NEW, _TAKEN):
                # A disk that is full, or a folder of another user, must not end the training.
                with suppress(OSError, RaymixError):
                    self._answer(stem, apply)

    def _answer(self, stem: str, apply: Callable[[str, ControlRequest], Mapping[str, Any]]) -> None:
        path = Path(self._folder, stem)
        new, taken, answer = (path.with_name(stem + kind) for kind in (_NEW, _TAKEN, _ANSWER))
        with suppress(FileNotFoundError):
            os.rename(new, taken)
        if not answer.exists():
            try:
                request = ControlRequest.parse(parse_json(taken.read_bytes()))
                result = dict(apply(stem, request))
            except FileNotFoundError:
                return  # withdrawn
            except RaymixError as error:
                result = {"problems": list(error.problems)}
            except ValueError:
                # Torn: its writer died, so nobody waits for an answer.
                taken.unlink()
                return
            atomic_write_text(str(answer), json.dumps(result))
        taken.unlink()


class SentRequest:
    """The command's side of one request."""

    def __init__(self, run_dir: str | os.PathLike[str], request: ControlRequest) -> None:
        """Write the request's file."""
        folder = Path(run_dir, REQUESTS)
        folder.mkdir(exist_ok=True)
        # Names in order of time, so that of two requests of one user the later one wins.
        self._path = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
        atomic_write_text(str(self._path.with_suffix(_NEW)), json.dumps(asdict(request)))

    def answer(self) -> dict[str, Any] | None:
        """Return the answer and remove it, None while there is none."""
        path = self._path.with_suffix(_ANSWER)
        try:
            answer: dict[str, Any] = parse_json(path.read_bytes())
        except FileNotFoundError:
            return None
        path.unlink()
        return answer

    def withdraw(self) -> bool:
        """Remove the request; return False if the run has taken it already."""
        try:
            self._path.with_suffix(_NEW).unlink()
        except FileNotFoundError:
            return False
        return True
