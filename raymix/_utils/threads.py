"""One BLAS thread for the many small matrices of a fit: more of them only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep numpy and scipy to one thread, in this process, until the end of the block.

    On a machine that is busy with other work a fit of seconds takes minutes otherwise: threads
    of OpenBLAS spin while they wait.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield
