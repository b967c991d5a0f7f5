"""Hugging Face `Trainer`, and trainers that derive from it, such as TRL's `SFTTrainer`.

The loader takes the place of the train dataloader and does not pass through Accelerate, which would
read batches on one rank and send them to the others, and read ahead. Resuming does not read the
stream again: the loader's state is in `trainer_state.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raymix.integrations._versions import require

require("transformers", ">=5,<6", "raymix[huggingface]")

from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_callback import ExportableState

from raymix.errors import TrainingError
from raymix.loader import MixtureLoader, token_losses
from raymix.training.model.loss import IGNORED


class MixtureCallback(TrainerCallback, ExportableState):
    """Reports trained steps to the loader, and saves and restores its state.

    Args of the constructor:
        loader: The loader that the trainer reads.
    """

    def __init__(self, loader: MixtureLoader) -> None:
        self._loader = loader

    def state(self) -> dict[str, Any]:
        """Return the loader's state, for `trainer_state.json`."""
        return {"args": {}, "attributes": {"loader": self._loader.state_dict()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the checkpoint's state, if training resumes from one.

        Raises:
            TrainingError: If the checkpoint was not saved with this callback.
        """
        if not state.global_step:
            return
        # transformers declares a list, and fills in a dict.
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__) or {}
        loader_state = saved.get("attributes", {}).get("loader")
        if loader_state is None or loader_state["step"] != state.global_step:
            raise TrainingError.at(
                "resume_from_checkpoint",
                state.global_step,
                "trainer_state.json has no state of the mixture at this step",
                fix="Resume from a checkpoint that was saved with the mixture",
            )
        self._loader.load_state_dict(loader_state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the step."""
        self._loader.step()


class _LossOfTokens:
    """Computes a model's loss as transformers does, and keeps the losses of the tokens.

    The logits are the largest tensor of a step: going through them once more for the losses by
    domain would take as long as the loss itself.
    """

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] | None = None

    def replace(self, model: Any) -> None:
        """Take the place of the model's loss function if that is transformers' own."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        own = isinstance(model, PreTrainedModel) and model.loss_type == "ForCausalLM"
        if own and model.loss_function is ForCausalLMLoss:
            model.loss_function = self

    @contextmanager
    def collected(self) -> Iterator[list[torch.Tensor]]:
        """Yield a list that gets the losses, (B, L), of each call until the end of the block.

        Other calls, as of evaluations, leave nothing behind: losses hold their autograd graph.
        """
        self._losses = []
        try:
            yield self._losses
        finally:
            self._losses = None

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the loss; the arguments are those of `ForCausalLMLoss`."""
        if shift_labels is not None or ignore_index != IGNORED or logits.dim() != 3:
            options: dict[str, Any] = {"shift_labels": shift_labels, "ignore_index": ignore_index}
            return ForCausalLMLoss(
                logits, labels, vocab_size, num_items_in_batch, **options, **kwargs
            )
        labels = labels.to(logits.device)
        losses = token_losses(logits, labels)
        if self._losses is not None:
            self._losses.append(losses)
        if num_items_in_batch is None:
            return losses.sum() / (labels[:, 1:] != IGNORED).sum()
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        return losses.sum() / num_items_in_batch


class MixtureTrainerMixin:
    """Makes a trainer read a `MixtureLoader`; put it before the trainer's class.

    `class MySFT(MixtureTrainerMixin, SFTTrainer): ...`, then `MySFT(mixture=loader, ...)`.
    """

    mixture: MixtureLoader

    def __init__(self, *args: Any, mixture: MixtureLoader, **kwargs: Any) -> None:
        """Make the trainer.

        Args:
            args: Of the trainer.
            mixture: The loader; its `micro_batches` are the gradient accumulation steps.
            kwargs: Of the trainer.

        Raises:
            TrainingError: If the numbers of steps or parts differ.
        """
        self.mixture = mixture
        super().__init__(*args, **kwargs)
        trainer: Any = self
        arguments: TrainingArguments = trainer.args
        if arguments.gradient_accumulation_steps != mixture.micro_batches:
            raise TrainingError.at(
                "gradient_accumulation_steps",
                arguments.gradient_accumulation_steps,
                f"the loader hands out a step in {mixture.micro_batches} parts",
                fix="Make the loader with micro_batches=gradient_accumulation_steps",
            )
        if arguments.max_steps > mixture.steps:
            raise TrainingError.at(
                "max_steps",
                arguments.max_steps,
                f"the mixture ends after {mixture.steps} steps",
                fix="Set train.steps of the recipe",
            )
        if arguments.max_steps <= 0:
            arguments.max_steps = mixture.steps
        self._loss_of_tokens = _LossOfTokens()
        if not arguments.torch_compile:
            self._loss_of_tokens.replace(trainer.model)
        # The loader goes on by its state; the trainer would read the steps before once more.
        arguments.ignore_data_skip = True
        trainer.add_callback(MixtureCallback(mixture))

    def get_train_dataloader(self) -> Any:
        """Return the loader itself."""
        return self.mixture

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the trainer's loss, and give the losses by domain to the loader."""
        trainer: Any = super()
        domain_ids = inputs.pop("domain_ids", None)
        items = inputs.pop("num_items_in_batch", None)
        weights = inputs.pop("loss_weights", None)
        if domain_ids is None:  # held-out batches of the trainer's own
            return trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        with self._loss_of_tokens.collected() as collected:
            loss, outputs = trainer.compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        losses = None
        # Models with several heads call their loss function for each, and the replicas of torch's
        # DataParallel call it for a part of the batch each.
        if len(collected) == 1 and collected[0].shape == labels.shape:
            losses = collected[0]
        else:
            logits = _logits(outputs, self.mixture, weighted=weights is not None)
            if logits is not None:
                with torch.set_grad_enabled(weights is not None):
                    losses = token_losses(logits, labels)
        if losses is not None:
            self.mixture.feedback(losses, labels, domain_ids)
            if weights is not None:
                # As a loss that the trainer takes as scaled: see `MixtureLoader` for the divisor.
                loss = (losses * weights).sum() / items
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log losses by domain beside the trainer's own."""
        # Only beside the training loss: the logs of evaluations and of the end have none.
        if "loss" in logs:
            losses = self.mixture.domain_losses()
            logs = {**logs, **{f"loss/{name}": loss for name, loss in losses.items()}}
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)


class MixtureTrainer(MixtureTrainerMixin, Trainer):
    """Hugging Face's `Trainer` on a `MixtureLoader`: `MixtureTrainer(mixture=loader, ...)`."""


def _logits(outputs: Any, loader: MixtureLoader, *, weighted: bool) -> torch.Tensor | None:
    logits = getattr(outputs, "logits", None)
    if logits is None and (loader.adaptive or weighted):
        raise TrainingError.at(
            "model",
            None,
            "it returns no logits, from which losses by domain are computed",
            fix="Turn the fused loss off, or take a mixer that needs no losses",
        )
    return logits
