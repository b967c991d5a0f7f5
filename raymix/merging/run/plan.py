"""From a merge file to a plan: every parameter with its method, its place and its sources.

All that can be wrong with the inputs short of their values is found here, before a byte is
written: tensors that are missing, extra, or of another shape, and options that do not fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from raymix.errors import MergeError, format_problem
from raymix.merging.checkpoints.adapter import Adapter, adapter_tensors
from raymix.merging.checkpoints.checkpoint import TensorSpec
from raymix.merging.checkpoints.models import (
    SourceModel,
    SourceModels,
    only_adapters,
    open_adapters,
    open_models,
)
from raymix.merging.checkpoints.output import CheckpointLayout, plan_checkpoint_layout
from raymix.merging.recipe import MergeFile
from raymix.merging.registry import MergeMethod
from raymix.merging.run.settings import MethodChoice, Settings, is_matrix, layer_of

_TORCH = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MOST_SHOWN = 3


@dataclass(slots=True)
class Plan:
    """A merge that can be carried out: read by every worker, changed by none."""

    file: MergeFile
    layout: CheckpointLayout
    choices: dict[str, MethodChoice]
    """Job to how it is merged: a parameter, or a module of adapters."""
    models: SourceModels | None = None
    adapters: tuple[Adapter, ...] = ()
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the arithmetic; fp64 checkpoints are not rounded to fp32."""
        specs = self.models.first.checkpoint.specs.values() if self.models else ()
        wide = any(spec.dtype == torch.float64 for spec in specs)
        return torch.float64 if wide else _TORCH[self.file.precision]

    def tensors(self, job: str) -> tuple[str, ...]:
        """Return the tensors of the output that a job writes."""
        return adapter_tensors(job) if self.adapters else (job,)

    def job_bytes(self, job: str) -> int:
        """Return about how much memory a job takes at most."""
        choice = self.choices[job]
        places = [self.layout.places[name] for name in self.tensors(job)]
        shape = places[0].shape
        if self.adapters:  # (rank, n) and (m, rank)
            shape = (shape[0], max(shape[1], places[1].shape[0]))
        itemsize = (torch.float64 if self.adapters else self.dtype).itemsize
        needed = 3 * itemsize * math.prod(shape)
        method = choice.method
        if method is not None and method.working_bytes is not None and is_matrix(job, shape):
            m, n = shape[-2:]  # experts are merged one by one
            count = len(self.members(method))
            needed += method.working_bytes((m, n), count, itemsize, choice.options)
        return needed

    def members(self, method: MergeMethod) -> Sequence[Any]:
        """Return the models that a method merges, in the order of their options."""
        if self.models is None:
            return self.adapters
        return members(self.models, method)

    def sources(self) -> list[tuple[str, list[str]]]:
        """Return every parent with the paths of its weights files."""
        if self.models is not None:
            return [(model.label, model.weight_files()) for model in self.models.every()]
        return [
            (a.path, [os.path.join(a.path, name) for name in a.weights.files()])
            for a in self.adapters
        ]

    def identity(self) -> str:
        """Return a hash of the merge, of the state of its input files, and of who computes."""
        files = [file for _, found in self.sources() for file in found]
        states = [(f, s.st_size, s.st_mtime_ns) for f in files for s in [os.stat(f)]]
        packages = [metadata.version(name) for name in ("raymix", "torch", "scipy")]
        made_by = [*packages, self.device]
        text = json.dumps([self.file.model_dump(mode="json"), states, made_by], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def members(models: SourceModels, method: MergeMethod) -> Sequence[SourceModel]:
    """Return the models that a method merges, the base not among them."""
    if method.base == "none" or (method.base == "optional" and models.base is None):
        return models.listed
    return models.tasks


def plan_merge(file: MergeFile, *, device: str = "cpu") -> Plan:
    """Return the plan of a merge file.

    Raises:
        MergeError: With one message per fault of the inputs.
    """
    if only_adapters(file):
        return _plan_adapters(file, device)
    models = open_models(file)
    specs = models.first.checkpoint.specs
    n_layers = 1 + max((layer_of(name) or 0 for name in specs), default=0)
    labels = [model.label for model in models.listed]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise MergeError.at("models", twice, "the same model is listed twice")
    own = dict(zip(labels, (entry.parameters for entry in file.models), strict=True))

    def scopes(method: MergeMethod) -> list[Mapping[str, Any]]:
        return [own[model.label] for model in members(models, method)]

    settings = Settings(file, scopes, n_layers)
    for method in settings.methods:
        _check_count(method, models)
    _check_tensors(models)
    out = _TORCH.get(file.out_dtype or file.dtype or "")
    wanted = {
        name: (out if out is not None and spec.dtype.is_floating_point else spec.dtype, spec.shape)
        for name, spec in specs.items()
    }
    choices = {name: settings.choice(name) for name in specs}
    return Plan(
        file, plan_checkpoint_layout(wanted, file.max_shard_bytes), choices, models, device=device
    )


def _check_count(method: MergeMethod, models: SourceModels) -> None:
    count = len(members(models, method))
    if method.base in ("required", "first") and models.base is None:
        raise MergeError.at(
            "base_model",
            None,
            f"{method.name} needs the model that the others come from",
            fix="Name its directory",
        )
    if count < method.least or (method.most is not None and count > method.most):
        most = "" if method.most is None else f" and at most {method.most}"
        besides = ", the base not counted" if models.base is not None else ""
        raise MergeError.at(
            "models", count, f"{method.name} merges at least {method.least}{most} models{besides}"
        )


def _check_tensors(models: SourceModels) -> None:
    """Raise MergeError for tensors that are not in all models, or not of one shape."""
    first = models.first
    expected = first.checkpoint.specs
    problems: list[str] = []
    for model in models.every()[1:]:
        specs = model.checkpoint.specs
        missing = [name for name in expected if name not in specs]
        extra = [name for name in specs if name not in expected]
        for names, wrong in ((missing, "lacks"), (extra, "has besides")):
            if names:
                fault = f"it {wrong} {_some(names)}, compared to {first.label}"
                problems.append(format_problem(model.field, model.label, fault, fix=_tied(names)))
        problems += _shape_problems(model, first, expected)
    if problems:
        raise MergeError(*problems)


def _shape_problems(
    model: SourceModel, first: SourceModel, expected: Mapping[str, TensorSpec]
) -> Iterable[str]:
    specs = model.checkpoint.specs
    wrong = [n for n, s in expected.items() if n in specs and specs[n].shape != s.shape]
    if not wrong:
        return
    name = wrong[0]
    here, there = specs[name].shape, expected[name].shape
    shapes = f"{name} is {list(here)} here and {list(there)} in {first.label}"
    more = f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else ""
    advice = "Only models of one architecture can be merged"
    if ("embed" in name or "lm_head" in name) and here[1:] == there[1:]:
        advice = (
            "The vocabularies differ: resize all models to one tokenizer first "
            "(`model.resize_token_embeddings`)"
        )
    yield format_problem(model.field, model.label, shapes + more, fix=advice)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_MOST_SHOWN]) + more


