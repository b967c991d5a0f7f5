"""PEFT LoRA adapters: read as factors, applied to a base, and written again.

Delta of a module: scale * B A with B (m, r), A (r, n) and scale = alpha / r, or alpha / sqrt(r)
with rank-stabilized LoRA; ranks and alphas may differ by module. What changes more than that
(DoRA, biases, whole modules) is refused rather than merged wrongly.
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

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings by which an adapter changes more than its factors say.
_BEYOND = (
    "use_dora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "use_qalora",
    "corda_config",
    "trainable_token_indices",
)
_A, _B = ".lora_A.weight", ".lora_B.weight"


def is_adapter(path: str) -> bool:
    """Return whether the directory holds a PEFT adapter."""
    return os.path.exists(os.path.join(path, CONFIG))


@dataclass(slots=True)
class Adapter:
    """A LoRA adapter; its modules are named as in the base model."""

    weights: Checkpoint
    scale: dict[str, float]
    """Module to the factor of B A."""
    fan_in_fan_out: bool

    @property
    def path(self) -> str:
        """Return its directory."""
        return self.weights.path

    @property
    def config(self) -> dict[str, Any]:
        """Return its configuration."""
        return self.weights.config

    def modules(self) -> list[str]:
        """Return the modules that it changes, in file order."""
        return list(self.scale)

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape (m, n) of a module's delta."""
        m = self.weights.specs[f"{_PREFIX}{module}{_B}"].shape[0]
        n = self.weights.specs[f"{_PREFIX}{module}{_A}"].shape[1]
        return m, n

    def rank(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return self.weights.specs[f"{_PREFIX}{module}{_A}"].shape[0]

    def spec(self, module: str) -> TensorSpec:
        """Return the spec of a module's B: its dtype is that of the output."""
        return self.weights.specs[f"{_PREFIX}{module}{_B}"]

    def factors(self, module: str, dtype: torch.dtype, device: str = "cpu") -> Factors:
        """Return the delta of a module in factored form, its scale in the left factor."""
        left = self.weights.read(f"{_PREFIX}{module}{_B}").to(device, dtype)
        right = self.weights.read(f"{_PREFIX}{module}{_A}").to(device, dtype)
        return Factors(left * self.scale[module], right)

    def delta(self, module: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Return the delta of a module's weight, as the base stores it."""
        dense = self.factors(module, dtype, device).dense()
        return dense.T if self.fan_in_fan_out else dense


def open_adapter(path: str, field_path: str) -> Adapter:
    """Return the adapter in the directory `path`.

    Raises:
        MergeError: If it is no LoRA, or changes more than factors can say.
    """
    check_directory(path, field_path)
    config = read_json(os.path.join(path, CONFIG), field_path)
    _check(config, path, field_path)
    if not os.path.exists(os.path.join(path, WEIGHTS)):
        raise MergeError.at(
            field_path, path, f"holds no {WEIGHTS}", fix="Save it again with PEFT, as safetensors"
        )
    specs = file_specs(os.path.join(path, WEIGHTS), field_path)
    modules = [name.removeprefix(_PREFIX).removesuffix(_B) for name in specs if name.endswith(_B)]
    known = {f"{_PREFIX}{module}{end}" for module in modules for end in (_A, _B)}
    other = sorted(set(specs) ^ known)
    if other or not modules:
        raise MergeError.at(
            field_path,
            path,
            f"holds {other[0]!r}, which is no LoRA factor of a linear layer" if other else "empty",
            fix="Merge it into its base with PEFT, and merge the models",
        )
    found = Adapter(Checkpoint(path, config, specs), {}, bool(config.get("fan_in_fan_out")))
    for module in modules:
        rank = found.rank(module)
        if specs[f"{_PREFIX}{module}{_B}"].shape[1:] != (rank,):
            raise MergeError.at(
                field_path,
                path,
                f"the factors of {module} do not fit each other",
                fix="Download it again",
            )
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        found.scale[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


def _check(config: dict[str, Any], path: str, field_path: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MergeError.at(field_path, path, f"an adapter of type {kind}, and only LORA is merged")
    for key in _BEYOND:
        if config.get(key) not in (None, False, "none") and config[key]:
            raise MergeError.at(
                field_path,
                path,
                f"its {key} is {config[key]!r}: it changes more than low-rank factors say",
                fix="Merge it into its base with PEFT, and merge the models",
            )


def _by_pattern(patterns: dict[str, Any] | None, module: str, otherwise: float) -> float:
    """Return the value of the first pattern that a module's name ends with, as PEFT matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(otherwise)


def adapter_tensors(module: str) -> tuple[str, str]:
    """Return the names of a module's A and B in an adapter's file."""
    return f"{_PREFIX}{module}{_A}", f"{_PREFIX}{module}{_B}"


def merged_config(adapters: list[Adapter], ranks: dict[str, int]) -> str:
    """Return the configuration of a merged adapter: scale 1, each module its own rank."""
    config = dict(adapters[0].config)
    most = max(ranks.values())
    config |= {
        "r": most,
        "lora_alpha": most,
        "use_rslora": False,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != most},
        "alpha_pattern": {module: rank for module, rank in ranks.items() if rank != most},
        "target_modules": sorted(ranks),
        "inference_mode": True,
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
