"""Low-rank adapters by peft, inside the Hugging Face model itself.

The adapters are injected into the model's linear layers (Hu et al. 2022). The model keeps its
class, so loss, gradient probe and data parallelism see no difference but the parameters that
require no gradient. Checkpoints and exports are in peft's format. peft is imported where it is
needed, as it takes seconds.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from raymix.errors import RecipeError, TrainingError
from raymix.recipe.sections.lora import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a directory an adapter."""
_WEIGHTS = "adapter_model.safetensors"
# PeftModel names the injected model so; adapters saved by it carry the prefix.
_PREFIX = "base_model.model."
_MAX_SHOWN = 8

_Model = TypeVar("_Model", bound="PreTrainedModel")


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter in peft's format."""
    return (directory / ADAPTER_CONFIG).is_file()


@dataclass(frozen=True, slots=True)
class LoraBase:
    """Where the weights below an adapter are."""

    name: str
    """A directory, or a name of the Hub."""
    revision: str | None = None
    """Its commit on the Hub."""


def has_adapters(model: PreTrainedModel) -> bool:
    """Return whether adapters have been injected into a model."""
    return "peft_config" in model.__dict__


def add_lora(
    model: _Model, config: LoraConfig | None, *, seed: int, base: LoraBase | None = None
) -> _Model:
    """Inject adapters into `model` and freeze all other parameters; None changes nothing.

    Args:
        model: The model, changed in place and returned.
        config: The recipe's `model.lora`.
        seed: The adapters' first matrices depend on it and the model's shapes alone; the second
            ones are zero, so the model's output is unchanged.
        base: The base model, for the files of the adapter; None for a new model, which no directory
            holds.

    Raises:
        RecipeError: If peft is not installed, or a target matches no module.
    """
    if config is None:
        return model
    _require_peft(config)
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    _check_targets(model, config)
    conv = any(isinstance(module, Conv1D) for module in model.modules())
    targets = "all-linear" if config.targets == "all-linear" else list(config.targets)
    wanted = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name if base else None,
        revision=base.revision if base else None,
        # GPT-2 keeps its matrices transposed.
        fan_in_fan_out=conv,
    )
    try:
        # Forked, as for the weights of a new model.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            inject_adapter_in_model(wanted, model)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _wrong_targets(config, str(error).splitlines()[0]) from error
    return model


def _require_peft(config: LoraConfig) -> None:
    if importlib.util.find_spec("peft") is None:
        raise RecipeError.at(
            "model.lora",
            config.model_dump(exclude_defaults=True),
            "peft is not installed",
            fix="pip install 'raymix[lora]'",
        )


def _check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise for the first target that no module has; peft takes a list if any of it matches."""
    names = [name for name, _ in model.named_modules() if name]
    for target in config.targets if config.targets != "all-linear" else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _wrong_targets(config, f"no module is called {target!r}", model)


def _wrong_targets(
    config: LoraConfig, problem: str, model: PreTrainedModel | None = None
) -> RecipeError:
    allowed = ""
    if model is not None:
        linear = (torch.nn.Linear,)
        last = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, linear)}
        allowed = f"Linear layers here: {', '.join(sorted(last)[:_MAX_SHOWN])}" if last else ""
    value = config.targets if isinstance(config.targets, str) else list(config.targets)
    fix = "Name other modules, or take all-linear"
    return RecipeError.at("model.lora.targets", value, problem, allowed=allowed, fix=fix)


def save_adapter(model: PreTrainedModel, weights: dict[str, torch.Tensor], directory: Path) -> None:
    """Write the adapters of `model` in peft's format, beside the model's configuration.

    Args:
        model: A model with adapters.
        weights: The adapters' parameters by name, whole and on the CPU.
        directory: An existing directory.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    named = {f"{_PREFIX}{name}": tensor for name, tensor in state.items()}
    save_file(named, directory / _WEIGHTS, metadata={"format": "pt"})
    peft_config: Any = model.peft_config
    # As PeftModel saves it: an adapter that is loaded is not trained unless one asks for it.
    config = copy.copy(peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(directory)
    # What the base is like, for those who look at the directory without it.
    model.config.save_pretrained(directory)


def load_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Load the adapters in `directory` into a model that has such adapters.

    Raises:
        TrainingError: If they do not fit.
    """
    from peft import set_peft_model_state_dict

    state = load_file(directory / _WEIGHTS)
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    try:
        result: Any = set_peft_model_state_dict(model, named)
    except RuntimeError as error:
        raise TrainingError.at("checkpoint", str(directory), str(error)) from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        odd = (missing or result.unexpected_keys)[0]
        raise TrainingError.at("checkpoint", str(directory), f"not an adapter of this model: {odd}")


def merge_lora(model: PreTrainedModel) -> None:
    """Add the adapters' updates to the weights of `model` and remove the adapters, in place."""
    from peft.tuners.lora import LoraLayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        merged: Any = layer
        # `safe_merge` refuses weights that are not finite.
        merged.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, merged.get_base_layer())
    # What peft and transformers know a model with adapters by: it would be saved as an adapter.
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(mark, None)
    model.requires_grad_(requires_grad=True)
