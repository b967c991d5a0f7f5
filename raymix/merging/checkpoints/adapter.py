"""PEFT LoRA adapters: read as factors, applied to a base, and written again.

Delta of a module: scale * B A with B (m, r), A (r, n) and scale = alpha / r, or alpha / sqrt(r)
with rank-stabilized LoRA; ranks and alphas may differ by module. Adapters that change more than
that (DoRA, biases, full modules) are an error rather than merged wrongly.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.checkpoints.checkpoint import (
    Checkpoint,
    TensorSpec,
    check_directory,
    file_specs,
    read_json,
)
from raymix.merging.registry import Factors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT wraps the base model twice (PeftModel, LoraModel), which the names in its files show.
_PREFIX = "base_model.model."
# Settings by which an adapter changes weights beyond scale * B A.
_UNSUPPORTED_SETTINGS = (
    "use_dora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "use_qalora",
    "corda_config",
    "trainable_token_indices",
)
_A_SUFFIX, _B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


def is_adapter(path: str) -> bool:
    """Return whether the directory holds a PEFT adapter."""
    return os.path.exists(os.path.join(path, ADAPTER_CONFIG))


@dataclass(slots=True)
class Adapter:
    """A LoRA adapter; its modules are named as in the base model."""

    weights: Checkpoint
    scale: dict[str, float]
    """Scale of B A, by module."""
    fan_in_fan_out: bool
    """Whether the base stores weights as (inputs, outputs), as GPT-2's Conv1D does."""

    @property
    def path(self) -> str:
        """Return the directory of the adapter."""
        return self.weights.path

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of `adapter_config.json`."""
        return self.weights.config

    def modules(self) -> list[str]:
        """Return the names of the adapted modules, in file order."""
        return list(self.scale)

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape (m, n) of a module's delta."""
        m = self.weights.specs[f"{_PREFIX}{module}{_B_SUFFIX}"].shape[0]
        n = self.weights.specs[f"{_PREFIX}{module}{_A_SUFFIX}"].shape[1]
        return m, n

    def rank(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return self.weights.specs[f"{_PREFIX}{module}{_A_SUFFIX}"].shape[0]

    def spec(self, module: str) -> TensorSpec:
        """Return the spec of a module's B, whose dtype is that of the output."""
        return self.weights.specs[f"{_PREFIX}{module}{_B_SUFFIX}"]

    def factors(self, module: str, dtype: torch.dtype, device: str = "cpu") -> Factors:
        """Return the delta of a module as factors (m, r) and (r, n), scaled on the left."""
        # Converted before scaling: in bf16 the product would be rounded to 8 bits.
        left = self.weights.read(f"{_PREFIX}{module}{_B_SUFFIX}").to(device, dtype)
        right = self.weights.read(f"{_PREFIX}{module}{_A_SUFFIX}").to(device, dtype)
        return Factors(left * self.scale[module], right)

    def delta(self, module: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Return the delta of a module's weight in the base's orientation, (m, n) or (n, m)."""
        dense = self.factors(module, dtype, device).dense()
        return dense.T if self.fan_in_fan_out else dense


def open_adapter(path: str, field_path: str) -> Adapter:
    """Return the adapter in the directory `path`.

    Raises:
        MergeError: If it is not a LoRA adapter, or changes more than low-rank factors express.
    """
    check_directory(path, field_path)
    config = read_json(os.path.join(path, ADAPTER_CONFIG), field_path)
    _check_supported(config, path, field_path)
    if not os.path.exists(os.path.join(path, ADAPTER_WEIGHTS)):
        raise MergeError.at(
            field_path, path, f"holds no {ADAPTER_WEIGHTS}", fix="Save it with PEFT as safetensors"
        )
    specs = file_specs(os.path.join(path, ADAPTER_WEIGHTS), field_path)
    modules = [
        name.removeprefix(_PREFIX).removesuffix(_B_SUFFIX)
        for name in specs
        if name.endswith(_B_SUFFIX)
    ]
    expected = {f"{_PREFIX}{module}{end}" for module in modules for end in (_A_SUFFIX, _B_SUFFIX)}
    # The symmetric difference holds both foreign tensors and A without B or B without A.
    unexpected = sorted(set(specs) ^ expected)
    if unexpected or not modules:
        raise MergeError.at(
            field_path,
            path,
            f"holds {unexpected[0]!r}, which is no LoRA factor of a linear layer"
            if unexpected
            else "empty",
            fix="Merge it into its base with PEFT, and merge the models",
        )
    adapter = Adapter(Checkpoint(path, config, specs), {}, bool(config.get("fan_in_fan_out")))
    for module in modules:
        # The rank of the file, not `r` of the configuration: rank_pattern overrides it by module.
        rank = adapter.rank(module)
        if specs[f"{_PREFIX}{module}{_B_SUFFIX}"].shape[1:] != (rank,):
            raise MergeError.at(
                field_path,
                path,
                f"the factors of {module} do not fit each other",
                fix="Download it again",
            )
        alpha = _match_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        adapter.scale[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return adapter


def _check_supported(config: dict[str, Any], path: str, field_path: str) -> None:
    """Raise MergeError unless the adapter is plain LoRA on linear layers."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise MergeError.at(
            field_path, path, f"an adapter of type {peft_type}", allowed="Only LORA can be merged"
        )
    for key in _UNSUPPORTED_SETTINGS:
        # PEFT writes all keys; None, False, "none" and empty lists mean that a setting is off.
        if config.get(key) not in (None, False, "none") and config[key]:
            raise MergeError.at(
                field_path,
                path,
                f"its {key} is {config[key]!r}: it changes more than low-rank factors express",
                fix="Merge it into its base with PEFT, and merge the models",
            )


def _match_pattern(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's name."""
    # PEFT's own expression (get_pattern_key), so the same entry wins as in training.
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)


def adapter_tensors(module: str) -> tuple[str, str]:
    """Return the tensor names of a module's A and B in an adapter's file."""
    return f"{_PREFIX}{module}{_A_SUFFIX}", f"{_PREFIX}{module}{_B_SUFFIX}"


def merged_config(adapters: list[Adapter], ranks: dict[str, int]) -> str:
    """Return the text of a merged adapter's configuration.

    The scale is 1 (alpha = r) for all modules, and each module has its own rank.
    """
    config = dict(adapters[0].config)
    max_rank = max(ranks.values())
    # The scales are in the merged factors already, so alpha / r must be 1 and rslora off.
    config |= {
        "r": max_rank,
        "lora_alpha": max_rank,
        "use_rslora": False,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != max_rank},
        "alpha_pattern": {module: rank for module, rank in ranks.items() if rank != max_rank},
        "target_modules": sorted(ranks),
        "inference_mode": True,
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
