"""Every family of transformers is measured as one backward pass per piece measures it."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from raymix.signals import GradientProbe, PieceGram

K, LENGTH, VOCAB = 3, 12, 64
LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
HEADS = {**LLAMA, "head_dim": 8}
MOE = {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
EXPERTS = ("experts.down_proj", "experts.gate_up_proj")
MAMBA = ("A_log", "D", "conv1d.bias", "conv1d.weight")
# Configuration, and the ends of the names of the parameters measured by running a module again.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": (LLAMA, ()),
    "qwen2": (LLAMA, ()),
    "qwen3": (HEADS, ()),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}, ()),
    "gpt_neox": ({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, ()),
    "phi3": (LLAMA, ()),
    "gemma": (HEADS, ()),
    "gemma2": ({**HEADS, "query_pre_attn_scalar": 8}, ()),
    "gemma3_text": ({**HEADS, "query_pre_attn_scalar": 8}, ()),
    "olmo2": (LLAMA, ()),
    "granite": (LLAMA, ()),
    "mixtral": ({**LLAMA, "num_local_experts": 4}, EXPERTS),
    "qwen3_moe": (MOE, EXPERTS),
    "olmoe": ({**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, EXPERTS),
    "gpt_oss": (
        {
            **HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (*EXPERTS, *(f"{name}_bias" for name in EXPERTS), "self_attn.sinks"),
    ),
    "qwen3_next": (
        {
            **MOE,
            "shared_expert_intermediate_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        (*EXPERTS, "A_log", "conv1d.weight", "linear_attn.norm.weight"),
    ),
    "lfm2": (
        {**LLAMA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        ("conv.conv.weight",),
    ),
    "falcon_h1": (
        {
            **HEADS,
            "mamba_d_ssm": 16,
            "mamba_n_heads": 2,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        MAMBA,
    ),
    "mamba": (
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        (*MAMBA, "dt_proj.bias", "dt_proj.weight"),
    ),
    "mamba2": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        MAMBA,
    ),
    "deepseek_v3": (
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
        EXPERTS,
    ),
}
# Float32 inside: norms of gemma, delta rules of qwen3_next, routers of deepseek.
ROUNDED = {"gemma", "gemma2", "gemma3_text", "qwen3_next", "deepseek_v3"}
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
PIECE_B = torch.tensor([0, 1, 2, 3, 4, 5, 0, 3, -1, 4])


def family(kind: str, *, dtype: torch.dtype = torch.float64, experts: str = "eager") -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    options = {"bos_token_id": 0, "eos_token_id": 1, **FAMILIES[kind][0]}
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, **options)
    config._experts_implementation = experts
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    for module in model.modules():  # no dropout: two passes must agree
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():  # biases and norms that do something
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def rows(piece_B: torch.Tensor = PIECE_B) -> Batch:
    """Return rows of two documents each, whose tokens tell the groups apart."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (len(piece_B), LENGTH), generator=generator)
    tokens = tokens + 4 * (piece_B.clamp(min=0) % K)[:, None]
    positions = (torch.arange(LENGTH) % 7).repeat(len(piece_B), 1)
    labels = functional.pad(tokens[:, 1:], (0, 1), value=-100)
    labels[:, 6] = -100
    return tokens, positions, labels


def relative_error(ours: PieceGram, theirs: PieceGram) -> float:
    """Return the largest difference of two matrices, relative to the lengths of the pieces."""
    length_P = np.sqrt(np.diagonal(theirs.gram_PP))
    return float((np.abs(ours.gram_PP - theirs.gram_PP) / np.outer(length_P, length_P)).max())


def explicit(probe: GradientProbe, batch: Batch, piece: int) -> tuple[float, dict[str, Any]]:
    """Return the squared gradient norm of a piece, by `.grad`, and the gradients of all rows."""
    module = probe.loss_module
    own = piece == PIECE_B
    module(*(part[own] for part in batch))[0].backward()
    norm2 = sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None)
    module.zero_grad()
    module(*batch)[0].backward()
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return norm2, named


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_measured_as_by_one_pass_per_piece(kind: str) -> None:
    model, batch = family(kind), rows()
    tolerance = 1e-6 if kind in ROUNDED else 1e-12
    (expected,) = GradientProbe(model, n_groups=K, mode="backward").measure(*batch, PIECE_B)
    probe = GradientProbe(model, n_groups=K)
    norm2, plain = explicit(probe, batch, 3)
    assert expected.gram_PP[3, 3] == pytest.approx(norm2, rel=tolerance)
    (measured,) = probe.measure(*batch, PIECE_B)
    assert relative_error(measured, expected) < tolerance
    assert all(parameter.grad is None for parameter in model.parameters())
    with probe.recording(PIECE_B, scale=0.5) as recording:
        (probe.loss_module(*batch)[0] * 0.5).backward()
    assert relative_error(recording.pieces, expected) < tolerance
    for name, parameter in probe.loss_module.named_parameters():
        torch.testing.assert_close(2 * parameter.grad, plain[name], rtol=1e-5, atol=1e-6)
    ends = FAMILIES[kind][1]
    assert all(name.endswith(ends) for name in probe.by_backward)
    assert all(any(name.endswith(end) for name in probe.by_backward) for end in ends)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_next", "gpt_oss"])
def test_grouped_experts_in_float32_under_checkpointing(kind: str) -> None:
    model = family(kind, dtype=torch.float32, experts="grouped_mm")
    (expected,) = GradientProbe(model, n_groups=K, mode="backward").measure(*rows(), PIECE_B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    probe = GradientProbe(model, n_groups=K)
    with probe.recording(PIECE_B) as recording:
        probe.loss_module(*rows())[0].backward()
    assert relative_error(recording.pieces, expected) < 1e-5
    (measured,) = probe.measure(*rows(), PIECE_B)
    assert relative_error(measured, expected) < 1e-5


def test_a_line_names_what_is_measured_by_backward(caplog: pytest.LogCaptureFixture) -> None:
    probe = GradientProbe(family("mixtral"), n_groups=K)
    assert probe.by_backward == ()
    with caplog.at_level(logging.WARNING, "raymix.signals"):
        probe.measure(*rows(), PIECE_B, passes=2)
    (record,) = [record for record in caplog.records if record.name == "raymix.signals"]
    assert "model.layers.*.mlp.experts.gate_up_proj (2)" in record.getMessage()
    assert probe.by_backward == tuple(
        f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in EXPERTS
    )