def _tied(names: Sequence[str]) -> str:
    if any("lm_head" in name for name in names):
        return "One of the models ties its embeddings: save all of them tied, or all untied"
    return "Merge models of one architecture, saved alike"


def _plan_adapters(file: MergeFile, device: str) -> Plan:
    """Return the plan of a merge of adapters into an adapter: a job per module."""
    adapters = open_adapters(file)
    scopes = [entry.parameters for entry in file.models]
    modules = list(dict.fromkeys(module for a in adapters for module in a.modules()))
    n_layers = 1 + max((layer_of(f"{module}.") or 0 for module in modules), default=0)
    settings = Settings(file, lambda method: scopes, n_layers)
    for method in settings.methods:
        if method.factored is None:
            wrong = f"{method.name} works on entries, so its result has no low rank"
            advice = "Use drm, knots, tsv, iso_c, iso_cts, linear or task_arithmetic, or set"
            raise MergeError.at(
                "merge_method", method.name, wrong, fix=f"{advice} base_model and output: model"
            )
    out = _TORCH.get(file.out_dtype or file.dtype or "")
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module in modules:
        having = [a for a in adapters if module in a.scale]
        shapes = {a.shape(module) for a in having}
        if len(shapes) > 1:
            raise MergeError.at(
                "models",
                module,
                f"the adapters have {module} in shapes {sorted(shapes)}",
                fix="Merge adapters of one base",
            )
        m, n = shapes.pop()
        rank = min(m, n, sum(a.rank(module) for a in having))
        dtype = out or having[0].spec(module).dtype
        a_name, b_name = adapter_tensors(module)
        wanted |= {a_name: (dtype, (rank, n)), b_name: (dtype, (m, rank))}
    choices = {module: settings.choice(f"{module}.weight") for module in modules}
    layout = plan_checkpoint_layout(wanted, sum_bytes(wanted), "adapter_model")
    return Plan(file, layout, choices, adapters=tuple(adapters), device=device)


def sum_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Return the size of tensors in bytes."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in tensors.values())
