"""The Ray Train loop of docs/systems/own_loop.md, a worker of which is killed while it trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from raymix.loader import MixtureLoader
from tests.support.own_loops import scripts
from tests.support.paths import ROOT
from tests.support.shell import Shell, write_recipe

STEPS, KILLED_AT = 40, 23
# What the test adds to the loop: a line for every step trained, and one kill.
NOTE = f"""
        trained = loader.step_trained
        if loader.rank == 0:
            with open("notes", "a") as notes:
                notes.write(f"{{trained}} {{loader.info(trained - 1).batch_hash}}\\n")
            if trained == {KILLED_AT} and not os.path.exists("killed"):
                open("killed", "w").close()
                os.kill(os.getpid(), 9)
"""


def test_a_train_function_of_ones_own_goes_on_in_the_next_batch(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The recipe's corpus is relative to the working directory, also for the loader below.
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(
        tmp_path / "my.yaml",
        data={"sequence_length": 64, "rows_per_step": 8},
        train={"steps": STEPS, "probe_interval": 4},
        mixer={"kind": "ado"},
    )
    Shell(tmp_path).ok("prepare", "my.yaml")
    LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "model")
    script = scripts(ROOT / "docs/systems/own_loop.md")["Ray Train"]
    assert script.count("        loader.step()\n") == 1
    script = script.replace("        loader.step()\n", "        loader.step()" + NOTE)
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": str(shell.address)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    steps = [int(step) for step, _ in notes]
    assert steps == [*range(1, KILLED_AT + 1), *range(21, STEPS + 1)]
    by_step: dict[str, set[str]] = {}
    for step, batch_hash in notes:
        by_step.setdefault(step, set()).add(batch_hash)
    # What was trained again had the same batches; and the first windows are the initial shares.
    assert all(len(hashes) == 1 for hashes in by_step.values())
    loader = MixtureLoader(recipe)
    next(loader)
    assert by_step["1"] == {loader.info(0).batch_hash}
