"""What a plan refuses because of the model: by its architecture, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymix.errors import RecipeError
from raymix.recipe import Recipe, load_recipe
from raymix.store import Corpus
from raymix.training.host.machine import Resources
from raymix.training.model.hf_model import CorpusFacts
from raymix.training.plan.model_checks import model_notes
from raymix.training.plan.preflight import preflight
from tests.integration.training.test_run import recipe
from tests.support.loops import VOCAB, train_corpus

HERE = Resources(where="this machine", cpus=2, gpus=0, memory_bytes=10**12,
                 object_store_bytes=10**9)  # fmt: skip
FACTS = CorpusFacts(VOCAB, VOCAB - 1, 32)
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


@pytest.mark.parametrize("kind", ["opt", "mamba", "mamba2", "falcon", "mpt", "rwkv"])
def test_models_in_which_packed_documents_mix(kind: str, corpus: Corpus, tmp_path: Path) -> None:
    # As large as transformers makes them by default: up to seven billion parameters.
    used = made(corpus, tmp_path, model={"type": kind})
    with pytest.raises(
        RecipeError, match=rf"model\.type = '{kind}': documents packed into one row"
    ):
        model_notes(used, FACTS, frozenset())


def test_a_plan_refuses_such_a_model(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        preflight(made(corpus, tmp_path, model={"type": "bloom"}), corpus, HERE)
    assert caught.value.problems == (
        "model.type = 'bloom': documents packed into one row would see each other in bloom. "
        "Take a type with rotary or learned positions and plain attention, such as llama, qwen3 "
        "or gpt2.",
    )


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
