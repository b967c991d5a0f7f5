"""mergekit's own files give what mergekit gives: run by the real one, in an environment of its own.

`make .venv-mergekit` makes that environment; RAYMIX_MERGEKIT names another one's Python.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from raymix.merging.run.engine import merge
from tests.support.merging import read_model, weights, write_adapter, write_family
from tests.support.paths import ROOT

PYTHON = Path(os.environ.get("RAYMIX_MERGEKIT", ROOT / ".venv-mergekit" / "bin" / "python"))

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(),
    reason="mergekit is not installed: `make .venv-mergekit`, or set RAYMIX_MERGEKIT",
)

RUN_ALL = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, lazy_unpickle=False, quiet=True, random_seed=1)
for text, out in json.load(sys.stdin):
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options)
"""


def gta(method: str, first: str, second: str, shared: str = "") -> str:
    return f"""
models:
  - model: DIR/base
  - model: DIR/m1
    parameters: {{{first}}}
  - model: DIR/m2
    parameters: {{{second}}}
merge_method: {method}
base_model: DIR/base
parameters:
  normalize: false
  int8_mask: true
{shared}
dtype: float32
"""


FILES = {
    "linear": """
models:
  - model: DIR/m1
    parameters: {weight: 1.0}
  - model: DIR/m2
    parameters: {weight: 0.3}
merge_method: linear
dtype: float32
""",
    "linear_gradient": """
merge_method: linear
models:
  - model: DIR/m1
    parameters:
      weight:
        - filter: mlp
          value: [0, 0.5, 1]
        - value: 0.25
  - model: DIR/m2
    parameters: {weight: [1, 0.2]}
parameters: {normalize: false}
dtype: float32
""",
    "task_arithmetic": gta("task_arithmetic", "weight: 0.7", "weight: [0.2, 0.9]", "  lambda: 0.8"),
    "ties": gta("ties", "weight: 0.5, density: 0.4", "weight: 0.8, density: 0.55"),
    "ties_normalized": gta(
        "ties", "weight: 0.5, density: [1, 0.3]", "weight: 1, density: 0.6"
    ).replace("normalize: false", "normalize: true"),
    "breadcrumbs": gta(
        "breadcrumbs_ties", "weight: 0.5, density: 0.4", "weight: 1, density: 0.9, gamma: 0.05"
    ),
    "dare_ties": gta("dare_ties", "weight: 0.5, density: 0.5", "weight: 0.5, density: 0.5"),
    "slerp": """
slices:
  - sources:
      - model: DIR/m1
        layer_range: [0, 3]
      - model: DIR/m2
        layer_range: [0, 3]
merge_method: slerp
base_model: DIR/m1
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    "multislerp": gta("multislerp", "weight: 0.5", "weight: 0.8").replace(
        "  normalize: false\n  int8_mask: true", "  normalize_weights: true"
    ),
    "model_stock": gta("model_stock", "", "").replace(
        "  normalize: false\n  int8_mask: true", "  filter_wise: true"
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return, by name and dtype of the inputs, what mergekit made and what we made."""
    folder = tmp_path_factory.mktemp("mergekit")
    runs: list[tuple[str, str]] = []
    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        own = folder / str(dtype).removeprefix("torch.")
        write_family(own, tasks=2, dtype=dtype)
        for name, text in FILES.items():
            runs.append((text.replace("DIR", str(own)), str(own / f"theirs_{name}")))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(PYTHON), "-c", RUN_ALL], input=json.dumps(runs), env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for text, theirs in runs:
        ours = theirs.replace("theirs_", "ours_")
        file = Path(ours + ".yaml")
        file.write_text(text)
        merge(file, ours)
        path = Path(theirs)
        result[f"{path.parent.name}/{path.name.removeprefix('theirs_')}"] = (
            read_model(theirs),
            read_model(ours),
        )
    return result


