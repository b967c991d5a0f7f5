"""LoRA adapters: in as factors, out as factors, or merged into a base, always exact."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raymix.merging.registry import Merged, get_method
from raymix.merging.run.engine import merge
from tests.support.merging import NORM, digests, read_model, weights, write_adapter, write_model

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"
SIZES = {Q: (16, 16), UP: (24, 16)}


def factors(seed: int, rank: int = 3, modules: tuple[str, ...] = (Q, UP)) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (
            torch.randn(SIZES[module][0], rank, generator=generator),
            torch.randn(rank, SIZES[module][1], generator=generator),
        )
        for module in modules
    }


def delta_of(folder: Path, module: str) -> Tensor:
    """Return what PEFT adds to a module's weight, in fp64, or zeros."""
    tensors = read_model(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    if f"base_model.model.{module}.lora_A.weight" not in tensors:
        return torch.zeros(SIZES[module], dtype=torch.float64)
    right = tensors[f"base_model.model.{module}.lora_A.weight"].double()
    left = tensors[f"base_model.model.{module}.lora_B.weight"].double()
    rank = config["rank_pattern"].get(module, config["r"]) if "rank_pattern" in config else None
    rank = rank or config["r"]
    alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
    assert right.shape[0] == rank
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scale * left @ right


def run(folder: Path, method: str, names: str, **more: Any) -> dict[str, Any]:
    models = [{"model": str(folder / name)} for name in names.split()]
    return merge({"merge_method": method, "models": models, **more}, folder / "out")


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "a", factors(1), alpha=6)
    write_adapter(tmp_path / "b", factors(2, rank=4), alpha=2, use_rslora=True)
    write_adapter(tmp_path / "c", factors(3, rank=2, modules=(Q,)), alpha=5)
    return tmp_path


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "drm", "knots", "tsv"])
def test_one_adapter_is_itself(method: str, adapters: Path) -> None:
    parameters = {"drop": 0.0} if method == "drm" else {}
    run(adapters, method, "b", parameters=parameters, precision="float64", out_dtype="float64")
    for module in (Q, UP):
        expected = delta_of(adapters / "b", module)
        assert torch.allclose(delta_of(adapters / "out", module), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("drm", {"drop": 0.5}),
        ("drm", {"drop": 0.8, "direction": "vertical"}),
        ("drm", {"direction": "auto", "weight": [0.5]}),
        ("knots", {"density": 0.4}),
        ("tsv", {}),
        ("iso_c", {}),
        ("iso_cts", {}),
        ("task_arithmetic", {"lambda": 0.3}),
        ("linear", {"weight": 0.6}),
    ],
)
def test_factored_merges_are_the_dense_ones(
    method: str, parameters: dict[str, Any], adapters: Path
) -> None:
    run(adapters, method, "a b c", parameters=parameters, out_dtype="float64")
    options = {
        key: [value] * 3 if key == "weight" and not isinstance(value, list) else value
        for key, value in parameters.items()
    }
    if "density" in options:
        options["density"] = [options["density"]]
    result = get_method(method)
    for module in (Q, UP):
        deltas = [delta_of(adapters / name, module) for name in "abc"]
        dense = result.function(None, deltas, result.options.model_validate(options))
        expected = dense.delta if isinstance(dense, Merged) else dense
        error = (delta_of(adapters / "out", module) - expected).norm() / expected.norm()
        assert float(error) < 1e-10
    about = json.loads((adapters / "out" / "merge_report.json").read_text())["tensors"]
    assert about[Q]["rank"] <= 9
    assert about[UP]["rank"] <= 7
    norms = [float(delta_of(adapters / name, UP).norm()) for name in "abc"]
    assert about[UP]["task_norms"] == pytest.approx(norms, rel=1e-5)


def test_the_merged_adapter_is_a_peft_directory(adapters: Path) -> None:
    document = run(adapters, "drm", "a b c")
    files = {path.name for path in (adapters / "out").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_report.json",
        "README.md",
    }
    config = json.loads((adapters / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (9, 9)
    assert config["rank_pattern"] == config["alpha_pattern"] == {UP: 7}
    assert not config["use_rslora"]
    assert config["target_modules"] == [Q, UP]
    assert document["tensors"] == 4
    assert {t.dtype for t in read_model(adapters / "out").values()} == {torch.float32}


@pytest.mark.parametrize("method", ["ties", "drm", "linear", "dare_ties"])
def test_adapters_on_a_base_give_a_model(method: str, adapters: Path) -> None:
    """The same as merging models into which the adapters were merged before."""
    base = weights(0, torch.float64)
    write_model(adapters / "base", base)
    for name in "abc":
        task = dict(base)
        for module in (Q, UP):
            task[f"{module}.weight"] = task[f"{module}.weight"] + delta_of(adapters / name, module)
        write_model(adapters / f"full_{name}", task)
    parameters = {"density": 0.5} if method.endswith("ties") else {}
    how = {"base_model": str(adapters / "base"), "parameters": parameters}
    run(adapters, method, "full_a full_b full_c", **how)
    full = read_model(adapters / "out")
    (adapters / "out").rename(adapters / "full")
    run(adapters, method, "a b c", **how)
    result = read_model(adapters / "out")
    assert torch.equal(result[NORM], full[NORM])
    for module in (Q, UP):
        name = f"{module}.weight"
        assert torch.allclose(result[name], full[name], rtol=1e-6, atol=1e-6)
        assert not torch.equal(result[name], base[name])


def test_mergekits_way_to_name_an_adapter(adapters: Path) -> None:
    write_model(adapters / "base", weights(0))
    base = str(adapters / "base")
    run(adapters, "task_arithmetic", "a b", base_model=base)
    (adapters / "out").rename(adapters / "one")
    models = [{"model": f"{base}+{adapters / name}"} for name in "ab"]
    file = {"merge_method": "task_arithmetic", "base_model": base, "models": models}
    merge(file, adapters / "out")
    one, other = digests(adapters / "one"), digests(adapters / "out")
    assert one["model.safetensors"] == other["model.safetensors"]


def test_alphas_and_ranks_by_pattern(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", factors(1), alpha=6, alpha_pattern={"up_proj": 12})
    run(tmp_path, "task_arithmetic", "a", out_dtype="float64")
    left, right = factors(1)[UP]
    expected = 12 / 3 * left.double() @ right.double()
    assert torch.allclose(delta_of(tmp_path / "out", UP), expected)


def test_more_ranks_than_the_matrix_has(tmp_path: Path) -> None:
    for at, name in enumerate("abc"):
        write_adapter(tmp_path / name, factors(at, rank=8))
    run(tmp_path, "linear", "a b c", out_dtype="float64")
    expected = sum(delta_of(tmp_path / name, UP) for name in "abc") / 3
    assert torch.allclose(delta_of(tmp_path / "out", UP), expected)
    assert read_model(tmp_path / "out")[f"base_model.model.{UP}.lora_A.weight"].shape == (16, 16)


def test_transposed_layers(tmp_path: Path) -> None:
    """GPT-2 keeps its weights transposed: what is added is the factors' product, turned."""
    write_model(tmp_path / "base", {f"{UP}.weight": torch.zeros(16, 24)})
    write_adapter(tmp_path / "a", factors(1, modules=(UP,)), alpha=3, fan_in_fan_out=True)
    run(tmp_path, "task_arithmetic", "a", base_model=str(tmp_path / "base"))
    left, right = factors(1, modules=(UP,))[UP]
    assert torch.allclose(read_model(tmp_path / "out")[f"{UP}.weight"], (left @ right).T)
