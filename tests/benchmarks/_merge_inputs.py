"""Synthetic families of checkpoints for the merge benchmark: a base and fine-tunes of it.

Each fine-tune's delta is a decaying part of rank 32 plus dense noise: the spectrum that full
fine-tuning leaves, nearly of full rank at a tolerance of 1e-2. Weights are bf16, written tensor by
tensor in files of a few hundred MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_RANK = 32
_SHARD = 450_000_000


@dataclass(frozen=True)
class Size:
    """The shapes of a Llama-like model."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        kv = self.hidden // self.heads * self.kv_heads
        shapes_by_name: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden)
        }
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes_by_name |= {
                f"{at}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{at}.self_attn.k_proj.weight": (kv, self.hidden),
                f"{at}.self_attn.v_proj.weight": (kv, self.hidden),
                f"{at}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{at}.mlp.gate_proj.weight": (self.mlp, self.hidden),
                f"{at}.mlp.up_proj.weight": (self.mlp, self.hidden),
                f"{at}.mlp.down_proj.weight": (self.hidden, self.mlp),
                f"{at}.input_layernorm.weight": (self.hidden,),
                f"{at}.post_attention_layernorm.weight": (self.hidden,),
            }
        shapes_by_name["model.norm.weight"] = (self.hidden,)
        return shapes_by_name


SMALL = Size(768, 12, 2048, 12, 12, 16_000)
"""97 M parameters, 194 MB in bf16."""
WIDE = Size(4096, 2, 11_008, 32, 32, 8_000)
"""The widths of a 7B model: 2 of its layers, 809 MB for them in bf16."""


def write_family(folder: Path, size: Size, tasks: int) -> list[Path]:
    """Write a base and `tasks` fine-tunes and return their directories, the base first."""
    folders = [folder / "base", *(folder / f"task{k}" for k in range(tasks))]
    for number, place in enumerate(folders):
        if not (place / "config.json").exists():
            _write(place, size, number)
    return folders


def _write(place: Path, size: Size, number: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    shard_bytes, files = 0, 0
    for name, tensor in _tensors(size, number):
        n_bytes = tensor.numel() * tensor.element_size()
        if shard and shard_bytes + n_bytes > _SHARD:
            save_file(shard, place / f"part-{files}.safetensors", metadata={"format": "pt"})
            shard, shard_bytes, files = {}, 0, files + 1
        shard[name] = tensor
        weight_map[name] = f"part-{files}.safetensors"
        shard_bytes += n_bytes
    if files:
        save_file(shard, place / f"part-{files}.safetensors", metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(shard, place / "model.safetensors", metadata={"format": "pt"})
    # Last: a directory that has it is complete.
    (place / "config.json").write_text(json.dumps(size.config()))


def task_delta(size: Size, name: str, number: int) -> Tensor:
    """Return the delta of one parameter of a fine-tune as it is stored, in fp32."""
    at = list(size.shapes()).index(name)
    shape = size.shapes()[name]
    return _tensor(at, shape, number).float() - _tensor(at, shape, 0).float()


def _tensors(size: Size, number: int) -> Iterator[tuple[str, Tensor]]:
    for at, (name, shape) in enumerate(size.shapes().items()):
        yield name, _tensor(at, shape, number)


def _tensor(at: int, shape: tuple[int, ...], number: int) -> Tensor:
    base = torch.Generator().manual_seed(at)
    weight = torch.randn(shape, generator=base) * 0.02 + (1.0 if len(shape) == 1 else 0.0)
    if number:
        own = torch.Generator().manual_seed(1_000_003 * number + at)
        weight += torch.randn(shape, generator=own) * 3e-4
        if len(shape) == 2:
            left = torch.randn(shape[0], _RANK, generator=own) * torch.logspace(0, -1.5, _RANK)
            weight.addmm_(left, torch.randn(_RANK, shape[1], generator=own), alpha=2e-4)
    return weight.bfloat16()
