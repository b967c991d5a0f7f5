"""The components of a rank's training loop, built by `setup` and used by `loop`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raymix.mixers import DomainStats
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.streaming.batches.stream import MixtureStream
from raymix.training.evaluate.held_out import Evaluator
from raymix.training.model.parallel import Replica
from raymix.training.run.checkpoint import TrainingState
from raymix.training.run.recorder import Recorder
from raymix.training.step.documents import ContextParallel
from raymix.training.step.probing import Prober


@dataclass(kw_only=True)
class TrainerComponents:
    """Everything a rank's training loop works with."""

    recipe: Recipe
    steps: int
    """Optimizer steps of the whole run."""
    domains: tuple[str, ...]
    replica: Replica
    optimizer: torch.optim.Optimizer
    stream: MixtureStream
    evaluator: Evaluator
    recorder: Recorder | None
    """On the writing rank only."""
    checkpoints: Path
    corpus: Corpus
    recipe_hash: str
    micro_batch_rows: int
    max_rank_rows: int | None
    """Rows of the rank with the most; None where all ranks have as many."""
    resumed: TrainingState | None
    bf16: bool
    flops_per_token: float
    peak_flops: float | None
    """Of one device; None where it is not known."""
    snapshot: Callable[[int], dict[str, Any] | None]
    """Returns the controller's snapshot for a run that resumes at a step."""
    on_checkpoint: Callable[[Path, int], None]
    """Called on every rank after a checkpoint."""
    stop_requested: Callable[[], bool]
    """Whether a clean stop has been requested; read on rank 0 only."""
    stage: Callable[[str], None]
    """Says on rank 0 that a stage before the first step begins."""
    push: Callable[[int, DomainStats], None] | None = None
    """Sends the statistics of a window to an adaptive mixer."""
    prober: Prober | None = None
    """Measures gradients for a mixer that needs them."""
    context_parallel: ContextParallel = field(default_factory=ContextParallel)
    """How documents are attended to."""
