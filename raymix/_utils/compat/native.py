"""Functions of glibc and LAPACK that Python has no public way to call."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8


def mallopt(parameter: int, value: int) -> bool:
    """Set a parameter of glibc's allocator for this process; return whether there is one to set.

    Nothing happens outside Linux, in libraries without mallopt (musl), or where LD_PRELOAD has
    put another allocator in glibc's place.
    """
    function = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if function is None or "LD_PRELOAD" in os.environ:
        return False
    function(parameter, value)
    return True


@cache
def lapack_function(name: str) -> Callable[..., None]:
    """Return a LAPACK routine of scipy's OpenBLAS, all of whose arguments are addresses.

    `scipy.linalg.cython_lapack` publishes the addresses for compiled callers. scipy's Python
    wrappers hold the interpreter's lock during the call, which would run the threads of a merge
    one after the other; ctypes releases it.
    """
    from scipy.linalg import cython_lapack  # a third of a second that most merges can do without

    capsule = cython_lapack.__pyx_capi__[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = get_name(capsule)
    # The capsule's name is the C signature: one more argument than it has commas.
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (signature.count(b",") + 1))
    return prototype(get_pointer(capsule, signature))
