"""Progress of a preparation: what a listener receives, and how it is counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["plan", "tokenizer", "tokenize", "select", "assemble", "done"]


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """One moment of preparing: the stage, and how far it is.

    `done` and `total` are parts, domains or shards of the stage; `bytes_done` and `bytes_total`
    are estimated bytes of text, the measure of the remaining time. `tokens` and `documents` were
    made in this run by the stage. `note` is a line worth keeping on the screen.
    """

    stage: Stage
    done: int = 0
    total: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    documents: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    note: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens per second of the stage in this run."""
        return self.tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Return the seconds the stage is likely to take yet, or None while that is unknown."""
        # Before the first part ends there is nothing to extrapolate from.
        if not self.bytes_done:
            return None
        # By bytes, not parts: parts differ in size by a factor of ten, and the largest go first.
        return self.elapsed_s * (self.bytes_total - self.bytes_done) / self.bytes_done


Listener = Callable[[PrepareProgress], None]


@dataclass
class Reporter:
    """Counts the work of a stage and passes it on."""

    listener: Listener | None
    _stage: Stage = "plan"
    _total: int = 0
    _bytes_total: int = 0
    _done: int = 0
    _bytes_done: int = 0
    _documents: int = 0
    _tokens: int = 0
    _began: float = field(default_factory=time.monotonic)

    def begin(self, stage: Stage, total: int = 0, bytes_total: int = 0) -> None:
        """Start a stage of `total` pieces of work, `bytes_total` bytes in all."""
        self._stage, self._total, self._bytes_total = stage, total, bytes_total
        self._done = self._bytes_done = self._documents = self._tokens = 0
        self._began = time.monotonic()
        self._tell()

    def advance(self, size: int = 0, documents: int = 0, tokens: int = 0) -> None:
        """Count one piece of work of `size` bytes."""
        self._done += 1
        self._bytes_done += size
        self._documents += documents
        self._tokens += tokens
        self._tell()

    def note(self, text: str) -> None:
        """Say something worth keeping on the screen."""
        self._tell(text)

    def _tell(self, note: str = "") -> None:
        if self.listener:
            self.listener(
                PrepareProgress(
                    stage=self._stage,
                    done=self._done,
                    total=self._total,
                    bytes_done=self._bytes_done,
                    bytes_total=self._bytes_total,
                    documents=self._documents,
                    tokens=self._tokens,
                    elapsed_s=time.monotonic() - self._began,
                    note=note,
                )
            )
