"""Training on a CUDA device: the same numbers as on a CPU, and what only a GPU has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.job import Job
from raymix.training.launch.local import run_in_process
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.loss import PackedLoss
from raymix.training.run.rundir import open_run, read_metrics
from tests.support.loops import VOCAB, train_corpus

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000})


def recipe(corpus: Corpus, directory: Path, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "run",
            "corpus": {"path": corpus.path},
            "data": {"sequence_length": 64, "rows_per_step": 8},
            "mixer": {"kind": "static", "weights": {"a": 0.7, "b": 0.3}},
            "model": {
                "type": "llama",
                "config": {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                },
            },
            "train": {"steps": STEPS, "lr": 0.01, "checkpoint_every": 5, **train},
            "eval": {"rows_per_domain": 2},
            "cluster": {"workers": 0},
            "run": {"dir": str(directory / "{name}"), "tensorboard": False},
        }
    )


def metrics(used: Recipe, *, on_gpu: bool) -> list[dict[str, Any]]:
    run = open_run(used, "resume")
    run.write_recipe(used)
    job = Job(
        recipe=used,
        run=run,
        steps=STEPS,
        micro_batch_rows=4,
        on_gpu=on_gpu,
        threads=None,
        session="test",
    )
    run_in_process(job, stop_requested=lambda: False)
    return list(read_metrics(run.metrics))


def steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "loss" in line]


def test_fp32_losses_are_those_of_the_cpu(corpus: Corpus, tmp_path: Path) -> None:
    gpu = steps(metrics(recipe(corpus, tmp_path / "gpu", precision="fp32"), on_gpu=True))
    cpu = steps(metrics(recipe(corpus, tmp_path / "cpu", precision="fp32"), on_gpu=False))
    assert [line["batch_hash"] for line in gpu] == [line["batch_hash"] for line in cpu]
    assert [line["loss"] for line in gpu] == pytest.approx([line["loss"] for line in cpu], rel=2e-3)
    assert gpu[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"compile": True}])
def test_bf16_learns_and_every_step_is_recorded(
    changes: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    lines = metrics(recipe(corpus, tmp_path, **changes), on_gpu=True)
    recorded = steps(lines)
    assert [line["step"] for line in recorded] == list(range(1, STEPS + 1))
    assert recorded[-1]["loss"] < 0.9 * recorded[0]["loss"]
    first, last = (line["eval"] for line in lines if "eval" in line)
    assert all(last[name]["loss"] < first[name]["loss"] for name in first)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_documents_in_a_row_are_as_if_alone(precision: torch.dtype) -> None:
    used = recipe_model()
    model = build_model(used, CorpusFacts(VOCAB, VOCAB - 1, 64), seed=1).eval().cuda()
    lengths = (20, 1, 30, 13)
    tokens = torch.randint(0, VOCAB, (1, sum(lengths)), device="cuda")
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    with torch.no_grad(), torch.autocast("cuda", precision, enabled=precision != torch.float32):
        row = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0]
        alone = [
            model(input_ids=document, use_cache=False).logits[0]
            for document in tokens.split(lengths, dim=1)
        ]
    tolerance = 1e-3 if precision == torch.float32 else 3e-2
    torch.testing.assert_close(
        row.float(), torch.cat(alone).float(), atol=tolerance, rtol=tolerance
    )


def recipe_model() -> Any:
    from raymix.recipe.training import ConfigModel

    return ConfigModel(
        type="llama",
        config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    )


def test_loss_in_pieces_bounds_the_memory_of_logits() -> None:
    from raymix.recipe.training import ConfigModel

    wide = ConfigModel(type="llama", config=recipe_model().config)
    vocab = 32_000
    peaks = []
    for logit_bytes in (1 << 40, 32 << 20):
        model = build_model(wide, CorpusFacts(vocab, 0, 1024), seed=1).cuda()
        loss = PackedLoss(model, linear_head=True, logit_bytes=logit_bytes)
        tokens = torch.randint(0, vocab, (8, 1024), device="cuda")
        positions = torch.arange(1024, device="cuda").repeat(8, 1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(tokens, positions, tokens)[0].backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model, loss
    assert peaks[1] < 0.5 * peaks[0]
