"""Scoring a checkpoint on held-out text, outside a run: `raymix eval`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from raymix.recipe import PretrainedModel, Recipe
from raymix.store import Corpus
from raymix.train.device import quiet_libraries, use_threads
from raymix.train.evaluate import Evaluator, held_out_rows
from raymix.train.loss import PackedLoss
from raymix.train.model import CorpusFacts, build_model, probe_model
from raymix.train.parallel import SingleReplica, World
from raymix.train.target import find_target


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
    target = find_target(path)
    used = target.recipe(recipe)
    quiet_libraries()
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    use_threads(None, world)
    corpus = Corpus.open(used.corpus.path)
    info, length = corpus.manifest.tokenizer, used.data.sequence_length
    facts = CorpusFacts(info.vocab_size, info.eos_id, length)
    config = PretrainedModel(kind="pretrained", path=str(target.checkpoint))
    model = build_model(config, facts, seed=used.seed)
    loss = PackedLoss(model, linear_head=probe_model(model).linear_head).to(world.device)
    rows = held_out_rows(
        corpus,
        sequence_length=length,
        rows_per_domain=rows_per_domain or used.eval.rows_per_domain,
    )
    evaluator = Evaluator(corpus, rows, world=world, rows_at_once=8)
    table = evaluator.evaluate(SingleReplica(loss, world), contextlib.nullcontext())
    return {
        "checkpoint": str(target.checkpoint),
        "step": target.state.step if target.state else None,
        "corpus": used.corpus.path,
        "domains": table,
        "mean": sum(float(row["loss"] or 0.0) for row in table.values()) / max(1, len(table)),
    }
