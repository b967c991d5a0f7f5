"""Python in a process of its own, where what a test must not share is fresh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


def run_script(script: str, folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """Return what a script came to that was run in `folder` and given a text on stdin."""
    return subprocess.run(
        [sys.executable, "-c", script],
        input=given,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
