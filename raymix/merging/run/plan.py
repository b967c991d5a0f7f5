"""Plan of a merge: method, options and output location of all parameters.

All faults of the inputs but those of their values are raised here, before a byte is written:
tensors that are missing, extra, or of another shape, and options that do not fit.
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
    open_adapters,
    open_models,
    writes_adapter,
)
from raymix.merging.checkpoints.output import CheckpointLayout, plan_checkpoint_layout
from raymix.merging.recipe import MergeFile
from raymix.merging.registry import MergeMethod
from raymix.merging.run.settings import MethodChoice, OptionResolver, is_matrix, layer_of

_TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MAX_NAMES_SHOWN = 3
# Copies of a parameter that any method needs: a work buffer, the delta, the output.
_MATRIX_COPIES = 3


@dataclass(slots=True)
class MergePlan:
    """A checked merge; workers read it and never change it."""

    file: MergeFile
    layout: CheckpointLayout
    choices: dict[str, MethodChoice]
    """Method and options by job: a parameter's name, or a module of adapters."""
    models: SourceModels | None = None
    adapters: tuple[Adapter, ...] = ()
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the arithmetic; fp64 checkpoints are not rounded to fp32."""
        specs = self.models.first.checkpoint.specs.values() if self.models else ()
        has_float64 = any(spec.dtype == torch.float64 for spec in specs)
        return torch.float64 if has_float64 else _TORCH_DTYPES[self.file.precision]

    def tensors(self, job: str) -> tuple[str, ...]:
        """Return the names of the output's tensors that a job writes."""
        return adapter_tensors(job) if self.adapters else (job,)

    def job_bytes(self, job: str) -> int:
        """Return an estimate of a job's peak working memory, in bytes."""
        choice = self.choices[job]
        shapes = [self.layout.locations[name].shape for name in self.tensors(job)]
        shape = shapes[0]
        if self.adapters:  # (rank, n) and (m, rank)
            shape = (shape[0], max(shape[1], shapes[1][0]))
        # Adapters are merged in fp64 whatever the precision, see `work`.
        itemsize = (torch.float64 if self.adapters else self.dtype).itemsize
        n_bytes = _MATRIX_COPIES * itemsize * math.prod(shape)
        method = choice.method
        if method is not None and method.working_bytes is not None and is_matrix(job, shape):
            m, n = shape[-2:]  # experts are merged one by one
            k_tasks = len(self.members(method))
            n_bytes += method.working_bytes((m, n), k_tasks, itemsize, choice.options)
        return n_bytes

    def members(self, method: MergeMethod) -> Sequence[Any]:
        """Return the models that a method merges, in the order of their options."""
        if self.models is None:
            return self.adapters
        return members(self.models, method)

    def sources(self) -> list[tuple[str, list[str]]]:
        """Return the label and the paths of the weights files of each parent."""
        if self.models is not None:
            return [(model.label, model.weight_files()) for model in self.models.unique()]
        return [
            (a.path, [os.path.join(a.path, name) for name in a.weights.files()])
            for a in self.adapters
        ]

    def identity(self) -> str:
        """Return a hash of the merge file, the state of the inputs, and the environment.

        A run resumes only with an equal hash, as tensors of another environment could differ in
        their last bits.
        """
        files = [file for _, paths in self.sources() for file in paths]
        # Size and time instead of contents: reading all inputs would take as long as a merge.
        states = [(f, s.st_size, s.st_mtime_ns) for f in files for s in [os.stat(f)]]
        packages = [metadata.version(name) for name in ("raymix", "torch", "scipy")]
        environment = [*packages, self.device]
        text = json.dumps([self.file.model_dump(mode="json"), states, environment], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def members(models: SourceModels, method: MergeMethod) -> Sequence[SourceModel]:
    """Return the models that a method merges, without the base where the method has one."""
    if method.base == "none" or (method.base == "optional" and models.base is None):
        return models.listed
    return models.tasks


def plan_merge(file: MergeFile, *, device: str = "cpu") -> MergePlan:
    """Return the plan of a merge file.

    Raises:
        MergeError: With one message per fault of the inputs.
    """
    if writes_adapter(file):
        return _plan_adapters(file, device)
    models = open_models(file)
    specs = models.first.checkpoint.specs
    n_layers = 1 + max((layer_of(name) or 0 for name in specs), default=0)
    labels = [model.label for model in models.listed]
    if len(set(labels)) < len(labels):
        duplicate = next(label for label in labels if labels.count(label) > 1)
        raise MergeError.at("models", duplicate, "the same model is listed twice")
    parameters_by_label = dict(
        zip(labels, (entry.parameters for entry in file.models), strict=True)
    )

    # Per method, because the base counts as a model for some methods and not for others.
    def scopes(method: MergeMethod) -> list[Mapping[str, Any]]:
        return [parameters_by_label[model.label] for model in members(models, method)]

    resolver = OptionResolver(file, scopes, n_layers)
    for method in resolver.methods:
        _check_count(method, models)
    _check_tensors(models)
    out = _TORCH_DTYPES.get(file.out_dtype or file.dtype or "")
    # Integer tensors are copied, so out_dtype does not apply to them.
    tensors = {
        name: (out if out is not None and spec.dtype.is_floating_point else spec.dtype, spec.shape)
        for name, spec in specs.items()
    }
    choices = {name: resolver.resolve(name) for name in specs}
    layout = plan_checkpoint_layout(tensors, file.max_shard_bytes)
    return MergePlan(file, layout, choices, models, device=device)


def _check_count(method: MergeMethod, models: SourceModels) -> None:
    """Raise MergeError unless a method's base is given and its number of models allowed."""
    count = len(members(models, method))
    if method.base in ("required", "first") and models.base is None:
        raise MergeError.at(
            "base_model",
            None,
            f"{method.name} needs the model that the others were fine-tuned from",
            fix="Name its directory",
        )
    if count < method.min_models or (method.max_models is not None and count > method.max_models):
        limit = "" if method.max_models is None else f" and at most {method.max_models}"
        note = ", the base not counted" if models.base is not None else ""
        raise MergeError.at(
            "models",
            count,
            f"{method.name} merges at least {method.min_models}{limit} models{note}",
        )


def _check_tensors(models: SourceModels) -> None:
    """Raise MergeError for tensors that are missing in a model, extra, or of another shape."""
    first = models.first
    expected = first.checkpoint.specs
    problems: list[str] = []
    for model in models.unique()[1:]:
        specs = model.checkpoint.specs
        missing = [name for name in expected if name not in specs]
        extra = [name for name in specs if name not in expected]
        for names, verb in ((missing, "lacks"), (extra, "also has")):
            if names:
                problem = f"it {verb} {_quote_names(names)}, compared to {first.label}"
                fix = _name_advice(names)
                problems.append(format_problem(model.field, model.label, problem, fix=fix))
        problems += _shape_problems(model, first, expected)
    if problems:
        raise MergeError(*problems)


def _shape_problems(
    model: SourceModel, first: SourceModel, expected: Mapping[str, TensorSpec]
) -> Iterable[str]:
    """Yield one message on all tensors of a model whose shapes differ from the first model's."""
    specs = model.checkpoint.specs
    differing = [n for n, s in expected.items() if n in specs and specs[n].shape != s.shape]
    if not differing:
        return
    name = differing[0]
    shape, first_shape = specs[name].shape, expected[name].shape
    shapes = f"{name} is {list(shape)} here and {list(first_shape)} in {first.label}"
    count = f" ({len(differing)} tensors differ)" if len(differing) > 1 else ""
    advice = "Only models of one architecture can be merged"
    # Only the first dimension differs: the same model with added tokens.
    if ("embed" in name or "lm_head" in name) and shape[1:] == first_shape[1:]:
        advice = (
            "The vocabularies differ: resize all models to one tokenizer first "
            "(`model.resize_token_embeddings`)"
        )
    yield format_problem(model.field, model.label, shapes + count, fix=advice)


def _quote_names(names: Sequence[str]) -> str:
    """Return the first names, quoted, and the number of the rest."""
    n_hidden = len(names) - _MAX_NAMES_SHOWN
    rest = f" and {n_hidden} more" if n_hidden > 0 else ""
    return ", ".join(repr(name) for name in names[:_MAX_NAMES_SHOWN]) + rest


def _name_advice(names: Sequence[str]) -> str:
    # safetensors stores shared memory once: tied embeddings are saved without an lm_head.
    if any("lm_head" in name for name in names):
        return "One of the models ties its embeddings: save all of them tied, or all untied"
    return "Merge models of one architecture, saved alike"


def _plan_adapters(file: MergeFile, device: str) -> MergePlan:
    """Return the plan of merging adapters into an adapter: one job per module."""
    adapters = open_adapters(file)
    scopes = [entry.parameters for entry in file.models]
    # The union in order of appearance: adapters may adapt different modules.
    modules = list(dict.fromkeys(module for a in adapters for module in a.modules()))
    n_layers = 1 + max((layer_of(f"{module}.") or 0 for module in modules), default=0)
    resolver = OptionResolver(file, lambda method: scopes, n_layers)
    for method in resolver.methods:
        if method.factored is None:
            problem = f"{method.name} works on entries, so its result has no low rank"
            advice = "Use drm, knots, tsv, iso_c, iso_cts, linear or task_arithmetic, or set"
            raise MergeError.at(
                "merge_method", method.name, problem, fix=f"{advice} base_model and output: model"
            )
    out = _TORCH_DTYPES.get(file.out_dtype or file.dtype or "")
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module in modules:
        adapting = [a for a in adapters if module in a.scale]
        shapes = {a.shape(module) for a in adapting}
        if len(shapes) > 1:
            raise MergeError.at(
                "models",
                module,
                f"the adapters have {module} in shapes {sorted(shapes)}",
                fix="Merge adapters of one base",
            )
        m, n = shapes.pop()
        # The rank of a sum is at most the sum of the ranks; the layout reserves that much.
        rank = min(m, n, sum(a.rank(module) for a in adapting))
        dtype = out or adapting[0].spec(module).dtype
        a_name, b_name = adapter_tensors(module)
        tensors |= {a_name: (dtype, (rank, n)), b_name: (dtype, (m, rank))}
    choices = {module: resolver.resolve(f"{module}.weight") for module in modules}
    # PEFT reads adapters from a single file, so the limit is the size of all tensors.
    layout = plan_checkpoint_layout(tensors, sum_bytes(tensors), "adapter_model")
    return MergePlan(file, layout, choices, adapters=tuple(adapters), device=device)


def sum_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Return the size of all tensors in bytes, from dtype and shape by name."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in tensors.values())
