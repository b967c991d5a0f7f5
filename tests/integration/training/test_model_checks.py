"""What a plan refuses because of the model: by its architecture, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymix.errors import RecipeError
from raymix.recipe import Recipe, load_recipe
from raymix.store import Corpus
from raymix.training.host.machine import Resources
from raymix.training.launch.local import run_in_process
from raymix.training.plan.preflight import preflight
from raymix.training.run.rundir import RunDirectory, read_metrics
from tests.integration.training.test_run import job, recipe
from tests.support.loops import train_corpus

HERE = Resources(where="this machine", cpus=2, gpus=0, memory_bytes=10**12,
                 object_store_bytes=10**9)  # fmt: skip
PIKE = {"kind": "pike"}
MOE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 3000, "b": 2000, "c": 1500})


def made(corpus: Corpus, directory: Path, *overrides: str, **sections: Any) -> Recipe:
    return load_recipe(recipe(corpus, directory, **sections), overrides)


def test_a_plan_refuses_such_a_model(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        preflight(made(corpus, tmp_path, model={"type": "bloom"}), corpus, HERE)
    assert caught.value.problems == (
        "model.type = 'bloom': documents packed into one row would see each other in bloom. "
        "Set data.mode: documents, where each is a row of its own, or take a type with rotary or "
        "learned positions and plain attention, such as llama, qwen3 or gpt2.",
    )


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_such_a_model_trains_on_documents(kind: str, corpus: Corpus, tmp_path: Path) -> None:
    config: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"ffn_dim": 16, "word_embed_proj_dim": 16, "dropout": 0.0} if kind == "opt" else {}
    data = {"mode": "documents", "sequence_length": 48, "tokens_per_step": 192}
    losses = []
    # However documents are divided into passes, whose padding differs.
    for rows in (1, 4):
        used = recipe(
            corpus, tmp_path / f"{kind}-{rows}", model={"type": kind, "config": config}, data=data
        )
        plan = preflight(used, corpus, HERE)
        assert any("a row of its own" in note for note in plan.notes) == (kind == "bloom")
        run_in_process(job(used, micro_batch_rows=rows), stop_requested=lambda: False)
        run = RunDirectory(tmp_path / f"{kind}-{rows}" / "run")
        losses.append([line["loss"] for line in read_metrics(run.metrics) if "loss" in line])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_the_probe_runs_again_is_in_the_plan(corpus: Corpus, tmp_path: Path) -> None:
    model = {"type": "mixtral", "config": MOE}
    plan = preflight(made(corpus, tmp_path, mixer=PIKE, model=model), corpus, HERE)
    (note,) = [note for note in plan.notes if "gradient probe" in note]
    assert "one backward pass of their module per piece" in note
    assert "experts.gate_up_proj" in note
    # Nobody measures gradients here.
    plan = preflight(made(corpus, tmp_path, model=model), corpus, HERE)
    assert not any("gradient probe" in note for note in plan.notes)


def test_a_probe_that_cannot_work_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    # The head is frozen: only adapters are trained.
    overrides = ("train.probe.mode=last_layer", "model.lora={rank: 2}")
    with pytest.raises(RecipeError, match=r"train\.probe\.mode = 'last_layer': pike needs"):
        preflight(made(corpus, tmp_path, *overrides, mixer=PIKE), corpus, HERE)
