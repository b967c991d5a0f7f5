"""PyTorch Lightning: the loader goes in as it is, a callback reports steps.

`Trainer.fit(module, loader)` with `use_distributed_sampler=False`. Lightning stores the loader's
state in its checkpoints by itself; the callback makes it the state of the step trained, updates
adaptive mixers, and logs losses by domain.
"""

from __future__ import annotations

from typing import Any

from raymix.integrations._versions import require

require("lightning", ">=2.6,<3", "raymix[lightning]")

import lightning.pytorch as pl

from raymix.errors import TrainingError
from raymix.loader import MixtureLoader


class MixtureCallback(pl.Callback):
    """Reports trained steps to a loader, and logs losses by domain.

    Args of the constructor:
        loader: The loader that the trainer reads; the module calls its `feedback`.
        log_every: Steps between logs of the losses by domain.
    """

    def __init__(self, loader: MixtureLoader, *, log_every: int = 50) -> None:
        self._loader = loader
        self._every = log_every

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that a step has as many parts as the trainer accumulates.

        Raises:
            TrainingError: If it has not.
        """
        if trainer.accumulate_grad_batches != self._loader.micro_batches:
            raise TrainingError.at(
                "accumulate_grad_batches",
                trainer.accumulate_grad_batches,
                f"the loader hands out a step in {self._loader.micro_batches} parts",
                fix="Make the loader with micro_batches=accumulate_grad_batches",
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Report the step after its last part."""
        if (batch_idx + 1) % self._loader.micro_batches:
            return
        self._loader.step()
        if trainer.global_step % self._every == 0:
            losses = self._loader.domain_losses()
            pl_module.log_dict({f"loss/{name}": loss for name, loss in losses.items()})
