"""Held-out losses of a checkpoint outside a run (`raymix eval`)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raymix.recipe import PretrainedModel, Recipe
from raymix.store import Corpus
from raymix.training.evaluate.checkpoint_ref import find_checkpoint
from raymix.training.evaluate.held_out import Evaluator, HeldOutRows, LossTable, held_out_rows
from raymix.training.host.device import quiet_libraries, use_threads
from raymix.training.model.facts import CorpusFacts, causality_error
from raymix.training.model.hf_model import build_model
from raymix.training.model.lora import is_adapter
from raymix.training.model.loss import PackedLoss
from raymix.training.model.parallel import SingleReplica, World
from raymix.training.model.run_model import checkpoint_facts, run_model
from raymix.training.model.traits import probe_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MICRO_BATCH_ROWS = 8


def score(
    path: str | Path, *, recipe: Recipe | None = None, rows_per_domain: int | None = None
) -> dict[str, Any]:
    """Return the held-out losses of a run's newest checkpoint, or of one checkpoint.

    Runs in this process, on a GPU where there is one.

    Args:
        path: A run directory, or a checkpoint in Hugging Face format.
        recipe: Gives corpus, sequence length and rows; default: the run's own.
        rows_per_domain: Rows to score; default: the recipe's.

    Raises:
        RaymixError: If checkpoint or corpus cannot be used, or do not fit each other.
    """
    reference = find_checkpoint(path)
    recipe = reference.recipe(recipe)
    corpus = Corpus.open(recipe.corpus.path)
    rows = held_out_rows(
        corpus,
        sequence_length=recipe.data.sequence_length,
        rows_per_domain=rows_per_domain or recipe.eval.rows_per_domain,
    )
    if reference.run is not None and is_adapter(reference.checkpoint):
        own = reference.run.recipe()
        facts = checkpoint_facts(own, reference.checkpoint)
        table = _score(rows, run_model(own, facts, reference.checkpoint), corpus, threads=None)
    else:
        table = score_checkpoint(rows, reference.checkpoint, corpus)
    return {
        "checkpoint": reference.where,
        "step": reference.state.step if reference.state else None,
        "corpus": recipe.corpus.path,
        "domains": table,
        # Unweighted, so that it does not change with the rows that each domain has.
        "mean": sum(float(row["loss"] or 0.0) for row in table.values()) / max(1, len(table)),
    }


def score_checkpoint(
    rows: HeldOutRows, checkpoint: str | Path, corpus: Corpus, *, threads: int | None = None
) -> LossTable:
    """Return the losses of a model in Hugging Face format on rows of a corpus.

    Args:
        rows: The rows to score.
        checkpoint: The model's directory.
        corpus: The corpus of the rows.
        threads: Threads to use; default: one per core.

    Raises:
        RaymixError: If the model cannot be loaded, or does not fit the corpus.
    """
    info, length = corpus.manifest.tokenizer, rows.tokens.shape[1]
    facts = CorpusFacts(info.vocab_size, info.eos_id, length)
    model = build_model(PretrainedModel(kind="pretrained", path=str(checkpoint)), facts, seed=0)
    return _score(rows, model, corpus, threads=threads)


def _score(
    rows: HeldOutRows, model: PreTrainedModel, corpus: Corpus, *, threads: int | None
) -> LossTable:
    quiet_libraries()
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    use_threads(threads, world)
    traits = probe_model(model)
    if not traits.causal:
        raise causality_error(model.config.model_type)
    # Rows hold several documents, also of models that cannot keep them apart.
    loss = PackedLoss(model, linear_head=traits.linear_head, isolation=traits.isolation)
    loss = loss.to(world.device)
    evaluator = Evaluator(corpus, rows, world=world, micro_batch_rows=_MICRO_BATCH_ROWS)
    # float32 also for runs in bf16, so that losses of different machines can be compared.
    return evaluator.evaluate(SingleReplica(loss, world), contextlib.nullcontext())
