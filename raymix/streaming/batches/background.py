"""Background thread of a stream: calls run in order, their results are futures."""

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
    """Runs calls in order on a thread of its own, which ends with this object."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # A daemon, and not ThreadPoolExecutor, whose threads are joined at exit: a thread that
        # waits for the cluster must not keep the process alive.
        threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True).start()
        # The thread refers to the queue and not to `self`, or neither would ever be collected.
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
        except BaseException as error:  # noqa: BLE001 - `Future.result` raises it in the caller
            future.set_exception(error)
        # Locals live until the next job: `call` is bound to the stream, and would keep it alive.
        del job, call, future
