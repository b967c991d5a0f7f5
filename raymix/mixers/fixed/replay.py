"""Replays the shares of an earlier run from its mixture log.

Axes: D domains, P entries.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raymix._utils.json import parse_json
from raymix.errors import RecipeError, format_problem
from raymix.mixers.base import Mixer, MixerContext, Shares, mixer
from raymix.mixers.by_name import shares_by_name, some
from raymix.mixers.fixed.planned import Planned
from raymix.recipe.mixer import ReplayMixer


class Replay(Planned):
    """The entries of a mixture log, bit by bit, from the steps at which they took effect."""

    def __init__(
        self,
        summary: str,
        shares_PD: Sequence[Shares],
        *,
        boundaries: Sequence[int],
        loss_weights_PD: Sequence[Shares | None],
    ) -> None:
        super().__init__(summary, shares_PD, boundaries=boundaries)
        self._loss_weights_PD = tuple(loss_weights_PD)

    def planned_loss_weights(self, step: int) -> Shares | None:
        """Return the loss weights of the domains at `step`, shape (D,); None is 1 for all."""
        return self._loss_weights_PD[max(0, bisect_right(self.boundaries, step) - 1)]


@mixer("replay")
def _replay(config: ReplayMixer, context: MixerContext) -> Mixer:
    entries = _read_log(config.log)
    shares_PD = [
        _shares(entry["shares"], context, path=f"{config.log}: entry {at}")
        for at, entry in enumerate(entries)
    ]
    return Replay(
        f"replay: {len(entries)} entries of {config.log}",
        shares_PD,
        boundaries=[entry["first_step"] for entry in entries],
        loss_weights_PD=[_loss_weights(entry, context) for entry in entries],
    )


def _shares(shares: dict[str, float], context: MixerContext, *, path: str) -> Shares:
    """Return an entry's shares as they stand in the log, shape (D,)."""
    shares_by_name(shares, context, path=path)
    # Checked but not scaled: a division by a sum of 1 - 1e-16 would change the last bit, and with
    # it the rows that a step reads.
    absent = [name for name in context.domains if name not in shares]
    if absent:
        raise RecipeError.at(
            path,
            list(shares)[:8],
            f"the log has no shares for {some(absent)}",
            fix="Replay on the corpus that the log was made with",
        )
    return np.array([shares[name] for name in context.domains])


def _loss_weights(entry: dict[str, Any], context: MixerContext) -> Shares | None:
    """Return an entry's `stats.loss_weights`, a mapping of names to factors, if it has some."""
    weights = (entry.get("stats") or {}).get("loss_weights")
    return None if weights is None else np.array([weights[name] for name in context.domains])


def _read_log(path: str) -> list[dict[str, Any]]:
    """Return the entries; a torn last line is left out."""
    try:
        lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        advice = "Give the mixture_log.jsonl of an earlier run"
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise RecipeError.at(
            "mixer.log", path, f"cannot be read ({reason or error})", fix=advice
        ) from error
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            raw = parse_json(line)
        except ValueError as error:
            # A run that was killed in the middle of a write leaves half a line.
            if number == len(lines):
                break
            raise RecipeError(_bad_line(path, number)) from error
        if not (isinstance(raw, dict) and {"first_step", "shares"} <= raw.keys()):
            raise RecipeError(_bad_line(path, number))
        entries.append(raw)
    starts = [entry["first_step"] for entry in entries]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise RecipeError.at(
            "mixer.log", path, "no entries that start at step 0 and follow each other"
        )
    return entries


def _bad_line(path: str, number: int) -> str:
    return format_problem("mixer.log", path, f"line {number} is not an entry of a mixture log")
