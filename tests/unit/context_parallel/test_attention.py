"""Attention over documents on one rank, and models that run it; ranks together: see e2e."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raymix.context_parallel import (
    ContextParallelGroups,
    DocumentPart,
    LocalShards,
    attending,
    attention,
    heads_fit,
    register,
)
from raymix.context_parallel.kernels import CpuKernel, EfficientKernel, FlashKernel
from raymix.context_parallel.segments import AttentionSegment, AttentionSegments
from raymix.errors import TrainingError
from raymix.streaming.batches.step_batch import LocalDocument
from raymix.training.model.loss import IGNORED
from raymix.training.model.own_attention import switch_attention
from raymix.training.step.documents import ContextParallel, document_micro_steps
from tests.support.attention import Case, dense_attention, random_case

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
GROUPED = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
MODELS = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 64},
    "qwen3": GROUPED | {"head_dim": 16},
    "gpt2": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0},
}


def local(lengths: tuple[int, ...]) -> LocalShards:
    return LocalShards(
        [DocumentPart(length, (0,)) for length in lengths], 0, ContextParallelGroups()
    )


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **MODELS[kind] | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize("seed", range(6))
def test_local_documents_are_attended_to_one_by_one(seed: int) -> None:
    case = random_case(seed, 1)
    rows, grad = case.rows(torch.float64)
    for part in rows:
        part.requires_grad_()
    out, expected = attention(*rows, local(case.lengths)), dense_attention(rows, case.lengths)
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)
    for left, right in zip(
        torch.autograd.grad(out, rows, grad), torch.autograd.grad(expected, rows, grad), strict=True
    ):
        torch.testing.assert_close(left, right, atol=1e-13, rtol=0)


def test_a_segment_sees_the_keys_up_to_its_own() -> None:
    """Queries 5 to 8 of nine, with the keys of all: as the last four rows of the whole."""
    rows, _ = Case((9,), ((0,),), 4, 2, 8).rows(torch.float64)
    whole = dense_attention(rows, [9])
    segments = AttentionSegments([AttentionSegment(0, 4, 0, 9)])
    out, _ = CpuKernel(8**-0.5).forward(rows[0][5:], rows[1], rows[2], segments)
    torch.testing.assert_close(out, whole[5:], atol=1e-13, rtol=0)


def test_offsets_for_kernels_name_rows_where_pieces_share_keys() -> None:
    disjoint = AttentionSegments.of_documents([3, 2]).varlen(torch.device("cpu"))
    assert disjoint.query_offsets.tolist() == disjoint.key_offsets.tolist() == [0, 3, 5]
    assert disjoint.key_rows is None
    shared = AttentionSegments([AttentionSegment(0, 2, 0, 2), AttentionSegment(2, 1, 0, 4)]).varlen(
        torch.device("cpu")
    )
    assert shared.key_rows is not None
    assert shared.key_rows.tolist() == [0, 1, 0, 1, 2, 3]
    assert shared.key_offsets.tolist() == [0, 2, 6]
    assert (shared.max_queries, shared.max_keys) == (2, 4)


def test_kernels_for_gpus_fit_torchs_signatures() -> None:
    """On a device without numbers: what is called is there and takes and gives these shapes."""
    segments = AttentionSegments([AttentionSegment(0, 10, 0, 20), AttentionSegment(10, 7, 0, 37)])
    query = torch.empty(17, 4, 16, device="meta", dtype=torch.bfloat16)
    key = torch.empty(40, 2, 16, device="meta", dtype=torch.bfloat16)
    out, lse = FlashKernel(0.3).forward(query, key, key, segments)
    assert (out.shape, lse.shape) == ((17, 4, 16), (4, 17))
    grads = FlashKernel(0.3).backward(out, (query, key, key, out, lse), segments)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
    out, _ = EfficientKernel(0.3).forward(query, key, key, segments)
    assert out.shape == query.shape


def test_a_row_of_other_tokens_is_refused() -> None:
    rows, _ = Case((9,), ((0,),), 4, 2, 8).rows(torch.float64)
    with pytest.raises(ValueError, match="9 tokens, where the micro-batch has 5"):
        attention(*rows, local((5,)))


@pytest.mark.parametrize("kind", MODELS)
def test_unmodified_models_run_it(kind: str) -> None:
    lengths = (7, 1, 12)
    model = model_of(kind).eval()
    tokens = torch.arange(20)[None] % 50
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    expected = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    assert switch_attention(model, longest=32)
    with attending(local(lengths)):
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    # Outside of a micro-batch it does what it did.
    again = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(again, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"attn_pdrop": 0.1}),
        ("llama", {"attention_dropout": 0.1}),
        ("mistral", {"sliding_window": 16}),
    ],
)
def test_models_that_want_more_keep_their_own(kind: str, changes: dict[str, Any]) -> None:
    model = model_of(kind, **changes)
    assert not switch_attention(model, longest=32)
    assert model.config._attn_implementation == "sdpa"
    assert model.training == model_of(kind).training


def test_a_document_longer_than_the_window_is_refused() -> None:
    model = model_of("mistral", sliding_window=16)
    model.set_attn_implementation(register())
    with attending(local((20,))), pytest.raises(TrainingError, match="a document of 20 tokens"):
        model(input_ids=torch.zeros(1, 20, dtype=torch.int64), use_cache=False)


def test_heads_that_can_be_dealt_out() -> None:
    assert heads_fit(8, 2, 4)
    assert heads_fit(8, 8, 4)
    assert not heads_fit(8, 8, 3)
    assert not heads_fit(12, 3, 2)


def test_labels_are_shifted_in_whole_documents_before_they_are_cut() -> None:
    """Two ranks share six tokens: 0, 1 | 4, 5 and 2, 3; only the answers 2 and 5 are learned."""
    from raymix.training.step.documents import _local_tokens

    answers = np.array([False, False, True, False, False, True])
    shared = LocalDocument(3, (0, 1), np.arange(10, 16, dtype=np.uint16), answers)
    tokens, positions, labels, domains = _local_tokens(shared, np.array([0, 1, 5]))
    assert tokens.tolist() == [10, 11, 15]
    assert positions.tolist() == [0, 1, 5]
    assert labels.tolist() == [IGNORED, 12, IGNORED]
    tokens, positions, labels, domains = _local_tokens(shared, np.array([3, 4, 6]))
    assert positions.tolist() == [3, 4, 5]  # the last is padding
    assert labels.tolist() == [IGNORED, 15, IGNORED]
    assert domains.tolist() == [3, 3, -1]


def test_an_empty_micro_batch_is_one_token_without_label() -> None:
    batch: Any = type("Batch", (), {"micro_batches": ((),)})
    (one,) = document_micro_steps(batch, ContextParallel(), torch.device("cpu"))
    assert one.micro.tokens_BL.shape == (1, 1)
    assert one.micro.labels_BL.tolist() == [[IGNORED]]
    assert one.shards is not None
    assert one.shards.tokens == 1
