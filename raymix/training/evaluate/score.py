"""Scoring a checkpoint on held-out text, outside a run: `raymix eval`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from raymix.recipe import PretrainedModel, Recipe
from raymix.store import Corpus
from raymix.training.evaluate.checkpoint_ref import find_checkpoint
from raymix.training.evaluate.held_out import Evaluator, HeldOutRows, LossTable, held_out_rows
from raymix.training.host.device import quiet_libraries, use_threads
from raymix.training.model.hf_model import CorpusFacts, build_model, probe_model
from raymix.training.model.loss import PackedLoss
from raymix.training.model.parallel import SingleReplica, World


def score(
    path: str | Path, *, recipe: Recipe | None = None, rows_per_domain: int | None = None
) -> dict[str, Any]:
    """Return the held-out losses of a run's newest checkpoint, or of one checkpoint.

    Runs in this process, on a GPU where there is one.

    Args:
        path: A run directory, or a checkpoint in Hugging Face format.
        recipe: Where corpus, sequence length and rows come from; left out, the run's own.
        rows_per_domain: Rows to score; left out, the recipe's.

    Raises:
        RaymixError: If checkpoint or corpus cannot be used, or do not fit each other.
    """
    target = find_checkpoint(path)
    used = target.recipe(recipe)
    corpus = Corpus.open(used.corpus.path)
    rows = held_out_rows(
        corpus,
        sequence_length=used.data.sequence_length,
        rows_per_domain=rows_per_domain or used.eval.rows_per_domain,
    )
    table = score_checkpoint(rows, target.checkpoint, corpus)
    return {
        "checkpoint": target.where,
        "step": target.state.step if target.state else None,
        "corpus": used.corpus.path,
        "domains": table,
        "mean": sum(float(row["loss"] or 0.0) for row in table.values()) / max(1, len(table)),
    }


def score_checkpoint(
    rows: HeldOutRows, checkpoint: str | Path, corpus: Corpus, *, threads: int | None = None
) -> LossTable:
    """Return the losses of a model in Hugging Face format on rows of a corpus.

    Args:
        rows: What to score it on.
        checkpoint: The model's directory.
        corpus: Where the rows are from.
        threads: Threads to use; left out, one per core.

    Raises:
        RaymixError: If the model cannot be loaded, or does not fit the corpus.
    """
    quiet_libraries()
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    use_threads(threads, world)
    info, length = corpus.manifest.tokenizer, rows.tokens.shape[1]
    facts = CorpusFacts(info.vocab_size, info.eos_id, length)
    model = build_model(PretrainedModel(kind="pretrained", path=str(checkpoint)), facts, seed=0)
    loss = PackedLoss(model, linear_head=probe_model(model).linear_head).to(world.device)
    evaluator = Evaluator(corpus, rows, world=world, rows_at_once=8)
    return evaluator.evaluate(SingleReplica(loss, world), contextlib.nullcontext())
