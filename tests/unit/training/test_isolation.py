"""Documents of one row do not see each other, in any architecture of the installed transformers.

The reference is each document alone, through the model as transformers runs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from raymix.errors import RecipeError
from raymix.recipe import ConfigModel, Recipe
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model, resolve_config
from raymix.training.model.loss import IGNORED, PackedLoss
from raymix.training.model.row_inputs import document_rows
from raymix.training.model.traits import probe_model
from raymix.training.plan.model_checks import check_traits, model_notes
from raymix.training.plan.small_model import small_models

FACTS = CorpusFacts(vocab_size=97, eos_id=96, sequence_length=32)
NARROW: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LFM2 = {**NARROW, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
FALCON_H1 = {**NARROW, "num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4,
             "mamba_d_head": 16, "mamba_d_state": 8}  # fmt: skip
JAMBA = {**NARROW, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4,
         "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}  # fmt: skip

# By positions alone, whatever the size is that transformers makes them by default.
POSITIONS = [
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi", "phi3", "gpt2", "gpt_neox", "gptj",
    "gpt_neo", "gemma", "gemma2", "gemma3_text", "mixtral", "olmo2", "olmo3", "olmoe", "granite",
    "smollm3", "glm4", "cohere2", "deepseek_v3", "llama4_text",
]  # fmt: skip
MASKS = ["opt", "falcon", "mpt", "gpt_oss", "biogpt"]
ROWS = [
    "bloom", "mamba", "mamba2", "rwkv", "bamba", "falcon_h1", "jamba", "granitemoehybrid",
    "qwen3_next", "falcon_mamba", "recurrent_gemma",
]  # fmt: skip


def recipe(model: dict[str, Any], mode: str = "packed", **sections: Any) -> Recipe:
    data = {"mode": mode, "sequence_length": 32}
    data |= {"rows_per_step": 2} if mode == "packed" else {"tokens_per_step": 64}
    document = {"name": "run", "corpus": {"path": "/nowhere"}, "model": model, "data": data,
                "train": {"steps": 4}}  # fmt: skip
    return Recipe.model_validate({**document, **sections})


def small(kind: str, config: dict[str, Any] | None = None) -> Any:
    return next(small_models(resolve_config(ConfigModel(type=kind, config=config or {}), FACTS)))


@pytest.mark.parametrize("kind", [*POSITIONS, *MASKS])
def test_documents_can_be_packed(kind: str) -> None:
    assert model_notes(recipe({"type": kind}), FACTS, frozenset()) == ()


@pytest.mark.parametrize("kind", ROWS)
def test_documents_of_the_rest_are_rows_of_their_own(kind: str) -> None:
    with pytest.raises(RecipeError, match=r"model\.type.*documents packed.*data\.mode: documents"):
        model_notes(recipe({"type": kind}), FACTS, frozenset())
    (note,) = model_notes(recipe({"type": kind}, "documents"), FACTS, frozenset())
    assert "each is a row of its own" in note


@pytest.mark.parametrize(
    ("kind", "config"), [("lfm2", LFM2), ("falcon_h1", FALCON_H1), ("jamba", JAMBA)]
)
def test_leaks_that_small_weights_hide(kind: str, config: dict[str, Any]) -> None:
    model = ConfigModel(type=kind, config=config)
    # At the initial weights logits change by less than 1e-3.
    assert not probe_model(build_model(model, FACTS, seed=0)).isolates_documents
    with pytest.raises(RecipeError, match="would see each other"):
        model_notes(recipe({"type": kind, "config": config}), FACTS, frozenset())


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 4}),
    ("llama4_text", {}),
    ("opt", {}),
    ("falcon", {}),
    ("mpt", {}),
    ("gpt_oss", {}),
    ("bloom", {}),
    ("mamba", {}),
    ("mamba2", {}),
    ("rwkv", {}),
    ("lfm2", LFM2),
    ("granitemoehybrid", {}),
    ("qwen3_next", {}),
    ("jamba", JAMBA),
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=[kind for kind, _ in CASES])
def test_losses_and_gradients_are_those_of_documents_alone(
    kind: str, config: dict[str, Any]
) -> None:
    model: Any = small(kind, config).eval()
    traits = probe_model(model)
    loss = PackedLoss(model, linear_head=traits.linear_head, isolation=traits.isolation)
    rows = ((9, 1, 6), (3, 11, 2))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (2, 16)))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    labels = tokens.roll(-1, dims=1)
    labels[:, :-1][positions[:, 1:] == 0] = IGNORED
    labels[:, -1] = IGNORED
    total, each = loss(tokens, positions, labels)
    total.backward()
    packed = gradients(model)
    model.zero_grad()
    alone = []
    for row, lengths in zip(tokens, rows, strict=True):
        for document in row.split(list(lengths)):
            logits = model(input_ids=document[None], use_cache=False).logits[0].float()
            part = functional.cross_entropy(logits[:-1], document[1:], reduction="none")
            part.sum().backward()
            alone.append(functional.pad(part.detach(), (0, 1)))
    torch.testing.assert_close(each.flatten(), torch.cat(alone), rtol=1e-4, atol=1e-4)
    reference = gradients(model)
    largest = max(float(gradient.abs().max()) for gradient in reference.values())
    for name, gradient in reference.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_padding_is_less_than_half() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 200, 60)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
    places = []
    padded = 0
    for place, inside in document_rows(positions):
        padded += place.numel()
        places.append(place[inside])
    assert torch.equal(torch.cat(places).sort().values, torch.arange(int(lengths.sum())))
    assert padded < 2 * lengths.sum()


def test_a_model_that_sees_the_answer_is_refused() -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    used = recipe({"type": "bert", "config": config}, "documents")
    with pytest.raises(RecipeError, match=r"'bert': tokens see those after them"):
        model_notes(used, FACTS, frozenset())
    used = recipe({"type": "bert", "config": {**config, "is_decoder": True}}, "documents")
    model_notes(used, FACTS, frozenset())


@pytest.mark.parametrize(
    ("sections", "needs", "says"),
    [
        (
            {"train": {"steps": 4, "parallel": "fsdp2"}, "cluster": {"workers": 2}},
            frozenset(),
            r"train\.parallel = 'fsdp2'",
        ),
        ({}, frozenset({"gram"}), r"mixer\.kind.*gradients"),
    ],
)
def test_what_rows_of_their_own_exclude(
    sections: dict[str, Any], needs: frozenset[str], says: str
) -> None:
    traits = probe_model(small("bloom"))
    with pytest.raises(RecipeError, match=says):
        check_traits(traits, recipe({"type": "bloom"}, "documents", **sections), needs, "bloom")


def test_capped_logits_are_not_those_of_the_head() -> None:
    # Of a small new model they differ by 1e-5 at most.
    config = {**NARROW, "num_hidden_layers": 1, "head_dim": 16}
    model = build_model(ConfigModel(type="gemma2", config=config), FACTS, seed=0)
    assert not probe_model(model).linear_head
