"""Conversations that are cut before their first answer teach nothing: `plan` says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raymix.errors import RecipeError
from raymix.recipe import load_recipe
from raymix.training.plan import preflight
from tests.integration.training.test_preflight import HERE, TINY
from tests.support.chats import chat_corpus, sums
from tests.support.recipes import write


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
    mask = corpus.loss_mask("chat", "train")
    assert mask is not None
    ends = np.cumsum(corpus.document_lengths("chat", "train"), dtype=np.int64)
    # The longest prompt before an answer, counted document by document.
    first = [
        np.flatnonzero(mask.mask(int(low), int(high)))[0]
        for low, high in zip([0, *ends[:-1]], ends, strict=True)
    ]
    few, some = min(first), sorted(first)[len(first) // 2]
    notes = preflight.preflight(recipe, corpus, HERE).notes
    assert not any("first answer" in note for note in notes)
    cut = load_recipe(recipe, [f"data.sequence_length={some}"])
    (note,) = (n for n in preflight.preflight(cut, corpus, HERE).notes if "first answer" in n)
    missed = sum(position >= some for position in first)
    assert note.startswith(f"{missed} of {len(first)} documents of chat are cut before")
    with pytest.raises(RecipeError, match=rf"all {len(first)} documents are cut after {few} tok"):
        preflight.preflight(load_recipe(recipe, [f"data.sequence_length={few}"]), corpus, HERE)
