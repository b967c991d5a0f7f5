"""Conversations that are cut before their first answer: said by `plan`, no harm to a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raymix.errors import RecipeError
from raymix.recipe import load_recipe
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.plan import preflight
from raymix.training.run.rundir import read_metrics
from tests.integration.training.test_preflight import HERE, TINY
from tests.support.chats import chat_corpus, sums
from tests.support.recipes import write


def first_labels(corpus: Corpus) -> list[int]:
    """Return the position of the first label of each conversation, document by document."""
    mask = corpus.loss_mask("chat", "train")
    assert mask is not None
    ends = np.cumsum(corpus.document_lengths("chat", "train"), dtype=np.int64)
    return [
        int(np.flatnonzero(mask.mask(int(low), int(high)))[0])
        for low, high in zip([0, *ends[:-1]], ends, strict=True)
    ]


def test_documents_cut_before_their_first_answer_are_counted(tmp_path: Path) -> None:
    corpus = chat_corpus(tmp_path, sums(120))
    document = {
        "name": "cut",
        "corpus": {"path": corpus.path},
        "data": {"mode": "documents", "sequence_length": 512, "tokens_per_step": 2048},
        "mixer": {"kind": "uniform"},
        "model": {"config": TINY},
        "train": {"steps": 2},
    }
    recipe = load_recipe(write(tmp_path / "r.yaml", document))
    first = first_labels(corpus)
    few, some = min(first), sorted(first)[len(first) // 2]
    notes = preflight.preflight(recipe, corpus, HERE).notes
    assert not any("first answer" in note for note in notes)
    cut = load_recipe(recipe, [f"data.sequence_length={some}"])
    (note,) = (n for n in preflight.preflight(cut, corpus, HERE).notes if "first answer" in n)
    missed = sum(position >= some for position in first)
    assert note.startswith(f"{missed} of {len(first)} documents of chat are cut before")
    with pytest.raises(RecipeError, match=rf"all {len(first)} documents are cut after {few} tok"):
        preflight.preflight(load_recipe(recipe, [f"data.sequence_length={few}"]), corpus, HERE)


def test_a_step_of_nothing_else_leaves_the_weights_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = chat_corpus(tmp_path, sums(120))
    steps, first = 12, first_labels(corpus)
    length = sorted(first)[len(first) // 2]
    document = {
        "name": "cut",
        "corpus": {"path": corpus.path},
        # One conversation a step, and half of them end before their answer.
        "data": {"mode": "documents", "sequence_length": length, "tokens_per_step": length},
        "mixer": {"kind": "static", "weights": {"chat": 1.0, "text": 0.0}},
        "model": {"config": TINY},
        "train": {"steps": steps, "lr": 1e-3, "checkpoint_every": 1, "keep_checkpoints": 99},
        "cluster": {"workers": 0},
        "run": {"dir": str(tmp_path / "run")},
    }
    train(load_recipe(write(tmp_path / "r.yaml", document)), report=False)
    lines = {
        line["step"]: line
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "batch_hash" in line
    }
    assert sorted(lines) == list(range(1, steps + 1))
    empty = {step for step, line in lines.items() if not line["domain_loss"]}
    assert 0 < len(empty) < steps - 1
    weights = {
        step: load_file(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        for step in lines
    }
    for step in range(2, steps + 1):
        before, after = weights[step - 1], weights[step]
        same = all(torch.equal(before[name], after[name]) for name in after)
        assert same == (step in empty)
        assert ("loss" in lines[step]) == (step not in empty)
    assert all(lines[step]["skipped"] == "none of its tokens is learned" for step in empty)
    said = capsys.readouterr().out
    assert f"{len(empty)} steps were left out" in said or len(empty) == 1
    assert f"step {min(empty)} was left out: none of its tokens is learned" in said
