"""The Ray Train loop of docs/systems/own_loop.md, a worker of which is killed while it trains.

It trains the model of a run of `raymix train` under the same adaptive mixer: the mixture log is the
same, so what the mixer measured and decided is, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from raymix.training.api import train
from tests.support.own_loops import scripts
from tests.support.paths import ROOT
from tests.support.shell import Shell, steps_of, write_recipe

STEPS, KILLED_AT, INTERVAL = 40, 23, 4
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
# The loop of the page with the model and the optimizer of the run, and a log.
CHANGES = {
    "        loader.step()\n": "        loader.step()" + NOTE,
    'shard("my.yaml")': 'shard("my.yaml", run_dir="own")',
    'from_config(AutoConfig.from_pretrained("model"))': 'from_pretrained("model")',
    "lr=1e-3": "lr=1e-3, weight_decay=0.0",
}
PROBE = {
    "    optimizer = ": "    loader.gradient_probe(model)\n    optimizer = ",
}


@pytest.mark.parametrize(
    ("mixer", "changes"),
    [
        ({"kind": "pike", "form": "full", "zeta_1": 0.5, "zeta_2": 0.25}, CHANGES | PROBE),
        pytest.param({"kind": "ado"}, CHANGES, marks=pytest.mark.slow),
    ],
    ids=["pike", "ado"],
)
def test_a_train_function_of_ones_own_goes_on_in_the_next_batch(
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mixer: dict[str, Any],
    changes: dict[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(
        tmp_path / "my.yaml",
        data={"sequence_length": 64, "rows_per_step": 8},
        mixer=mixer,
        model={"kind": "pretrained", "path": "./model"},
        train={
            "steps": STEPS,
            "lr": 1e-3,
            "betas": [0.9, 0.999],
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "clip_norm": 1e6,
            "probe_interval": INTERVAL,
        },
        cluster={"workers": 0},
    )
    set_seed(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    run = Path(train(str(recipe), report=False)["run"])
    script = scripts(ROOT / "docs/systems/own_loop.md")["Ray Train"]
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
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
    ours, theirs = (
        [json.loads(line) for line in (place / "mixture_log.jsonl").read_text().splitlines()]
        for place in (tmp_path / "own", run)
    )
    assert len(theirs) > 3
    assert [entry["first_step"] for entry in ours] == [entry["first_step"] for entry in theirs]
    for own, other in zip(ours, theirs, strict=True):
        assert own["shares"] == pytest.approx(other["shares"], rel=1e-3)
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    # From the checkpoint of step 20 on, steps are trained again.
    steps = [int(step) for step, _ in notes]
    assert steps == [*range(1, KILLED_AT + 1), *range(21, STEPS + 1)]
    by_step: dict[int, set[str]] = {}
    for step, batch_hash in notes:
        by_step.setdefault(int(step), set()).add(batch_hash)
    assert all(len(hashes) == 1 for hashes in by_step.values())
    # Until the mixer first moves the shares, whose last bits depend on the number of ranks.
    same = [line for line in steps_of(run) if line["step"] <= theirs[1]["first_step"]]
    assert same
    assert all(by_step[line["step"]] == {line["batch_hash"]} for line in same)
