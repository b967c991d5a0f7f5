"""Directories with more than one set of weights: what `from_pretrained` loads is what is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raymix.errors import MergeError, RecipeError
from raymix.merging.checkpoints.checkpoint import open_checkpoint
from raymix.recipe import ConfigModel
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model, load_model

FACTS = CorpusFacts(61, 60, 16)
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
INDEX = "model.safetensors.index.json"
NAME = "model.embed_tokens.weight"


def save(folder: Path, seed: int, **options: Any) -> None:
    model = ConfigModel(type="llama", config=dict(SIZES))
    build_model(model, FACTS, seed=seed).save_pretrained(folder, **options)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def both(folder: Path) -> None:
    save(folder, 2, max_shard_size="4KB")
    save(folder / "whole", 1)
    (folder / "whole" / "model.safetensors").rename(folder / "model.safetensors")


def shards_gone(folder: Path) -> None:
    both(folder)
    for shard in shards(folder):
        shard.unlink()


def stale_shard(folder: Path) -> None:
    save(folder, 1, max_shard_size="4KB")
    save(folder / "old", 2)
    (folder / "old" / "model.safetensors").rename(folder / "model-00009-of-00009.safetensors")


def consolidated(folder: Path) -> None:
    save(folder, 1)
    save(folder / "other", 2)
    (folder / "other" / "model.safetensors").rename(folder / "consolidated.safetensors")


def pickle_beside(folder: Path) -> None:
    save(folder, 1)
    torch.save({NAME: torch.zeros(61, 16)}, folder / "pytorch_model.bin")


def in_two_shards(folder: Path) -> None:
    save(folder, 1, max_shard_size="4KB")
    rewrite(shards(folder)[-1], lambda tensors: tensors.update({NAME: torch.ones(61, 16)}))


def not_in_the_index(folder: Path) -> None:
    save(folder, 1, max_shard_size="4KB")
    index = json.loads((folder / INDEX).read_text())
    # Its shard has other tensors, too.
    del index["weight_map"]["model.layers.0.input_layernorm.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def named_in_the_config(folder: Path) -> None:
    consolidated(folder)
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "consolidated.safetensors"
    (folder / "config.json").write_text(json.dumps(config))


def variant(folder: Path) -> None:
    save(folder, 1)
    save(folder / "other", 2)
    (folder / "other" / "model.safetensors").rename(folder / "model.fp16.safetensors")


@pytest.mark.parametrize(
    "make",
    [both, shards_gone, stale_shard, consolidated, pickle_beside, in_two_shards, not_in_the_index,
     named_in_the_config, variant],
)  # fmt: skip
def test_a_directory_is_read_as_transformers_reads_it(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    checkpoint = open_checkpoint(str(tmp_path), "models.0.model")
    assert checkpoint.specs.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in expected)
    trained = load_model(tmp_path).state_dict()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def without_a_tensor(folder: Path) -> None:
    save(folder, 1)
    rewrite(folder / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))


def without_a_tensor_of_the_index(folder: Path) -> None:
    save(folder, 1, max_shard_size="4KB")
    for shard in shards(folder):
        rewrite(shard, lambda tensors: tensors.pop("lm_head.weight", None))


@pytest.mark.parametrize("make", [without_a_tensor, without_a_tensor_of_the_index])
def test_weights_that_transformers_would_draw_at_random(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.path.*lack 'lm_head.weight'"):
        load_model(tmp_path)
    if make is without_a_tensor_of_the_index:
        with pytest.raises(MergeError, match=r"puts 'lm_head.weight' in"):
            open_checkpoint(str(tmp_path), "models.0.model")


def test_a_configuration_cannot_name_weights_outside(tmp_path: Path) -> None:
    named_in_the_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["transformers_weights"] = "../other.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match=r"outside the model's directory"):
        open_checkpoint(str(tmp_path), "models.0.model")
    with pytest.raises(RecipeError, match=r"model\.path"):
        load_model(tmp_path)
