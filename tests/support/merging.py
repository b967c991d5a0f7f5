"""Tiny model families in the Hugging Face layout, written without transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, MLP, LAYERS, VOCAB = 16, 24, 3, 40

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"


def shapes() -> dict[str, tuple[int, ...]]:
    shapes_by_name: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes_by_name |= {
            f"{at}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{at}.mlp.up_proj.weight": (MLP, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, MLP),
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes_by_name | {NORM: (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def weights(number: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the base's weights (number 0), or those of a fine-tune of it."""
    base, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(100 + number)
    tensors = {}
    for name, shape in shapes().items():
        weight = torch.randn(shape, generator=base) * 0.1 + (1.0 if len(shape) == 1 else 0.0)
        if number:
            weight += torch.randn(shape, generator=own) * 0.02
        tensors[name] = weight.to(dtype)
    return tensors


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, int] | None = None,
    shards: int = 1,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for at in range(shards):
            file = f"model-{at + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[at::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if vocabulary is not None:
        model = {"type": "BPE", "vocab": dict(vocabulary), "merges": []}
        document = {"version": "1.0", "added_tokens": [], "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def write_family(
    folder: Path, tasks: int = 3, dtype: torch.dtype = torch.float32, **how: Any
) -> dict[str, Any]:
    """Write base, m1, m2, ... and return a merge file of them, without its method."""
    write_model(folder / "base", weights(0, dtype), **how)
    for number in range(1, tasks + 1):
        write_model(folder / f"m{number}", weights(number, dtype), **how)
    return {
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"m{number}")} for number in range(1, tasks + 1)],
    }


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    alpha: float = 8,
    base: str = "base",
    **config: Any,
) -> Path:
    """Write a PEFT adapter: module to (B, A)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (left, right) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = left.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = next(iter(factors.values()))[1].shape[0]
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        "bias": "none",
        "fan_in_fan_out": False,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def read_model(folder: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a merged model, by the library's own loader."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def digests(folder: str | Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a directory."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
