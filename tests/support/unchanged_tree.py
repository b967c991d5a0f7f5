"""A tree of raymix under test: its commands and probes as processes in one working directory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

FAILED = "FAILED"
"""Key of a result that could not be computed."""
_PROBE = Path(__file__).with_name("unchanged_probe.py")
_TIMEOUT_S = 600

# As tests/conftest.py: a Ray that starts sooner, and no network.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_OFFLINE": "1",
    "GOMP_SPINCOUNT": "1000",
    # Sums are split by threads: their number must not follow the machine's load or cores.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Help is wrapped at the terminal's width.
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "TERM": "dumb",
}


def failure(error: Exception) -> dict[str, str]:
    """Return the value that stands for a result that could not be computed."""
    return {FAILED: f"{type(error).__name__}: {error}"}


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Return the SHA-256 of every file below a directory, by its path there."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@dataclass(frozen=True)
class Tree:
    """The code under test and the directory it works in."""

    root: Path
    """The directory that holds `raymix/`."""
    folder: Path
    """The working directory of all commands."""

    @classmethod
    def under_test(cls, folder: Path) -> Self:
        """Return the tree that PYTHONPATH names, else that of the working directory.

        Raises:
            RuntimeError: If there is none, or processes import raymix from elsewhere.
        """
        named = [Path(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        for root in [*named, Path.cwd()]:
            if (root / "raymix" / "__init__.py").is_file():
                tree = cls(root.resolve(), folder.resolve())
                break
        else:
            raise RuntimeError("no directory on PYTHONPATH holds raymix/")
        imported = dict(tree.probe("where", None))["where"]
        if Path(imported) != tree.root:
            raise RuntimeError(f"raymix is imported from {imported}, not from {tree.root}")
        return tree

    def text(self, *args: str) -> str:
        """Return what a command prints on stdout.

        Raises:
            RuntimeError: If it fails.
        """
        return self._run([sys.executable, "-m", "raymix", *args])

    def json(self, *args: str) -> Any:
        """Return the document of a command with `--json`."""
        return json.loads(self.text(*args, "--json"))

    def probe(self, job: str, given: Any) -> Iterator[tuple[str, Any]]:
        """Yield the results of a job of `unchanged_probe`."""
        source, out = self.folder / "probe-in.json", self.folder / "probe-out.json"
        source.write_text(json.dumps(given), encoding="utf-8")
        # -P: the directory of the probe is not searched for modules.
        self._run([sys.executable, "-P", str(_PROBE), job, str(source), str(out)])
        yield from json.loads(out.read_text("utf-8")).items()

    def without_places(self, value: Any) -> Any:
        """Return a JSON value without the directories of this recording."""
        text = json.dumps(value)
        for place, name in ((self.folder, "FOLDER"), (self.root, "TREE")):
            text = text.replace(str(place), name)
        return json.loads(text)

    def _run(self, command: list[str]) -> str:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYMIX_"))}
        shown = " ".join(command[1:])
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=inherited | _ENVIRONMENT | {"PYTHONPATH": str(self.root)},
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{shown}: not done after {_TIMEOUT_S} s") from None
        if done.returncode:
            raise RuntimeError(f"{shown}: exit {done.returncode}: {done.stderr[-1500:]}")
        return done.stdout
