"""Merging on a CUDA device: the CPU's results up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raymix.merging import known_methods
from raymix.merging.run.engine import merge
from tests.support.merging import read_model, write_family

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("method", known_methods())
def test_the_gpu_merges_as_the_cpu_does(method: str, tmp_path: Path) -> None:
    family = write_family(tmp_path, tasks=1 if method == "slerp" else 3)
    density = {"density": 0.5}
    prunes = method.startswith(("ties", "dare", "della", "breadcrumbs"))
    file = {
        "merge_method": method, "precision": "float64", "out_dtype": "float64",
        "parameters": density if prunes else {}, **family,
    }  # fmt: skip
    for device in ("cpu", "cuda"):
        merge(file, tmp_path / device, device=device)
    here, there = read_model(tmp_path / "cpu"), read_model(tmp_path / "cuda")
    for name, expected in here.items():
        assert torch.allclose(there[name], expected, rtol=1e-8, atol=1e-10), name
