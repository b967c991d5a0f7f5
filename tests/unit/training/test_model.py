"""Models from configurations, documents kept apart in packed rows, and the loss in pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from raymix.errors import RecipeError
from raymix.recipe import ConfigModel, PretrainedModel
from raymix.training.model.hf_model import (
    CorpusFacts,
    build_model,
    load_model,
    measure_model,
    model_size,
    resolve_config,
)
from raymix.training.model.loss import IGNORED, PackedLoss
from raymix.training.model.traits import probe_model

FACTS = CorpusFacts(vocab_size=61, eos_id=60, sequence_length=32)
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "mistral": LLAMA,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}


def tiny(kind: str = "llama", **changes: Any) -> ConfigModel:
    return ConfigModel(type=kind, config=SIZES[kind] | changes)


def loss_module(kind: str = "llama", **options: Any) -> PackedLoss:
    model = build_model(tiny(kind), FACTS, seed=3)
    return PackedLoss(model, linear_head=True, **options)


def packed(lengths: Sequence[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    tokens = torch.from_numpy(generator.integers(0, 60, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return tokens[None], positions[None]


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_documents_in_a_row_are_as_if_alone(kind: str) -> None:
    model = build_model(tiny(kind), FACTS, seed=1).eval()
    lengths = (9, 1, 14, 8)
    tokens, positions = packed(lengths)
    with torch.no_grad():
        row = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0]
        alone = [
            model(input_ids=document, use_cache=False).logits[0]
            for document in tokens.split(lengths, dim=1)
        ]
    torch.testing.assert_close(row, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_probe_tells_models_that_mix_documents() -> None:
    assert probe_model(build_model(tiny(), FACTS, seed=1)).isolates_documents
    mixing = ConfigModel(type="bloom", config={"hidden_size": 16, "n_layer": 1, "n_head": 2})
    assert not probe_model(build_model(mixing, FACTS, seed=1)).isolates_documents


def test_probe_tells_models_that_scale_their_logits() -> None:
    scaled = ConfigModel(type="cohere", config=LLAMA | {"logit_scale": 0.25})
    assert not probe_model(build_model(scaled, FACTS, seed=1)).linear_head
    assert probe_model(build_model(tiny("gpt2"), FACTS, seed=1)).linear_head


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_follow_from_the_seed_alone(kind: str) -> None:
    torch.manual_seed(1)
    first = build_model(tiny(kind), FACTS, seed=7).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = build_model(tiny(kind), FACTS, seed=7).state_dict()
    other = build_model(tiny(kind), FACTS, seed=8).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_vocabulary_and_end_come_from_the_corpus() -> None:
    config = resolve_config(tiny(), CorpusFacts(61, 60, 4096))
    assert (config.vocab_size, config.eos_token_id) == (61, 60)
    assert config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (ConfigModel(type="lama"), ("model.type", "'lama'", "llama")),
        (ConfigModel(type="bert-of-mine"), ("model.type", "bert-of-mine")),
        (tiny(hiden_size=8), ("model.config.hiden_size", "hidden_size")),
        (
            ConfigModel(type="qwen3_moe", config={"head_dims": 8}),
            ("model.config.head_dims", "head_dim"),
        ),
        (tiny(hidden_size="wide"), ("model.config", "hidden_size", "wide")),
        (tiny(num_attention_heads=3), ("model.config", "heads")),
        (tiny(vocab_size=50), ("model.config.vocab_size", "50", "61")),
        (tiny(max_position_embeddings=16), ("data.sequence_length", "32", "16")),
        (PretrainedModel(kind="pretrained", path="/nowhere"), ("model.path", "config.json")),
    ],
)
def test_what_cannot_work_is_named(
    model: ConfigModel | PretrainedModel, says: Sequence[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        build_model(model, FACTS, seed=0)
    for words in says:
        assert words in str(caught.value)


def test_fields_that_only_the_source_reads() -> None:
    sizes = {**LLAMA, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    shapes = []
    for changes in ({}, {"head_dim": 4}):
        model = ConfigModel(type="qwen3_moe", config={**sizes, **changes})
        shapes.append(build_model(model, FACTS, seed=0).state_dict())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert [tuple(weights[name].shape) for weights in shapes] == [(16, 16), (8, 16)]


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    build_model(tiny(), FACTS, seed=0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(RecipeError, match=r"model.path.*cannot be loaded"):
        load_model(tmp_path)


def test_a_saved_model_loads_bit_for_bit(tmp_path: Path) -> None:
    model = build_model(tiny("qwen3"), FACTS, seed=0)
    model.save_pretrained(tmp_path)
    config = PretrainedModel(kind="pretrained", path=str(tmp_path))
    loaded = build_model(config, FACTS, seed=99).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_size_is_counted_without_weights() -> None:
    model = build_model(tiny(), FACTS, seed=0)
    size = model_size(tiny(), FACTS)
    assert size == measure_model(model, FACTS.sequence_length)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    tied = model_size(tiny(tie_word_embeddings=True), FACTS)
    # Tied or not, the head multiplies: only the table that is looked up costs nothing.
    assert tied.flops_per_token == size.flops_per_token
    assert tied.parameters == size.parameters - 61 * 16


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_is_the_sum_over_labels(kind: str) -> None:
    module = loss_module(kind).eval()
    tokens, positions = packed((20, 12))
    labels = tokens.roll(-1, dims=1)
    labels[0, [19, 31]] = IGNORED
    total, each = module(tokens, positions, labels)
    logits = module.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    expected = functional.cross_entropy(logits[0], labels[0], reduction="none")
    torch.testing.assert_close(each[0], expected.detach())
    assert float(each[0, [19, 31]].sum()) == 0
    torch.testing.assert_close(total, expected.sum())
    assert math.isclose(total.item() / 30, math.log(61), rel_tol=0.2)


def test_loss_in_pieces_has_the_same_gradient() -> None:
    tokens, positions = packed((100, 70, 86))
    labels = tokens.roll(-1, dims=1)
    gradients = []
    for logit_bytes in (1 << 28, 4 * 61 * 64):  # at once; 64 tokens at a time
        module = loss_module(logit_bytes=logit_bytes)
        total, _ = module(tokens, positions, labels)
        total.backward()
        gradients.append([total.detach(), *(p.grad for p in module.parameters())])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-5, atol=1e-5)


def test_pieces_bound_the_logits_alive() -> None:
    largest = 0

    def look(module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel() * output.element_size())

    module = loss_module(logit_bytes=4 * 61 * 64)
    head = module.model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(look)
    tokens, positions = packed((300, 212))
    module(tokens, positions, tokens)[0].backward()
    assert largest == 4 * 61 * 64