def error(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """Return the largest difference of an entry, relative to the largest entry of its tensor."""
    assert set(theirs) == set(ours)
    assert all(theirs[name].dtype == ours[name].dtype for name in theirs)
    return max(float((theirs[n] - ours[n]).abs().max() / theirs[n].abs().max()) for n in theirs)


EXACT = [name for name in FILES if name != "dare_ties"]


@pytest.mark.parametrize("name", EXACT)
def test_the_same_file_gives_the_same_weights(name: str, results: Any) -> None:
    theirs, ours = results[f"float32/{name}"]
    assert yaml.safe_load(FILES[name])
    assert error(theirs, ours) < 2e-6


@pytest.mark.parametrize("name", [name for name in EXACT if "ties" not in name and name[0] != "b"])
def test_methods_that_do_not_trim_agree_on_bf16_too(name: str, results: Any) -> None:
    theirs, ours = results[f"bfloat16/{name}"]
    assert error(theirs, ours) < 2e-6


@pytest.mark.parametrize("name", ["ties", "ties_normalized", "breadcrumbs"])
def test_trimming_of_bf16_differs_at_ties_only(name: str, results: Any) -> None:
    """Deltas of bf16 weights take few values: we keep all that equal the threshold.

    mergekit keeps exactly k, so entries can differ, but only where a task's delta is tied there.
    """
    theirs, ours = results[f"bfloat16/{name}"]
    base = weights(0, torch.bfloat16)
    differing = total = 0
    for tensor, base_tensor in base.items():
        unlike = (theirs[tensor] - ours[tensor]).abs() > 2e-6
        differing += int(unlike.sum())
        total += unlike.numel()
        deltas = [
            (weights(k, torch.bfloat16)[tensor].float() - base_tensor.float()).abs() for k in (1, 2)
        ]
        tied = torch.zeros_like(unlike)
        for delta in deltas:
            values, inverse, counts = delta.unique(return_inverse=True, return_counts=True)
            assert len(values) == len(counts)
            tied |= counts[inverse] > 1
        # A change of one entry's mask is that of the entry alone.
        assert not (unlike & ~tied).any()
    assert 0 <= differing / total < 0.06


def test_random_drops_agree_in_distribution(results: Any) -> None:
    theirs, ours = results["float32/dare_ties"]
    base = weights(0)

    def flat(model: dict[str, Tensor]) -> Tensor:
        return torch.cat([(model[name] - base[name]).flatten() for name in base]).double()

    a, b = flat(theirs), flat(ours)
    assert float(a.norm()) == pytest.approx(float(b.norm()), rel=0.05)
    assert float((a != 0).double().mean()) == pytest.approx(
        float((b != 0).double().mean()), abs=0.03
    )
    assert float(a.abs().mean()) == pytest.approx(float(b.abs().mean()), rel=0.05)


WITH_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def test_peft_reads_the_adapter_that_we_write(tmp_path: Path) -> None:
    """Adapters merged as factors, then added by PEFT, are those merged into the base by us."""
    family = write_family(tmp_path, tasks=1)
    generator = torch.Generator().manual_seed(0)
    for name, rank in (("a", 3), ("b", 2)):
        modules = {
            f"model.layers.{layer}.{module}": (
                torch.randn(m, rank, generator=generator) * 0.1,
                torch.randn(rank, n, generator=generator) * 0.1,
            )
            for layer, module, m, n in (
                (0, "self_attn.q_proj", 16, 16), (1, "mlp.up_proj", 24, 16),
                (2, "mlp.down_proj", 16, 24),
            )[: rank]
        }  # fmt: skip
        write_adapter(tmp_path / name, modules, alpha=7, use_rslora=name == "a")
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    parameters = {"drop": 0.5}
    merge({"merge_method": "drm", "models": models, "parameters": parameters}, tmp_path / "adapter")
    with_base = {"merge_method": "drm", "models": models, "base_model": family["base_model"]}
    merge({**with_base, "parameters": parameters, "precision": "float64"}, tmp_path / "dense")
    command = [str(PYTHON), "-c", WITH_PEFT, family["base_model"], "adapter", "by_peft"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert error(read_model(tmp_path / "by_peft"), read_model(tmp_path / "dense")) < 2e-6
