"""`make demo-cluster`: a run submitted to a real Ray cluster of two nodes on this machine.

As a cluster that adds nodes on demand begins: a head without CPUs, token authentication on. The
project and its recipe travel by Ray's job API, the job asks for its workers, and only then a node
with two CPUs is started. The log is followed, the report is drawn. Every process of the cluster is
ended at the end, also after a failure or Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
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
    with local_cluster((0,), say=lambda text: print(f"-- {text}", flush=True)) as cluster:
        said = f"job server {cluster.address}, token authentication"
        print(f"-- the head is up after {time.monotonic() - began:.0f} s: {said}", flush=True)
        threading.Thread(target=scale, args=(cluster,), daemon=True).start()
        words = ("submit", "train", RECIPE, *CHANGES, "--storage", str(ROOT), "--follow")
        code = raymix(cluster, *words, "--", "--if-exists", "new")
        raymix(cluster, "status")
    run = newest_run()
    code = code or raymix(None, "report", str(run.relative_to(ROOT)))
    print(f"-- {time.monotonic() - began:.0f} s in all; the cluster is gone", flush=True)
    return code


def scale(cluster: LocalCluster) -> None:
    """Do what an autoscaler does: start a node when something waits for one."""
    asked = cluster.wait_for_demand()
    print(f"-- asked for: {asked}", flush=True)
    cluster.add_node(2)


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
