"""Reads the steps of a rank, one ahead of the loop, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from raymix.mixers import DomainStats
from raymix.sampling import MixtureLog
from raymix.streaming.batches.background import BackgroundCall
from raymix.streaming.batches.step_batch import DocumentBatch, StepBatch
from raymix.streaming.batches.stream import MixtureStream
from raymix.streaming.controller.local import LocalController

Parts = TypeVar("Parts")


class StepReader(Generic[Parts]):
    """A rank's controller and stream, with the next step's parts made while the loop trains.

    Args of the constructor:
        controller: The rank's controller.
        stream: Its stream.
        convert: Makes the parts of a batch, given the factors of the domains' losses or None.
    """

    def __init__(
        self,
        controller: LocalController,
        stream: MixtureStream,
        convert: Callable[[StepBatch | DocumentBatch, list[float] | None], Parts],
    ) -> None:
        self._controller = controller
        self._stream = stream
        self._convert = convert
        # Controller and stream are used by the thread and by the loop's calls.
        self._lock = threading.Lock()
        self._thread: BackgroundCall[Parts] = BackgroundCall("raymix-loader")
        self._next: Future[Parts] | None = None
        self._taken = stream.step

    def next_parts(self) -> Parts | None:
        """Return the parts of the next step, or None after the last.

        Raises:
            CorpusError: If a block is corrupt; it names the file and the block.
        """
        if self._next is None and self._stream.done:
            return None
        parts = self._next.result() if self._next is not None else self._make(self._taken)
        self._next, self._taken = None, self._taken + 1
        if not self._stream.done:
            self._next = self._thread.submit(self._make, self._taken)
        return parts

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the states of stream and controller to go on at `step`.

        Raises:
            TrainingError: If the step was not read, or was released.
        """
        # The step ahead is decided on all ranks, or on none: their states are to be equal.
        self._wait_for_next()
        with self._lock:
            return {
                "sampler": self._stream.state_dict(step),
                "controller": self._controller.snapshot(step),
            }

    def skip_to(self, step: int) -> None:
        """Go on at `step`, before anything was read; see `MixtureStream.skip_to`."""
        self._stream.skip_to(step)
        self._taken = step

    def release(self, step: int) -> None:
        """Give up the states before `step`."""
        with self._lock:
            self._stream.release(step)

    def push(self, stats: DomainStats) -> None:
        """Send the statistics of a window to the mixer; a collective of all ranks."""
        self._wait_for_next()
        with self._lock:
            self._controller.push(stats.step // stats.window, stats)

    def set_weights(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None
    ) -> int:
        """Request shares and return the step from which on they hold; a collective of all ranks."""
        self._wait_for_next()
        with self._lock:
            return self._controller.set_weights(weights, first_step)

    @property
    def log(self) -> MixtureLog:
        """Return the mixture log as far as it was read."""
        self._wait_for_next()
        return self._stream.log

    def close(self) -> None:
        """Wait for the step that is being made; its parts are dropped."""
        self._wait_for_next()

    def _make(self, step: int) -> Parts:
        with self._lock:
            batch = self._stream.next()
            return self._convert(batch, self._stream.loss_weights(batch.step))

    def _wait_for_next(self) -> None:
        # Its error, if there is one, is raised by `next_parts`.
        if self._next is not None:
            self._next.exception()
