"""One thread that works one call ahead."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

_Job = tuple[Callable[[int], Any], int, "Future[Any]"]


class BackgroundCall(Generic[Result]):
    """Runs calls in order on a thread of its own, which ends with this object.

    The thread is a daemon: one that waits for the cluster must not keep a process alive.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, call: Callable[[int], Result], argument: int) -> Future[Result]:
        """Return the future of `call(argument)`."""
        future: Future[Result] = Future()
        self._jobs.put((call, argument, future))
        return future


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        call, argument, future = job
        try:
            future.set_result(call(argument))
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)
        # Until the next job comes, nothing of this one may be kept alive.
        del job, call, future
