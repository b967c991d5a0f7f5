"""Whole merges as a user runs them: a model that loads, a kill half-way, a family that grows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import raymix
from tests.benchmarks import _merge_inputs
from tests.support.merging import NORM, digests, read_model, write_family
from tests.support.paths import ROOT
from tests.support.shell import Shell, wait_for


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of three models that transformers wrote, with a tokenizer."""
    folder = tmp_path_factory.mktemp("llamas")
    vocabulary = {chr(97 + at): at for at in range(26)} | {"<s>": 26, "</s>": 27}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])),
        bos_token="<s>",
        eos_token="</s>",
    )
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=28, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    for name in ("base", "m1", "m2"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return folder


@pytest.mark.parametrize("method", ["drm", "ties", "tsv"])
def test_transformers_loads_and_runs_it(method: str, llamas: Path, tmp_path: Path) -> None:
    file = {
        "merge_method": method,
        "base_model": str(llamas / "base"),
        "models": [{"model": str(llamas / name)} for name in ("m1", "m2")],
    }
    raymix.merge(file, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert tokenizer("abc").input_ids == [0, 1, 2]
    logits = model(**tokenizer("abc", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    base = AutoModelForCausalLM.from_pretrained(llamas / "base")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not torch.equal(model.model.norm.weight, base.model.norm.weight)


def merge_file(family: dict[str, Any], place: Path) -> Path:
    document = {"merge_method": "drm", "max_shard_bytes": 20_000, **family}
    place.write_text(json.dumps(document))
    return place


KILLED_AFTER = """
import os, signal, sys
import raymix
def progress(done, total, job):
    if done == 12:
        os.kill(os.getpid(), signal.SIGKILL)
raymix.merge(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_a_killed_merge_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    family = write_family(tmp_path / "family")
    file = merge_file(family, tmp_path / "merge.yaml")
    shell = Shell(tmp_path)
    whole = shell.json("merge", str(file), "--out", "whole", "--no-plot")
    assert whole["resumed"] == 0
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AFTER, str(file), "out"], cwd=tmp_path, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    document = shell.json("merge", str(file), "--out", "out", "--no-plot")
    assert document["resumed"] >= 12
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".*merging"))


def test_an_interrupted_merge_stays_for_the_next_run(tmp_path: Path) -> None:
    family = write_family(tmp_path / "family", tasks=2)
    file = merge_file(family, tmp_path / "merge.yaml")
    shell = Shell(tmp_path, env={"PYTHONUNBUFFERED": "1"})
    process = shell.start("merge", str(file), "--out", "out", "--workers", "1")
    journal = tmp_path / ".out.merging" / "progress.jsonl"
    wait_for(
        lambda: journal.exists() or process.poll() is not None, seconds=200, what="the journal"
    )
    os.kill(process.pid, signal.SIGINT)
    # It may have been done before the signal came, or be about to exit: Python then has given up
    # its handler, and the signal ends the process.
    code, done = process.wait(60), (tmp_path / "out").exists()
    assert code == 130 or (done and code in (0, -signal.SIGINT))
    if not done:
        shell.ok("merge", str(file), "--out", "out")
    assert read_model(tmp_path / "out")[NORM].shape == (16,)


def test_the_plot_is_drawn_and_says_what_it_shows(tmp_path: Path) -> None:
    file = merge_file(write_family(tmp_path / "family"), tmp_path / "merge.yaml")
    document = Shell(tmp_path).json("merge", str(file), "--out", "out")
    picture = Path(document["plot"])
    assert picture == tmp_path / "out" / "merge_report.svg"
    text = picture.read_text()
    for words in ("alignment of tasks", "sign agreement", "kept", "attention", "mlp"):
        assert words in text
    assert "#0a00" not in text  # every stand-in has become a color of the theme


# In a process that only merges, as the command does: what others freed is not counted then.
GROWING = """
import json, sys
import raymix
from raymix.merging.run.engine import return_freed_memory
return_freed_memory()
out, method, base, *tasks = sys.argv[1:]
file = {"merge_method": method, "base_model": base, "models": [{"model": task} for task in tasks]}
print(json.dumps(raymix.merge(file, out, workers=1)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "drm"])
def test_memory_does_not_grow_with_the_layers(method: str, tmp_path: Path) -> None:
    def grown(layers: int) -> float:
        """Return the most memory that a process had while it merged."""
        folder = tmp_path / f"{method}{layers}"
        family = _merge_inputs.write_family(
            folder, _merge_inputs.Size(512, layers, 1024, 8, 8, 64), 3
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        places = [str(place) for place in (folder / "out", method, *family)]
        command = [sys.executable, "-c", GROWING, *places]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return float(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])

    one, four = grown(2), grown(8)
    assert four < one + 30e6
