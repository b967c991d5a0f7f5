"""The torchtitan data loader with torchtitan's own base class, config and checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raymix.recipe import recipe_to_yaml
from raymix.training.api import train
from raymix.training.run.rundir import read_metrics
from tests.integration.training.test_run import recipe
from tests.support.loops import train_corpus
from tests.support.paths import ROOT

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


@pytest.mark.skipif(
    not TORCHTITAN.is_dir(),
    reason="torchtitan is not installed: `make .venv-torchtitan`, or set RAYMIX_TORCHTITAN",
)
def test_it_reads_the_mixture_and_goes_on_with_other_ranks(tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", {"a": 9000, "b": 6000, "c": 3000})
    made = recipe(corpus, tmp_path)
    train(made, report=False)
    lines = read_metrics(Path(made.run_dir) / "metrics.jsonl")
    (tmp_path / "my.yaml").write_text(recipe_to_yaml(made))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TORCHTITAN)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    hashes, errors = json.loads(done.stdout.splitlines()[-1])
    assert hashes == [line["batch_hash"] for line in lines if "batch_hash" in line][3:]
    assert errors == [
        "training.seq_len = 64: the recipe's rows have 32 tokens.",
        "training.local_batch_size = 4: 1 ranks of it do not divide the 6 rows of a step. Set "
        "training.global_batch_size to the recipe's data.rows_per_step.",
    ]
