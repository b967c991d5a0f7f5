"""`make demo-cluster`: a run submitted to a real Ray cluster of two nodes on this machine.

Two raylets of one CPU each, token authentication on; the project and its recipe travel by Ray's
job API, a worker trains on each node, the log is followed, the report is drawn. Every process of
the cluster is ended at the end, also after a failure or Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.local_cluster import LocalCluster, local_cluster
from tests.support.paths import ROOT

RECIPE = "pipelines/quickstart.yaml"
CHANGES = ("name=demo-cluster", "train.steps=200", "eval.every=100")


def main() -> int:
    """Return the exit code of the submitted job, or of what failed after it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    began = time.monotonic()
    with local_cluster((1, 1), say=lambda text: print(f"-- {text}", flush=True)) as cluster:
        said = f"job server {cluster.address}, token authentication"
        print(f"-- two nodes up after {time.monotonic() - began:.0f} s: {said}", flush=True)
        words = ("submit", "train", RECIPE, *CHANGES, "--storage", str(ROOT), "--follow")
        code = raymix(cluster, *words, "--", "--if-exists", "new")
        raymix(cluster, "status")
    run = newest_run()
    code = code or raymix(None, "report", str(run.relative_to(ROOT)))
    print(f"-- {time.monotonic() - began:.0f} s in all; the cluster is gone", flush=True)
    return code


def raymix(cluster: LocalCluster | None, *words: str) -> int:
    """Return the exit code of a `raymix` command, run where there is one against the cluster."""
    shown = ["--address", cluster.address] if cluster else []
    at = words.index("--") if "--" in words else len(words)
    line = [*words[:at], *shown, *words[at:]]
    print(f"\n$ raymix {shlex.join(line)}", flush=True)
    environment = {**os.environ, **(cluster.environment if cluster else {})}
    done = subprocess.run([sys.executable, "-m", "raymix", *line], cwd=ROOT, env=environment)
    return done.returncode


def newest_run() -> Path:
    """Return the newest run of this demonstration."""
    runs = ROOT.glob("runs/demo-cluster*/metrics.jsonl")
    return max(runs, key=lambda path: path.stat().st_mtime).parent


if __name__ == "__main__":
    sys.exit(main())
