"""Low-rank adapters: what is trained and what stays, resume, exports, and the gradient probe."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymix.errors import RecipeError
from raymix.recipe import ConfigModel, PretrainedModel, Recipe, load_recipe
from raymix.recipe.sections.lora import LoraConfig
from raymix.signals import GradientProbe
from raymix.store import Corpus
from raymix.training.evaluate.export import export
from raymix.training.evaluate.score import score
from raymix.training.host.machine import Resources
from raymix.training.launch.local import run_loop
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model, load_model
from raymix.training.model.lora import add_lora
from raymix.training.model.loss import PackedLoss
from raymix.training.model.parallel import World
from raymix.training.plan.preflight import preflight
from raymix.training.plan.runplan import RunPlan
from raymix.training.run.rundir import RunDirectory, read_metrics
from raymix.training.setup import build_components, local_source, resume
from tests.integration.training.test_run import job, numbers, recipe, train
from tests.support.loops import VOCAB, train_corpus

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FACTS = CorpusFacts(VOCAB, VOCAB - 1, 32)
LORA = {"rank": 2, "alpha": 8, "dropout": 0.1}
IDS = torch.arange(24)[None]
# peft 0.21 reads an attribute that transformers 5.23 deprecates.
OLD_NAME = "ignore:.is_gradient_checkpointing:FutureWarning"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 3000, "b": 2000, "c": 1500})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    build_model(ConfigModel(config=SHAPE), FACTS, seed=4).save_pretrained(path)
    return path


def used(corpus: Corpus, directory: Path, model: dict[str, Any]) -> Recipe:
    return recipe(
        corpus,
        directory,
        model=model,
        mixer={"kind": "dga", "targets": ["c"]},
        train={"steps": 4, "lr": 0.05, "checkpoint_every": 2, "probe_interval": 1},
        eval={"rows_per_domain": 1},
    )


@dataclass
class Trained:
    recipe: Recipe
    run: RunDirectory
    model: Any
    """The model as it was when the loop ended."""

    def logits(self) -> torch.Tensor:
        return logits(self.model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(made: Recipe) -> Trained:
    work, world = job(made), World()
    components = build_components(
        work,
        world,
        resume(work, world),
        source=local_source(made),
        on_checkpoint=lambda path, step: None,
        stop_requested=lambda: False,
    )
    run_loop(components)
    return Trained(made, work.run, components.replica.model.model)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    model = {"kind": "pretrained", "path": str(base), "lora": LORA}
    return trained(used(corpus, tmp_path_factory.mktemp("whole"), model))


def test_the_base_stays_bit_for_bit_and_the_adapters_learn(whole: Trained, base: Path) -> None:
    before = load_model(base).state_dict()
    after = {k.replace(".base_layer", ""): v for k, v in whole.model.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not torch.allclose(whole.logits(), logits(load_model(base)), atol=1e-3)
    lines = [line for line in read_metrics(whole.run.metrics) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    # The mixer had its gradients: shares moved at the end of a window.
    assert lines[-1]["shares"] != lines[0]["shares"]


def test_a_killed_run_goes_on_bit_for_bit(whole: Trained, corpus: Corpus, tmp_path: Path) -> None:
    made = used(corpus, tmp_path, whole.recipe.model.model_dump())
    train(made)
    run = RunDirectory(tmp_path / made.name)
    shutil.rmtree(run.checkpoints / "step-00000004")
    train(made)
    # The lines of probes have nothing but seconds.
    ours, theirs = (
        [line for line in numbers(each) if "probe" not in line] for each in (run, whole.run)
    )
    assert ours == theirs
    name = Path("step-00000004") / "adapter_model.safetensors"
    assert (run.checkpoints / name).read_bytes() == (whole.run.checkpoints / name).read_bytes()
    assert not (run.checkpoints / name).with_name("model.safetensors").exists()


@pytest.mark.filterwarnings(OLD_NAME)
def test_the_adapter_is_one_for_peft(whole: Trained, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    whole.run.write_recipe(load_recipe(whole.recipe, ["model.lora.export=adapter"]))
    done = export(whole.run.path, tmp_path / "adapter")
    assert set(done["files"]) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(load_model(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded), whole.logits())
    assert "PeftModel" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_merged_export_is_a_model_for_transformers(whole: Trained, tmp_path: Path) -> None:
    whole.run.write_recipe(whole.recipe)
    done = export(whole.run.path, tmp_path / "merged")
    assert "model.safetensors" in done["files"]
    assert not any(name.startswith("adapter") for name in done["files"])
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), whole.logits())


def test_a_checkpoint_is_scored_as_the_run_scored_it(whole: Trained) -> None:
    last = [line["eval"] for line in read_metrics(whole.run.metrics) if "eval" in line][-1]
    for name, row in score(whole.run.path)["domains"].items():
        assert row["loss"] == pytest.approx(last[name]["loss"], rel=1e-6)


def test_a_new_model_can_have_adapters_too(corpus: Corpus, tmp_path: Path) -> None:
    model = {"config": SHAPE, "lora": {**LORA, "targets": ["q_proj", "mlp.down_proj"]}}
    done = trained(used(corpus, tmp_path, model))
    names = [name for name, p in done.model.named_parameters() if p.requires_grad]
    assert len(names) == 8
    assert all("q_proj.lora_" in name or "down_proj.lora_" in name for name in names)
    export(done.run.path, tmp_path / "out")
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), done.logits())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_backward_pass_gives_the_gradients_of_all_groups(kind: str) -> None:
    shape = SHAPE if kind == "llama" else {"n_embd": 16, "n_layer": 2, "n_head": 2}
    model = add_lora(
        build_model(ConfigModel(type=kind, config=shape), FACTS, seed=2), LoraConfig(rank=2), seed=0
    ).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(0, VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand_as(tokens)
    piece_B = torch.tensor([0, 1, 2, 3])
    (exact,), (reference,) = (
        GradientProbe(PackedLoss(model, linear_head=True), n_groups=2, mode=mode).measure(
            tokens, positions, tokens, piece_B
        )
        for mode in ("exact", "backward")
    )
    np.testing.assert_allclose(exact.gram_PP, reference.gram_PP, rtol=1e-4, atol=1e-6)


HERE = Resources(where="this machine", cpus=2, gpus=0, memory_bytes=8 * 10**9,
                 object_store_bytes=10**9)  # fmt: skip


def planned(corpus: Corpus, directory: Path, model: dict[str, Any]) -> RunPlan:
    return preflight(used(corpus, directory, model), corpus, HERE)


def test_a_plan_counts_what_is_trained(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    model = {"kind": "pretrained", "path": str(base)}
    dense = planned(corpus, tmp_path, model)
    plan = planned(corpus, tmp_path, {**model, "lora": LORA})
    parts = {part.name: part.bytes for part in plan.worker_memory}
    # Two matrices of rank 2 for each linear layer of a block.
    shapes = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 32), (16, 32), (32, 16)]
    per_layer = sum(2 * (inputs + outputs) for inputs, outputs in shapes)
    assert (dense.trainable, plan.trainable) == (dense.parameters, 2 * per_layer)
    assert plan.parameters == dense.parameters + plan.trainable
    assert parts["weights"] == 4 * plan.parameters
    assert parts["gradients"] == 4 * plan.trainable
    assert parts["optimizer"] == 8 * plan.trainable
    assert plan.checkpoint_bytes == 12 * plan.trainable
    # Two operations fewer for each weight in a product that is not trained; six for a new one.
    frozen = dense.parameters - VOCAB * 16
    saved = 2 * frozen - 6 * plan.trainable
    assert plan.flops_per_token == dense.flops_per_token - saved


def test_a_target_that_matches_nothing_is_named(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    lora = {**LORA, "targets": ["q_proj", "query"]}
    with pytest.raises(RecipeError) as caught:
        planned(corpus, tmp_path, {"kind": "pretrained", "path": str(base), "lora": lora})
    said = str(caught.value)
    assert said.startswith("model.lora.targets = ['q_proj', 'query']: no module is called 'query'")
    assert "k_proj" in said


def test_without_peft_the_error_says_how_to_get_it(
    corpus: Corpus, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None is what Python itself takes for a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "peft", None)
    # Its distribution is still there, so the plan would be read from the cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RecipeError, match=r"model\.lora = .*peft is not installed.*raymix\[lora\]"):
        planned(corpus, tmp_path, {"kind": "pretrained", "path": str(base), "lora": LORA})


def test_an_adapter_without_a_base_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora\.export"):
        ConfigModel(lora=LoraConfig(export="adapter"))
    assert (
        PretrainedModel(kind="pretrained", path="x", lora=LoraConfig(export="adapter")).lora
        is not None
    )
