"""What the controller keeps on disk, so that a killed one comes back as it was.

Two files in the run directory: `mixture_log.jsonl`, one line appended per entry, and
`controller.json`, replaced whole: asks that have not come up yet, the mixer's state, and who is
being served. A line torn by a kill is left out when read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raymix._utils.json import parse_json

LOG = "mixture_log.jsonl"
STATE = "controller.json"


def plain(value: Any) -> Any:
    """Return `value` in JSON types: arrays as lists, numpy numbers as numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in value]
    return value


class Journal:
    """The controller's files in a run directory (a local one: that of the head node)."""

    def __init__(self, run_dir: str) -> None:
        self._log = Path(run_dir) / LOG
        self._state = Path(run_dir) / STATE
        self._log.parent.mkdir(parents=True, exist_ok=True)

    def read_log(self) -> list[str]:
        """Return the whole lines of the log; none if there is no log."""
        if not self._log.exists():
            return []
        text = self._log.read_text("utf-8")
        # What follows the last line end was being written when the writer died.
        return text.split("\n")[:-1]

    def read_state(self) -> dict[str, Any] | None:
        """Return what `save` was last given, None if nothing."""
        if not self._state.exists():
            return None
        state: dict[str, Any] = parse_json(self._state.read_text("utf-8"))
        return state

    def append(self, line: str) -> None:
        """Add one line to the log; it outlives this process once the call returns."""
        with self._log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def rewrite(self, lines: Iterable[str]) -> None:
        """Put `lines` in the place of the log."""
        _replace(self._log, "".join(line + "\n" for line in lines))

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep `state` in the place of the one before."""
        _replace(self._state, json.dumps(plain(state)))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
