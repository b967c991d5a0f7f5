"""Gradient statistics of any causal LM, at the end of a window, for mixers that need them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from raymix.loader.collectives import Collectives
from raymix.mixers import Mixer
from raymix.recipe import Recipe
from raymix.signals import CausalLoss, adam_preconditioner
from raymix.store import Corpus
from raymix.training.model.parallel import World, training_precision
from raymix.training.step.probing import Prober, ProbeReader


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """The model that is trained, and how."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    micro_batch_rows: int
    bf16: bool


class LoaderProbe:
    """Measures the statistics that a mixer needs, by `raymix.training.step.probing`.

    Args of the constructor:
        recipe: The run.
        corpus: Its corpus; probes read rows of the train split in an order of their own.
        mixer: The mixer.
        probed: The model.
        ranks: The data-parallel ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        mixer: Mixer,
        probed: ProbedModel,
        ranks: Collectives,
    ) -> None:
        # DDP's forward pass would prepare an all-reduce of gradients that never comes.
        inner = getattr(probed.model, "module", probed.model)
        device = next(probed.model.parameters()).device
        config, length = recipe.train.probe, recipe.data.sequence_length
        by_adam = config.precondition == "adam" and probed.optimizer is not None
        self._prober = Prober(
            ProbeReader(corpus, sequence_length=length, seed=recipe.seed),
            CausalLoss(inner),
            World(rank=ranks.rank, size=ranks.world_size, device=device),
            config,
            needs=mixer.needs,
            n_domains=len(corpus.domain_names),
            targets=[corpus.domain_names.index(name) for name in recipe.mixer.targets],
            group_ND=getattr(mixer, "probe_groups", None),
            micro_batch_rows=probed.micro_batch_rows,
            precision=partial(training_precision, device.type, bf16=probed.bf16),
            metric=adam_preconditioner(probed.optimizer) if by_adam and probed.optimizer else None,
        )

    def measure(self, window: int) -> dict[str, Any]:
        """Return the gradient fields of `DomainStats`, means over this rank's passes."""
        return self._prober.measure(window)
