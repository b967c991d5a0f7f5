"""A Ray cluster of our own is out of reach of other machines: each socket is on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.loops import train_corpus
from tests.support.paths import ROOT

SCRIPT = """
import json, os, sys
from pathlib import Path
{start}
import ray

@ray.remote
class Actor:
    def pid(self):
        return os.getpid()

actors = [Actor.remote() for _ in range(2)]
ray.get([actor.pid.remote() for actor in actors])

def below(root):
    parent = {{}}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    pids = {{root}}
    while more := {{pid for pid, of in parent.items() if of in pids}} - pids:
        pids |= more
    return pids

def listening():
    places = {{}}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                places[f"socket:[{{words[9]}}]"] = words[1].split(":")[0]
    for pid in below(os.getpid()):
        for file in Path(f"/proc/{{pid}}/fd").glob("*"):
            try:
                place = places.get(os.readlink(file))
            except OSError:
                continue
            if place is not None:
                name = Path(f"/proc/{{pid}}/comm").read_text().strip()
                yield name, place

print("listening " + json.dumps(sorted(set(listening()))))
{end}
"""
STARTS = {
    "train": (
        "from raymix.recipe import ClusterConfig\n"
        "from raymix.training.launch.cluster import ray_cluster\n"
        "cluster = ray_cluster(ClusterConfig(workers=1, address='local'))\n"
        "cluster.__enter__()",
        "cluster.__exit__(None, None, None)",
    ),
    "workers": (
        "import threading, time\n"
        "from raymix.recipe import Recipe\n"
        "from raymix.training.api import train\n"
        "run = Path('run')\n"
        "document = json.loads(Path('recipe.json').read_text())\n"
        "work = lambda: train(Recipe.model_validate(document), report=False)\n"
        "thread = threading.Thread(target=work, daemon=True)\n"
        "thread.start()\n"
        "deadline, metrics = time.monotonic() + 250, run / 'metrics.jsonl'\n"
        "while thread.is_alive() and time.monotonic() < deadline:\n"
        "    time.sleep(0.2)\n"
        "    if metrics.exists() and 'lr' in metrics.read_text():\n"
        "        break",
        "(run / '.stop').touch()\nthread.join(60)",
    ),
    "prepare": (
        "from raymix.corpus.runner import choose_runner\n"
        "cluster = choose_runner(0, parallelism=1)\n"
        "cluster.__enter__()",
        "cluster.__exit__(None, None, None)",
    ),
    "merge": (
        "from raymix.merging.run.fanout import _join_or_start\n_join_or_start()",
        "ray.shutdown()",
    ),
}
# As the kernel writes them: 127.0.0.1, the same in an IPv6 socket, and ::1.
LOOPBACK = {
    "0100007F",
    "0000000000000000FFFF00000100007F",
    "00000000000000000000000001000000",
}


def write_recipe(folder: Path) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    document = {
        "name": "run",
        "corpus": {"path": train_corpus(folder / "corpus", {"a": 30_000}).path},
        "data": {"sequence_length": 16, "rows_per_step": 4},
        "model": {"config": shape},
        "train": {"steps": 200_000},
        "eval": {"rows_per_domain": 2},
        "cluster": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 0.25},
        "run": {"dir": str(folder / "run"), "tensorboard": False},
    }
    (folder / "recipe.json").write_text(json.dumps(document))


def as_uv_runs(command: list[str], folder: Path) -> list[str]:
    """Return a command that runs `command` below a process `uv run ...`, as Ray looks for one.

    Ray would upload the working directory then, which is too large for that here.
    """
    (folder / "run").write_text('"$@"\nexit $?\n')
    with (folder / "large.bin").open("wb") as file:
        file.truncate(600_000_000)
    return ["bash", "-c", 'exec -a uv bash run "$@"', "bash", *command]


@pytest.mark.parametrize("kind", STARTS)
def test_private_clusters_listen_on_the_loopback_only(kind: str, tmp_path: Path) -> None:
    start, end = STARTS[kind]
    command = [sys.executable, "-c", SCRIPT.format(start=start, end=end)]
    unset = {"RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    write_recipe(tmp_path)
    if kind == "merge":  # it would join any that runs here
        environment["RAY_ADDRESS"] = "local"
        # A path as Slurm sets it, too long for the sockets of Ray.
        environment["TMPDIR"] = str(tmp_path / ("long" * 20))
        Path(environment["TMPDIR"]).mkdir()
    if kind == "prepare":
        command = as_uv_runs(command, tmp_path)
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (output,) = (line for line in done.stdout.splitlines() if line.startswith("listening "))
    sockets = json.loads(output.removeprefix("listening "))
    if kind == "workers":
        assert any(name.startswith("ray::RayTrain") for name, _ in sockets), sockets
    assert {"gcs_server", "raylet"} <= {name for name, _ in sockets}
    assert [entry for entry in sockets if entry[1] not in LOOPBACK] == []
