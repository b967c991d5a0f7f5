"""Private API of PyTorch, read in torch 2.13; torch 2.9 to 2.11 have the same."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch._subclasses.fake_tensor import FakeTensorMode


def fake_tensors() -> AbstractContextManager[object]:
    """Return a context in which tensors have shapes and dtypes but no memory.

    Activations of a model of any size are counted this way. The `meta` device alone would not do:
    models build masks and positions from real tensors, which must be allowed among fake ones.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)
