"""The script of a forked process: does with its arguments what Python does."""

from __future__ import annotations

import os
import runpy
import sys

kind, *rest = sys.argv[1:]
if kind == "-m":
    # As Python: modules of the working directory come first.
    sys.path[0] = os.getcwd()
    sys.argv = rest
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(os.path.abspath(kind))
    sys.argv = [kind, *rest]
    runpy.run_path(kind, run_name="__main__")
