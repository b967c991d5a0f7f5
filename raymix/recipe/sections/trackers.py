"""Names of experiment trackers in `run.trackers`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from raymix.errors import did_you_mean
from raymix.recipe.rules import Fault

TRACKERS = ("wandb", "mlflow", "trackio")
"""Trackers by name; others are `module:Class`."""

_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def tracker_faults(
    trackers: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> list[Fault]:
    """Return a fault for each unknown or repeated tracker, and for options of none."""
    faults = list[Fault]()
    for number, name in enumerate(trackers):
        path = f"trackers.{number}"
        if name in trackers[:number]:
            faults.append(Fault(path, name, "it is there twice", ("Name it once",)))
        elif name not in TRACKERS and not _CLASS.fullmatch(name):
            allowed = f"Allowed: {', '.join(TRACKERS)}, or module:Class"
            wrong = "not the name of a tracker"
            faults.append(Fault(path, name, wrong, (did_you_mean(name, TRACKERS), allowed)))
    for name, values in options.items():
        if name not in trackers:
            path = f"tracker_options.{name}"
            faults.append(Fault(path, values, "no such tracker in run.trackers", ("Add it there",)))
    return faults
