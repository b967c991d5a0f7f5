"""The torchtitan data loader with torchtitan's own base class, config and checkpoints."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raymix.recipe import recipe_to_yaml
from raymix.training.api import train
from raymix.training.run.rundir import read_metrics
from tests.integration.training.test_run import recipe
from tests.support.loops import train_corpus
from tests.support.paths import ROOT
from tests.support.shell import Shell, steps_of, write_recipe

TORCHTITAN = Path(os.environ.get("RAYMIX_TORCHTITAN", ROOT / ".venv-torchtitan"))
SCRIPT = """
import json, torch, torch.distributed.checkpoint as dcp
from raymix.errors import TrainingError
from raymix.integrations.torchtitan import MixtureDataLoader

def build(rank, world, seq_len=32, rows=1):
    return MixtureDataLoader.Config(recipe="my.yaml").build(
        dp_world_size=world, dp_rank=rank, seq_len=seq_len, local_batch_size=rows,
        tokenizer=None, snapshot_every_n_steps=None,
    )

first = build(0, 2)
for part, (inputs, labels) in zip(range(9), first):  # three parts a step
    tokens, positions = inputs["input"], inputs["positions"]
    assert tokens.shape == positions.shape == labels.shape == (1, 32)
    ends = torch.cat([positions[:, 1:] == 0, torch.ones(1, 1, dtype=torch.bool)], 1)
    assert torch.equal(labels == -100, ends)
    assert torch.equal(labels[:, :-1][~ends[:, :-1]], tokens[:, 1:][~ends[:, :-1]])
dcp.save({"dataloader": first}, checkpoint_id="saved")
again = build(0, 1)
dcp.load({"dataloader": again}, checkpoint_id="saved")
hashes = []
for number, _ in enumerate(again, start=1):
    if number % 6 == 0:
        hashes.append(again.mixture.info(again.mixture.step_read - 1).batch_hash)
errors = []
for wrong in ({"seq_len": 64}, {"rows": 4}):
    try:
        build(0, 1, **wrong)
    except TrainingError as error:
        errors += error.problems
print(json.dumps([hashes, errors]))
"""


pytestmark = pytest.mark.skipif(
    not TORCHTITAN.is_dir(),
    reason="torchtitan is not installed: `make .venv-torchtitan`, or set RAYMIX_TORCHTITAN",
)


def with_torchtitan(
    directory: Path, *arguments: str, ranks: int = 1
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script on some ranks, as torchrun does; return them in order."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    path = os.pathsep.join([str(ROOT), str(TORCHTITAN)])
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}

    def run(rank: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=directory,
            env={**os.environ, **world, "RANK": f"{rank}", "LOCAL_RANK": "0", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def test_it_reads_the_mixture_and_goes_on_with_other_ranks(tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", {"a": 9000, "b": 6000, "c": 3000})
    made = recipe(corpus, tmp_path)
    train(made, report=False)
    lines = read_metrics(Path(made.run_dir) / "metrics.jsonl")
    (tmp_path / "my.yaml").write_text(recipe_to_yaml(made))
    (done,) = with_torchtitan(tmp_path, "-c", SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    hashes, errors = json.loads(done.stdout.splitlines()[-1])
    assert hashes == [line["batch_hash"] for line in lines if "batch_hash" in line][3:]
    assert errors == [
        "training.seq_len = 64: the recipe's rows have 32 tokens.",
        "training.local_batch_size = 4: 1 ranks of it do not divide the 6 rows of a step. Set "
        "training.global_batch_size to the recipe's data.rows_per_step.",
    ]


def test_its_trainer_killed_and_resumed_trains_on_the_batches_of_raymix(tmp_path: Path) -> None:
    weights = {"books": 0.4, "python": 0.3, "legal": 0.2, "math": 0.1}
    write_recipe(
        tmp_path / "my.yaml",
        name="my",
        data={"sequence_length": 64, "rows_per_step": 6},
        mixer={"kind": "static", "weights": weights},
        train={"steps": 40},
        cluster={"workers": 0},
    )
    Shell(tmp_path).ok("train", "my.yaml", "--no-report")
    expected = {line["step"]: line["batch_hash"] for line in steps_of(tmp_path / "runs" / "my")}
    script = str(ROOT / "tests" / "support" / "torchtitan_on_cpu.py")
    (killed,) = with_torchtitan(tmp_path, script, "40", "23", "0")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert trained(killed.stdout) == {step: (expected[step], 0.4) for step in range(1, 24)}
    resumed = with_torchtitan(tmp_path, script, "40", "0", "30", ranks=2)
    assert [each.returncode for each in resumed] == [0, 0], resumed[0].stderr[-3000:]
    # Its newest checkpoint is that of step 20.
    steps = trained(resumed[0].stdout)
    assert steps == trained(resumed[1].stdout)
    assert sorted(steps) == list(range(21, 41))
    first = min(step for step, (_, share) in steps.items() if share == 1.0)
    assert 31 <= first <= 32
    assert all(steps[step] == (expected[step], 0.4) for step in range(21, first))
    assert all(steps[step][1] == 1.0 for step in range(first, 41))


def trained(output: str) -> dict[int, tuple[str, float]]:
    """Return batch hash and share of the first domain of the steps that a script has trained."""
    said = [line.split() for line in output.splitlines() if line.startswith("trained ")]
    return {int(step): (batch_hash, float(share)) for _, step, batch_hash, share in said}
