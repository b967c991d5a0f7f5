"""The controller's files, from which a killed controller restores its state.

Two files in the run directory: `mixture_log.jsonl`, one line appended per entry, and
`controller.json`, replaced as a whole: requests that have not come up yet, the mixer's state, and
the attempt being served. A line torn by a kill is left out when read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raymix._utils.json import parse_json
from raymix.streaming.controller.request_files import RequestFiles

LOG = "mixture_log.jsonl"
STATE = "controller.json"


def plain(value: Any) -> Any:
    """Return `value` in JSON types: arrays as lists, numpy numbers as numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    # A string is a sequence of strings: without the exclusion this would never end.
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in value]
    return value


class Journal:
    """The controller's files in a run directory (a local one: that of the head node).

    Attributes:
        requests: The requests that commands left there.
    """

    def __init__(self, run_dir: str) -> None:
        self._log = Path(run_dir) / LOG
        self._state = Path(run_dir) / STATE
        self.requests = RequestFiles(run_dir)
        self._log.parent.mkdir(parents=True, exist_ok=True)

    def read_log(self) -> list[str]:
        """Return the complete lines of the log; none if there is no log."""
        if not self._log.exists():
            return []
        text = self._log.read_text("utf-8")
        # The text after the last line end was being written when the writer died.
        return text.split("\n")[:-1]

    def read_state(self) -> dict[str, Any] | None:
        """Return the state last saved, None without one."""
        if not self._state.exists():
            return None
        state: dict[str, Any] = parse_json(self._state.read_text("utf-8"))
        return state

    def append(self, line: str) -> None:
        """Append one line to the log; it survives the death of this process."""
        # Closed, not fsynced: the page cache outlives a killed process. After a crash of the node
        # a run resumes from a checkpoint, which has its own copy of the log.
        with self._log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def rewrite(self, lines: Iterable[str]) -> None:
        """Replace the log by `lines`."""
        _replace(self._log, "".join(line + "\n" for line in lines))

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state."""
        _replace(self._state, json.dumps(plain(state)))


def _replace(path: Path, text: str) -> None:
    # A rename within a directory is atomic (POSIX): readers see the old file or the new one.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
