"""Seven defects of the authors' code of DRM (commit 8c0f961), each as a test that ours passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.errors import MergeError
from raymix.merging.run.engine import merge
from tests.support.merging import DOWN, Q_PROJ, read_model, weights, write_family, write_model


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_family(tmp_path_factory.mktemp("family"), tasks=2)


def drm(family: dict[str, Any], out: Path, **more: Any) -> dict[str, Tensor]:
    merge({"merge_method": "drm", **family, **more}, out)
    return read_model(out)


def of_deltas(folder: Path, *deltas: Tensor, **parameters: Any) -> Tensor:
    """Return the merged delta of one matrix whose base is 0."""
    name = "model.layers.0.mlp.up_proj.weight"
    write_model(folder / "base", {name: torch.zeros_like(deltas[0])})
    for k, delta in enumerate(deltas):
        write_model(folder / f"m{k}", {name: delta})
    family = {
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"m{k}")} for k in range(len(deltas))],
    }
    return drm(family, folder / "out", parameters=parameters)[name]


def test_1_the_command_finishes_with_coefficients(family: dict[str, Any], tmp_path: Path) -> None:
    models = [{**entry, "parameters": {"weight": 0.5}} for entry in family["models"]]
    file = tmp_path / "merge.yaml"
    file.write_text(json.dumps({"merge_method": "drm", **family, "models": models}))
    options = ["--out", str(tmp_path / "half"), "--no-plot"]
    done = CliRunner().invoke(app, ["merge", str(file), *options])
    assert done.exit_code == 0, done.output
    half, whole = read_model(tmp_path / "half"), drm(family, tmp_path / "whole")
    base = weights(0)[DOWN]
    assert torch.allclose(half[DOWN] - base, (whole[DOWN] - base) / 2, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"direction": "vertical"}},
        {"parameters": {"drop": 0.3}},
        {"parameters": {"renorm": False}},
        {"parameters": {"elect": False}},
        {"parameters": {"rank_tolerance": 0.5}},
        {"parameters": {"weight": [{"filter": "q_proj", "value": 0.1}]}},
        {"rules": [{"match": "q_proj", "merge_method": "base"}]},
    ],
)
def test_2_every_key_of_the_file_counts(
    change: dict[str, Any], family: dict[str, Any], tmp_path: Path
) -> None:
    plain, changed = drm(family, tmp_path / "plain"), drm(family, tmp_path / "changed", **change)
    assert not torch.allclose(plain[Q_PROJ], changed[Q_PROJ], atol=1e-4)


def test_2_a_key_that_does_not_exist_is_refused(family: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="direktion"):
        drm(family, tmp_path / "out", parameters={"direktion": "vertical"})


def test_3_frozen_layers_give_no_nan(family: dict[str, Any], tmp_path: Path) -> None:
    base = weights(0)
    frozen = {**weights(1), Q_PROJ: base[Q_PROJ], DOWN: base[DOWN]}
    write_model(tmp_path / "frozen", frozen)
    other = {**weights(2), DOWN: base[DOWN]}
    write_model(tmp_path / "other", other)
    models = [{"model": str(tmp_path / "frozen")}, {"model": str(tmp_path / "other")}]
    result = drm(family, tmp_path / "out", models=models)
    assert all(torch.isfinite(tensor).all() for tensor in result.values())
    assert torch.equal(result[DOWN], base[DOWN])
    assert not torch.equal(result[Q_PROJ], base[Q_PROJ])


def test_4_orthogonal_tasks_of_rank_one_add_up(tmp_path: Path) -> None:
    u, _ = torch.linalg.qr(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)))
    v = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    deltas = [(k + 1.0) * torch.outer(u[:, k], v[k]) for k in range(3)]
    result = of_deltas(tmp_path, *deltas, drop=0.0)
    assert torch.allclose(result, deltas[0] + deltas[1] + deltas[2], atol=1e-5)


def test_5_without_drop_signs_and_coefficients_count(
    family: dict[str, Any], tmp_path: Path
) -> None:
    none = drm(family, tmp_path / "none", parameters={"drop": 0.0})
    half = drm(family, tmp_path / "half", parameters={"drop": 0.0, "weight": 0.5})
    tiny = drm(family, tmp_path / "tiny", parameters={"drop": 1e-9})
    base = weights(0)[DOWN]
    mean = (weights(1)[DOWN] + weights(2)[DOWN]) / 2
    assert not torch.allclose(none[DOWN], mean, atol=1e-3)
    assert torch.allclose(half[DOWN] - base, (none[DOWN] - base) / 2, atol=1e-6)
    assert torch.allclose(tiny[DOWN], none[DOWN], atol=1e-6)


@pytest.mark.parametrize("drop", [0.0, 0.8])
def test_6_a_task_and_its_opposite_leave_the_base(drop: float, tmp_path: Path) -> None:
    delta = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    assert not of_deltas(tmp_path, delta, -delta, drop=drop).any()


def test_7_the_switch_of_signs_reaches_matrices_and_nothing_is_printed(
    family: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parameters = {"elect": False, "drop": 0.0, "rank_tolerance": 0.0}
    result = drm(family, tmp_path / "out", parameters=parameters)
    mean = (weights(1)[DOWN] + weights(2)[DOWN]) / 2
    assert torch.allclose(result[DOWN], mean, atol=1e-5)
    assert capfd.readouterr() == ("", "")
