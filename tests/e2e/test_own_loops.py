"""The training loops of docs/systems/own_loop.md, each with its real framework.

Every script changes the shares after step 20, is killed by SIGKILL at step 23 and started again on
two ranks: every step that it trains has the batch of `raymix train` with the same shares.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.support.own_loops import run, scripts
from tests.support.paths import ROOT
from tests.support.shell import Shell, steps_of, write_recipe

PAGE = ROOT / "docs/systems/own_loop.md"
SCRIPTS = scripts(PAGE)
FRAMEWORKS = ("PyTorch", "Hugging Face Trainer", "TRL", "Accelerate", "Lightning")
STEPS, CHANGED_AT, KILLED_AT = 40, 20, 23
BEFORE = {"books": 0.4, "python": 0.3, "legal": 0.2, "math": 0.1}
AFTER = {"books": 0.1, "python": 0.1, "legal": 0.1, "math": 0.7}
SEVERAL_RANKS = """
torch.distributed.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(model)
for batch in loader:"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a recipe, a corpus of real text, a model's config, and a run."""
    work = tmp_path_factory.mktemp("work")
    write_recipe(
        work / "my.yaml",
        name="my",
        seed=3,
        data={"sequence_length": 64, "rows_per_step": 8},
        mixer={"kind": "static", "weights": BEFORE},
        train={"steps": STEPS, "lr": 1e-3},
        cluster={"workers": 0},
        eval={"rows_per_domain": 2, "every": STEPS},
    )
    # A change after step 20 is in force at step 22: a batch is read ahead.
    pieces = [{"step": 0, "weights": BEFORE}, {"step": CHANGED_AT + 1, "weights": AFTER}]
    changed = f"mixer={json.dumps({'kind': 'schedule', 'pieces': pieces})}"
    Shell(work).ok("train", "my.yaml", changed, "--no-report")
    corpus = next(work.glob("corp*"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(next(corpus.rglob("tokenizer.json"))), eos_token="<|endoftext|>"
    )
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(work / "model")
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(work / "model")
    return work


@pytest.fixture(scope="module")
def expected(work: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["batch_hash"]) for line in steps_of(next(work.glob("runs/*")))]


def directory_of(work: Path, tmp_path: Path) -> Path:
    """Return a directory of a script, with the recipe and all that it names."""
    for path in work.iterdir():
        if path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_killed_loop_goes_on_in_the_next_batch(
    framework: str, work: Path, expected: list[tuple[int, str]], tmp_path: Path
) -> None:
    directory = directory_of(work, tmp_path)
    script = directory / "train.py"
    script.write_text(SCRIPTS[framework])
    first = run(script, tmp_path / "notes", kill_at=KILLED_AT, weights_at=(CHANGED_AT, AFTER))
    assert first == expected[:KILLED_AT]
    if framework == "PyTorch":
        # As the page says of several ranks; the others do it by themselves.
        script.write_text(SCRIPTS[framework].replace("for batch in loader:", SEVERAL_RANKS))
    rest = run(script, tmp_path / "notes", ranks=2)
    assert rest == expected[20:]
    if framework == "Hugging Face Trainer":
        state = json.loads((directory / "out/checkpoint-40/trainer_state.json").read_text())
        (*_, last) = (line for line in state["log_history"] if "loss" in line)
        logged = {name.removeprefix("loss/") for name in last if name.startswith("loss/")}
        assert logged == set(BEFORE)


def test_no_loop_takes_more_than_fifteen_lines_of_raymix() -> None:
    for framework in [*FRAMEWORKS, "Ray Train"]:
        ours = re.compile(r"raymix|loader|mixture|domain_ids|Mixture")
        lines = [line for line in SCRIPTS[framework].splitlines() if ours.search(line)]
        assert len(lines) <= 15, (framework, lines)
