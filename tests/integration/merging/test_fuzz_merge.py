"""Models and merge files, damaged: merged, or refused, and then no model is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raymix.merging.run.engine import merge
from tests.support.fuzzing import damaged, outcome
from tests.support.merging import write_model

CASES = [150, pytest.param(2500, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
FEW = [150, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
LAYER = "model.layers.0.mlp.up_proj.weight"


def write_small(folder: Path, number: int, *, shards: int = 1) -> Path:
    generator = torch.Generator().manual_seed(number)
    tensors = {
        LAYER: torch.randn(6, 4, generator=generator),
        "model.norm.weight": torch.randn(4, generator=generator),
        "lm_head.weight": torch.randn(5, 4, generator=generator),
    }
    return write_model(folder, tensors, vocabulary={"a": 0, "b": 1}, shards=shards)


def family(folder: Path, *, shards: int = 1) -> dict[str, Any]:
    for number, name in enumerate(("base", "m1", "m2")):
        write_small(folder / name, number, shards=shards)
    return {
        "merge_method": "drm",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in ("m1", "m2")],
    }


def left_behind(out: Path) -> list[str]:
    """Return what somebody could take for a merged model."""
    return [path.name for path in out.glob("*") if path.suffix in {".safetensors", ".json"}]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("shards", "file"), [
    (1, "m1/model.safetensors"),
    (1, "base/model.safetensors"),
    (1, "m2/config.json"),
    (1, "m1/tokenizer.json"),
    (2, "m1/model.safetensors.index.json"),
    (2, "base/model-00001-of-00002.safetensors"),
])  # fmt: skip
def test_models(shards: int, file: str, cases: int, tmp_path: Path) -> None:
    document, out = family(tmp_path, shards=shards), tmp_path / "out"
    raw = (tmp_path / file).read_bytes()
    merge(document, out)
    shutil.rmtree(out)
    header = 8 + int.from_bytes(raw[:8], "little") if file.endswith(".safetensors") else len(raw)
    for case in range(cases):
        # Two of three cases change the header, where sizes and offsets stand.
        head = header if case % 3 else len(raw)
        (tmp_path / file).write_bytes(damaged(raw[:head], case) + raw[head:])
        label = f"{file} case {case}"
        done = outcome(lambda: merge(document, out), label)
        assert done is not None or not left_behind(out), label
        shutil.rmtree(out, ignore_errors=True)
        for name in ("base", "m1", "m2"):
            assert (tmp_path / name).is_dir(), label


@pytest.mark.parametrize("cases", FEW)
def test_merge_files(cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = family(Path("."))
    document["models"][0]["parameters"] = {"weight": 0.5}
    document["parameters"] = {"drop": 0.2}
    raw = yaml.safe_dump(document, sort_keys=False).encode()
    for case in range(cases):
        Path("merge.yaml").write_bytes(damaged(raw, case))
        done = outcome(lambda: merge("merge.yaml", "out"), f"merge.yaml case {case}")
        assert done is not None or not left_behind(Path("out"))
        shutil.rmtree("out", ignore_errors=True)


def test_an_index_cannot_reach_outside(tmp_path: Path) -> None:
    document = family(tmp_path, shards=2)
    write_small(tmp_path / "secret", 9)
    index = tmp_path / "m1" / "model.safetensors.index.json"
    for path in ("../secret/model.safetensors", str(tmp_path / "secret" / "model.safetensors"),
                 "..\\secret\\model.safetensors", "a/../../secret/model.safetensors"):  # fmt: skip
        index.write_text(json.dumps({"weight_map": {LAYER: path}}))
        assert outcome(lambda: merge(document, tmp_path / "out"), path) is None
