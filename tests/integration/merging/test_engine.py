"""The engine on tiny families: what it writes, how it resumes, what options reach which tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import raymix
from raymix.errors import MergeError
from raymix.merging import known_methods
from raymix.merging.checkpoints.output import plan_checkpoint_layout
from raymix.merging.recipe import load_merge
from raymix.merging.registry import Options
from raymix.merging.run.engine import merge
from tests.support.merging import (
    CONFIG,
    DOWN,
    NORM,
    Q_PROJ,
    digests,
    read_model,
    shapes,
    weights,
    write_family,
    write_model,
)

SPECTRAL = ("drm", "knots", "tsv", "iso_c", "iso_cts")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_family(tmp_path_factory.mktemp("family"))


def run(family: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    how = {key: more.pop(key) for key in ("workers", "progress") if key in more}
    return merge({**family, **more}, out, **how)


def report(out: Path) -> Any:
    return json.loads((out / "merge_report.json").read_text())


@pytest.mark.parametrize("method", known_methods())
def test_every_method_writes_a_whole_model(
    method: str, family: dict[str, Any], tmp_path: Path
) -> None:
    models = family["models"][:1] if method == "slerp" else family["models"]
    document = run(family, tmp_path / "out", merge_method=method, models=models)
    result = read_model(tmp_path / "out")
    assert {name: tuple(tensor.shape) for name, tensor in result.items()} == shapes()
    assert all(torch.isfinite(tensor).all() for tensor in result.values())
    assert {"out", "method", "tensors", "seconds", "peak_bytes"} <= set(document)
    assert document["tensors"] == len(result)
    about = report(tmp_path / "out")["tensors"][Q_PROJ]
    assert about["method"] == method
    assert (about["rank"] is not None) == (method in SPECTRAL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_output_is_a_model_directory(family: dict[str, Any], tmp_path: Path) -> None:
    run(family, tmp_path / "out", merge_method="drm", name="Mixture")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "merge_report.json", "README.md"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    card = (tmp_path / "out" / "README.md").read_text()
    digest = digests(family["base_model"])["model.safetensors"]
    assert "# Mixture" in card
    assert digest in card
    assert str(tmp_path) not in card
    assert report(tmp_path / "out")["parents"][0]["files"] == {"model.safetensors": digest}


def test_the_report_says_what_the_tasks_were(family: dict[str, Any], tmp_path: Path) -> None:
    run(family, tmp_path / "out", merge_method="ties", parameters={"density": 0.25})
    about = report(tmp_path / "out")["tensors"][Q_PROJ]
    base = weights(0)[Q_PROJ]
    deltas = torch.stack([(weights(k)[Q_PROJ] - base).flatten() for k in (1, 2, 3)]).double()
    assert about["task_norms"] == pytest.approx(deltas.norm(dim=1).tolist(), rel=1e-5)
    cosines = torch.corrcoef(torch.cat([deltas, -deltas], dim=1))  # of zero mean: plain cosines
    assert about["cosines"] == pytest.approx(
        [float(cosines[i, j]) for i, j in ((0, 1), (0, 2), (1, 2))], rel=1e-3
    )
    agreement = float(deltas.sign().sum(0).abs().mean()) / 3
    assert about["sign_agreement"] == pytest.approx(agreement, rel=1e-5)
    assert about["kept"] == pytest.approx(0.25)


def test_dtypes_are_kept_or_asked_for(tmp_path: Path) -> None:
    family = write_family(tmp_path, tasks=2, dtype=torch.bfloat16)
    run(family, tmp_path / "kept", merge_method="ties")
    assert {tensor.dtype for tensor in read_model(tmp_path / "kept").values()} == {torch.bfloat16}
    run(family, tmp_path / "asked", merge_method="ties", out_dtype="float32")
    result = read_model(tmp_path / "asked")
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert json.loads((tmp_path / "asked" / "config.json").read_text())["dtype"] == "float32"
    surviving = read_model(tmp_path / "kept")
    assert all(torch.equal(result[name].bfloat16(), surviving[name]) for name in result)


def test_shards_hold_the_same_tensors(tmp_path: Path, family: dict[str, Any]) -> None:
    sharded = write_family(tmp_path / "sharded", shards=3)
    run(family, tmp_path / "one", merge_method="drm")
    run(sharded, tmp_path / "many", merge_method="drm", max_shard_bytes=4000)
    one, many = read_model(tmp_path / "one"), read_model(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(one)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in one.values())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) > 3


def test_the_bytes_do_not_depend_on_the_workers(family: dict[str, Any], tmp_path: Path) -> None:
    for workers in (1, 3):
        run(family, tmp_path / str(workers), merge_method="dare_ties", workers=workers,
            parameters={"density": 0.5})  # fmt: skip
    assert digests(tmp_path / "1") == digests(tmp_path / "3")


def test_layouts_align_mixed_dtypes() -> None:
    tensors = {"a": (torch.bool, (3,)), "b": (torch.float64, (2,)), "c": (torch.bfloat16, (5,))}
    layout = plan_checkpoint_layout(tensors, 1000)
    for place in layout.locations.values():
        assert place.offset % place.dtype.itemsize == 0
    assert layout.total_bytes == 3 + 16 + 10
    assert layout.index() is None


def test_frozen_tensors_keep_the_bases_bytes(tmp_path: Path) -> None:
    base = weights(0)
    base[Q_PROJ][0, :3] = -0.0
    write_model(tmp_path / "base", base)
    for number in (1, 2):
        task = {**weights(number), Q_PROJ: base[Q_PROJ], NORM: base[NORM]}
        write_model(tmp_path / f"m{number}", task)
    family = {
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "m1")}, {"model": str(tmp_path / "m2")}],
    }
    for method in ("drm", "ties", "tsv", "task_arithmetic"):
        run(family, tmp_path / method, merge_method=method)
        result = read_model(tmp_path / method)
        for name in (Q_PROJ, NORM):
            assert result[name].view(torch.int32).equal(base[name].view(torch.int32))
        assert not result[DOWN].equal(base[DOWN])


class Planted(Exception):
    """A crash that the engine does not expect."""


def crash_after(jobs: int) -> Any:
    def progress(done: int, total: int, job: str) -> None:
        if done == jobs:
            raise Planted

    return progress


@pytest.mark.parametrize("at", [1, 9, 20])
def test_a_crashed_merge_goes_on_to_the_same_bytes(
    at: int, family: dict[str, Any], tmp_path: Path
) -> None:
    how: dict[str, Any] = {"merge_method": "drm", "max_shard_bytes": 6000}
    run(family, tmp_path / "whole", **how)
    with pytest.raises(Planted):
        run(family, tmp_path / "out", progress=crash_after(at), workers=1, **how)
    assert not (tmp_path / "out").exists()
    document = run(family, tmp_path / "out", **how)
    assert document["resumed"] >= at
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_damaged_or_other_merge_is_not_resumed(family: dict[str, Any], tmp_path: Path) -> None:
    run(family, tmp_path / "whole", merge_method="drm")
    with pytest.raises(Planted):
        run(family, tmp_path / "out", merge_method="drm", progress=crash_after(15), workers=1)
    hidden = tmp_path / ".out.merging"
    weights_file = hidden / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-5000:] = bytes(5000)
    weights_file.write_bytes(bytes(data))
    journal = hidden / "progress.jsonl"
    journal.write_text(journal.read_text() + '{"name": "torn')
    document = run(family, tmp_path / "out", merge_method="drm")
    assert 0 < document["resumed"] < 15
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    with pytest.raises(Planted):
        run(family, tmp_path / "new", merge_method="ties", progress=crash_after(5), workers=1)
    assert run(family, tmp_path / "new", merge_method="drm")["resumed"] == 0
    assert digests(tmp_path / "new") == digests(tmp_path / "whole")


def test_a_parameter_may_have_values_by_model_layer_and_name(
    family: dict[str, Any], tmp_path: Path
) -> None:
    models = [{**entry} for entry in family["models"][:2]]
    models[0]["parameters"] = {"weight": [0.0, 1.0]}
    models[1]["parameters"] = {
        "weight": [{"filter": "down_proj", "value": 0.5}, {"value": [0.2, 0.4]}]
    }
    run(family, tmp_path / "out", merge_method="task_arithmetic", models=models)
    result, base = read_model(tmp_path / "out"), weights(0)
    one, two = weights(1), weights(2)

    def expected(name: str, first: float, second: float) -> Tensor:
        return base[name] + first * (one[name] - base[name]) + second * (two[name] - base[name])

    for layer, first, second in ((0, 0.0, 0.2), (1, 0.5, 0.3), (2, 1.0, 0.4)):
        at = f"model.layers.{layer}"
        name = f"{at}.mlp.up_proj.weight"
        assert torch.allclose(result[name], expected(name, first, second), atol=1e-6)
        name = f"{at}.mlp.down_proj.weight"
        assert torch.allclose(result[name], expected(name, first, 0.5), atol=1e-6)
    # What belongs to no layer lies where the first layer does.
    assert torch.allclose(result["lm_head.weight"], expected("lm_head.weight", 0.0, 0.2), atol=1e-6)


def test_rules_change_methods_and_options(family: dict[str, Any], tmp_path: Path) -> None:
    rules = [
        {"match": r"q_proj|\.norm", "layers": ["0-1"], "merge_method": "base"},
        {"match": "mlp", "merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}},
        {"match": "o_proj", "layers": [2], "parameters": {"drop": 0.0}},
    ]
    run(family, tmp_path / "out", merge_method="drm", rules=rules)
    about = report(tmp_path / "out")["tensors"]
    assert about[Q_PROJ]["method"] == "base"
    assert about["model.layers.2.self_attn.q_proj.weight"]["method"] == "drm"
    assert about[NORM]["method"] == "drm"
    assert about[DOWN]["method"] == "task_arithmetic"
    assert about["model.layers.2.self_attn.o_proj.weight"]["kept"] == 1.0
    assert about["model.layers.1.self_attn.o_proj.weight"]["kept"] < 0.3
    result, base = read_model(tmp_path / "out"), weights(0)
    total = sum(weights(k)[DOWN] - base[DOWN] for k in (1, 2, 3))
    assert torch.allclose(result[DOWN], base[DOWN] + 0.5 * total, atol=1e-6)


def test_drm_of_tensors_that_are_no_matrices(family: dict[str, Any], tmp_path: Path) -> None:
    run(family, tmp_path / "out", merge_method="drm")
    result, base = read_model(tmp_path / "out"), weights(0)
    for name in (NORM, "model.embed_tokens.weight"):
        deltas = torch.stack([weights(k)[name] - base[name] for k in (1, 2, 3)])
        agreeing = deltas * (deltas.sign() == deltas.sum(0).sign())
        mean = agreeing.sum(0) / (agreeing != 0).sum(0)
        assert torch.allclose(result[name], base[name] + mean, atol=1e-6)
        assert report(tmp_path / "out")["tensors"][name]["rank"] is None


def test_experts_are_merged_one_by_one(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.up_proj"
    stacks = [torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    for k, stack in enumerate(stacks):
        write_model(tmp_path / f"m{k}", {name: stack})
        for e in range(2):
            write_model(tmp_path / f"e{k}-{e}", {"a.weight": stack[e].clone()})
    run(_files(tmp_path, "m0", "m1", "m2"), tmp_path / "out", merge_method="drm")
    result = read_model(tmp_path / "out")[name]
    for e in range(2):
        files = _files(tmp_path, f"e0-{e}", f"e1-{e}", f"e2-{e}")
        run(files, tmp_path / f"one{e}", merge_method="drm")
        assert torch.equal(result[e], read_model(tmp_path / f"one{e}")["a.weight"])


def _files(folder: Path, base: str, *tasks: str) -> dict[str, Any]:
    return {
        "base_model": str(folder / base),
        "models": [{"model": str(folder / task)} for task in tasks],
    }


def test_whole_numbers_are_copied_if_they_agree(tmp_path: Path) -> None:
    ids = torch.arange(5)
    for k in range(3):
        more = {"ids": ids, "nothing": torch.zeros(0, 4), "scale": torch.tensor(float(k))}
        write_model(tmp_path / f"m{k}", {**weights(k), **more})
    run(_files(tmp_path, "m0", "m1", "m2"), tmp_path / "out", merge_method="linear")
    result = read_model(tmp_path / "out")
    assert torch.equal(result["ids"], ids)
    assert result["nothing"].shape == (0, 4)
    assert result["scale"] == 1.5
    write_model(tmp_path / "m2", {**weights(2), **more, "ids": ids + 1})
    with pytest.raises(MergeError, match="'ids' holds integers that differ"):
        run(_files(tmp_path, "m0", "m1", "m2"), tmp_path / "other", merge_method="linear")


def test_double_precision_on_request(family: dict[str, Any], tmp_path: Path) -> None:
    run(family, tmp_path / "out", merge_method="task_arithmetic", precision="float64",
        out_dtype="float64")  # fmt: skip
    base = weights(0)[DOWN].double()
    total = sum((weights(k)[DOWN].double() - base for k in (1, 2, 3)), base)
    assert torch.allclose(read_model(tmp_path / "out")[DOWN], total, rtol=1e-14)


class _PickOptions(Options):
    which: int = 0


def test_a_method_of_ones_own(family: dict[str, Any], tmp_path: Path) -> None:
    @raymix.merge_method("test_pick", options=_PickOptions)
    def pick(base: Tensor | None, deltas: Any, options: _PickOptions) -> Tensor:
        return deltas[options.which]

    run(family, tmp_path / "out", merge_method="test_pick", parameters={"which": 1})
    result = read_model(tmp_path / "out")
    assert all(torch.allclose(result[name], weights(2)[name]) for name in result)


def test_the_package_can_be_called_with_a_file(family: dict[str, Any], tmp_path: Path) -> None:
    lines = ["merge_method: linear", "models:"]
    for entry in family["models"]:
        path = Path(entry["model"])
        lines.append(f"- model: {path.name}")
    file = Path(family["base_model"]).parent / "merge.yaml"
    file.write_text("\n".join(lines))
    document = raymix.merge(file, tmp_path / "out", overrides=["parameters.weight=2"])
    assert document["method"] == "linear"
    mean = sum(weights(k)[DOWN] for k in (1, 2, 3)) / 3
    assert torch.allclose(read_model(tmp_path / "out")[DOWN], mean, atol=1e-6)
    assert load_merge(file).models[0].model == family["models"][0]["model"]
