"""Trial of a small model of a run's architecture: its traits, and the gradient probe on it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from raymix.errors import RaymixError
from raymix.signals import GradientProbe
from raymix.signals.survey import notice
from raymix.training.host.device import quiet_libraries
from raymix.training.model.facts import ModelTraits
from raymix.training.model.hf_model import resolve_config
from raymix.training.model.lora import add_lora
from raymix.training.model.loss import PackedLoss
from raymix.training.model.traits import probe_model
from raymix.training.plan.model_checks import Findings, TrialInputs
from raymix.training.plan.small_model import small_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS, _LENGTH = 4, 16


def try_small_model(inputs: TrialInputs) -> Findings:
    """Return what a small model of the configuration shows.

    Raises:
        RecipeError: If the configuration cannot be resolved.
    """
    config = resolve_config(inputs.model, inputs.facts)
    quiet_libraries()
    threads = torch.get_num_threads()
    # Several threads wait for each other longer than the small products take.
    torch.set_num_threads(1)
    try:
        for model in small_models(config):
            # A configuration whose fields hang together in another way fails when it runs.
            try:
                traits = probe_model(model)
            except Exception:  # noqa: BLE001 - of any type; the next one may work
                continue
            if inputs.mode is None or not traits.isolates_documents:
                return Findings(config.model_type, traits)
            return Findings(config.model_type, traits, *_try_probe(model, inputs, traits))
        return Findings(config.model_type, None)
    finally:
        torch.set_num_threads(threads)


def _try_probe(
    model: PreTrainedModel, inputs: TrialInputs, traits: ModelTraits
) -> tuple[str | None, tuple[str, ...]]:
    """Return why the gradient probe cannot measure a model, and what it does in another way."""
    mode: Any = inputs.mode
    tokens_BL = torch.arange(_ROWS * _LENGTH).view(_ROWS, _LENGTH) % model.config.vocab_size
    positions_BL = (torch.arange(_LENGTH) % (_LENGTH // 2)).expand_as(tokens_BL)
    log = logging.getLogger("raymix.signals")
    level = log.level
    # The plan says it in its notes.
    log.setLevel(logging.ERROR)
    try:
        adapted = add_lora(model, inputs.model.lora, seed=0)
        loss = PackedLoss(adapted, linear_head=traits.linear_head, isolation=traits.isolation)
        probe = GradientProbe(loss, n_groups=_ROWS // 2, mode=mode)
        probe.measure(tokens_BL, positions_BL, tokens_BL, torch.arange(_ROWS))
    except (RaymixError, ValueError) as error:
        # Of the message of a parameter only the problem: paths there are those of the library.
        return str(error).split(": ", 1)[-1].splitlines()[0].rstrip("."), ()
    finally:
        log.setLevel(level)
    names = probe.by_backward
    return None, ((notice(names).replace("probe:", "probe takes", 1) + ".",) if names else ())
