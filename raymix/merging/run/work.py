"""Jobs of a merge: one per parameter (read, merge, write), and one per input file to hash.

A job depends on the plan alone, so that it runs on any thread or worker process.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.checkpoints.models import SourceModel, SourceModels
from raymix.merging.checkpoints.output import write_tensor
from raymix.merging.methods.eigen import single_threaded_blas
from raymix.merging.registry import Deltas, Factors, Merged, MergeMethod, Options
from raymix.merging.run.measure import measure, measure_factors
from raymix.merging.run.plan import MergePlan
from raymix.merging.run.settings import MethodChoice, is_matrix

JobResults = Generator[tuple[str, dict[str, Any]], None, None]
"""Finished jobs with their journal lines."""

HASH_PREFIX = "sha256:"
"""Prefix of the names of jobs that hash an input file."""
_HASH_JOB_BYTES = 1 << 20
# Entries per step of the final sum: 128 Ki fp32 values, 512 kB, stay in a core's cache.
_CHUNK_ENTRIES = 1 << 17


def run_job(plan: MergePlan, job: str, folder: str) -> dict[str, Any]:
    """Return the journal line of one job, run in this thread on one core."""
    if job.startswith(HASH_PREFIX):
        return {"sha256": hash_file(job.removeprefix(HASH_PREFIX))}
    return merge_job(plan, job, folder)


def job_bytes(plan: MergePlan, job: str) -> int:
    """Return the working memory of a job, in bytes."""
    return _HASH_JOB_BYTES if job.startswith(HASH_PREFIX) else plan.job_bytes(job)


def limit_scipy_threads(plan: MergePlan) -> contextlib.AbstractContextManager[None]:
    """Return a context that limits scipy's BLAS to one thread, if a job decomposes with it."""
    # A null context otherwise: loading scipy takes a third of a second.
    methods = (choice.method for choice in plan.choices.values())
    decomposes = plan.device == "cpu" and any(method and method.matrix_only for method in methods)
    return single_threaded_blas() if decomposes else contextlib.nullcontext()


def merge_job(plan: MergePlan, job: str, folder: str) -> dict[str, Any]:
    """Return the journal line of a job, after writing its tensors in `folder`.

    Raises:
        MergeError: If an input holds NaN or Inf, or the result does not fit the output's dtype.
    """
    choice = plan.choices[job]
    if plan.models is None:
        return _merge_adapters(plan, job, choice, folder)
    tensor, report = _merge_parameter(plan, plan.models, job, choice)
    checksum = write_tensor(folder, plan.layout.locations[job], tensor)
    return {"crc32": {job: checksum}, "report": report}


def hash_file(path: str) -> str:
    """Return a file's SHA-256, which the Hugging Face Hub shows for it, too."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _merge_parameter(
    plan: MergePlan, models: SourceModels, name: str, choice: MethodChoice
) -> tuple[Tensor, dict[str, Any]]:
    """Return the merged parameter in the output's dtype, and its entry in the report."""
    dtype = plan.layout.locations[name].dtype
    stored = models.first.checkpoint.read(name)
    report: dict[str, Any] = {"shape": list(stored.shape)}
    if not stored.dtype.is_floating_point or not stored.numel():
        # Integers are indices or masks (position_ids); a mean of them has no meaning.
        _check_equal(models, name, stored)
        return stored, report | {"method": "copied"}
    if choice.method is None or choice.options is None:
        return stored.to(dtype), report | {"method": "base"}
    method = choice.method
    deltas, base = _deltas(plan, models, name, method)
    measures = measure(deltas)
    report |= {"method": method.name} | measures.document()
    # NaN and Inf spread into the Gram matrix, so finite inputs need no pass of their own.
    if not torch.isfinite(measures.gram_KK).all():
        _raise_if_not_finite(models, name)
    if base is not None and not measures.gram_KK.any():  # frozen in all models: exactly the base
        return base.to(dtype), report | {"delta_norm": 0.0}
    merged = _apply_method(method, name, deltas, choice.options, base)
    norm = float(torch.linalg.vector_norm(merged.delta))
    report |= {"delta_norm": float(f"{norm:.6g}"), "kept": merged.density, "rank": merged.rank}
    out = _add_base(merged.delta, base, dtype)
    # A finite norm rules out Inf except in fp16, whose largest value is 65504.
    if not math.isfinite(norm) or (dtype == torch.float16 and not bool(torch.isfinite(out).all())):
        raise MergeError.at(
            "out_dtype",
            _dtype_name(dtype),
            f"values of the merged {name!r} do not fit {_dtype_name(dtype)}",
            fix="Lower weights or lambda, or set out_dtype: float32",
        )
    return out, report


def _deltas(
    plan: MergePlan, models: SourceModels, name: str, method: MergeMethod
) -> tuple[Deltas, Tensor | None]:
    """Return the input of a method, task vectors or models, and the base to add to its result."""
    dtype, members = plan.dtype, plan.members(method)
    if method.base == "first":
        members = [models.first, *members]
    if method.base in ("none", "first") or models.base is None:
        tensors = [model.read(name, dtype) for model in members]
        return Deltas(tensors, dtype=dtype, device=plan.device), None
    base = models.base.read(name, dtype)
    tasks = [_tensor_or_delta(model, models.base, name, dtype) for model in members]
    tensors = [tensor for tensor, _ in tasks]
    bases = [None if is_delta else base for _, is_delta in tasks]
    return Deltas(tensors, bases, dtype=dtype, device=plan.device), base


def _tensor_or_delta(
    model: SourceModel, base: SourceModel, name: str, dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """Return a model's tensor and False, or its delta and True where no subtraction is needed."""
    # (base + B A) - base in fp32 would lose the low bits of B A.
    delta = model.delta(name, dtype)
    if delta is not None and base.adapter is None and model.checkpoint is base.checkpoint:
        return delta, True
    return model.read(name, dtype), False


def _apply_method(
    method: MergeMethod, name: str, deltas: Deltas, options: Options, base: Tensor | None
) -> Merged:
    """Return a method's result for one parameter; stacked experts are merged one by one."""
    options = _with_parameter_seed(options, name)
    function = method.function
    if method.matrix_only and not is_matrix(name, deltas.shape):
        function = method.fallback or method.function
    elif method.matrix_only and len(deltas.shape) == 3:
        experts = [_call(function, base, expert, options) for expert in deltas.unstack()]
        densities = [expert.density for expert in experts if expert.density is not None]
        ranks = [expert.rank for expert in experts if expert.rank is not None]
        return Merged(
            torch.stack([expert.delta for expert in experts]),
            density=sum(densities) / len(densities) if densities else None,
            rank=max(ranks, default=None),
        )
    return _call(function, base, deltas, options)


def _call(function: Any, base: Tensor | None, deltas: Deltas, options: Options) -> Merged:
    result = function(base, deltas, options)
    # Methods of plug-ins may return the bare tensor.
    return result if isinstance(result, Merged) else Merged(result)


def _with_parameter_seed(options: Options, name: str) -> Options:
    """Return the options with a seed derived from the parameter's name, where a method draws."""
    if "seed" not in type(options).model_fields:
        return options
    # From the name, not from a shared generator: draws must not depend on the order of jobs.
    # blake2b, because Python's hash of a string differs between processes.
    text = f"{options.model_dump()['seed']}:{name}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "little")
    return options.model_copy(update={"seed": seed})


def _add_base(delta: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return base + delta in the output's dtype, on the CPU; overwrites `delta`."""
    if delta.device.type != "cpu":
        base = None if base is None else base.to(delta.device, delta.dtype)
        return (delta if base is None else delta + base).to(dtype).cpu()
    if base is None:
        return delta.to(dtype)
    out = torch.empty(delta.shape, dtype=dtype)
    delta_flat, out_flat, base_flat = delta.reshape(-1), out.view(-1), base.reshape(-1)
    # By chunks: base.to(fp32) at once would be another copy of the parameter.
    for start in range(0, delta_flat.numel(), _CHUNK_ENTRIES):
        chunk = slice(start, start + _CHUNK_ENTRIES)
        out_flat[chunk] = delta_flat[chunk].add_(base_flat[chunk].to(delta_flat.dtype))
    return out


def _check_equal(models: SourceModels, name: str, stored: Tensor) -> None:
    """Raise MergeError unless a tensor that is copied is the same in all models."""
    for model in models.unique()[1:]:
        if not torch.equal(model.checkpoint.read(name), stored):
            raise MergeError.at(
                model.field,
                model.label,
                f"{name!r} holds integers that differ from those of {models.first.label}",
                fix="Integers cannot be merged",
            )


def _raise_if_not_finite(models: SourceModels, name: str) -> None:
    """Raise MergeError for the first model whose tensor has NaN or Inf; return if none has."""
    # None has where finite values overflowed in the products of the Gram matrix.
    for model in models.unique():
        tensor = model.read(name, torch.float32)
        if not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "Inf"
            raise MergeError.at(
                model.field,
                model.label,
                f"tensor {name!r} holds {kind}",
                fix="A model with such weights does not work; leave it out",
            )


def _merge_adapters(
    plan: MergePlan, module: str, choice: MethodChoice, folder: str
) -> dict[str, Any]:
    """Return the journal line of a module of LoRA adapters, after writing its merged factors."""
    if choice.method is None or choice.method.factored is None:
        raise MergeError.at("rules", module, "an adapter has no base to keep")
    m, n = next(a.shape(module) for a in plan.adapters if module in a.scale)
    zeros = partial(torch.zeros, dtype=torch.float64, device=plan.device)
    # An adapter without this module still counts as a task, with a delta of rank 0.
    empty = Factors(zeros(m, 0), zeros(0, n))
    # Factors are small, so fp64 costs nothing here.
    factors = [
        adapter.factors(module, torch.float64, plan.device) if module in adapter.scale else empty
        for adapter in plan.adapters
    ]
    for adapter, pair in zip(plan.adapters, factors, strict=True):
        if not (torch.isfinite(pair.left).all() and torch.isfinite(pair.right).all()):
            index = plan.adapters.index(adapter)
            raise MergeError.at(
                f"models.{index}.model", adapter.path, f"the factors of {module!r} hold NaN or Inf"
            )
    merged = choice.method.factored(factors, choice.options)
    right_name, left_name = plan.tensors(module)
    rank = plan.layout.locations[right_name].shape[0]
    left, right = _fit_rank(merged, rank)
    checksums = {}
    for name, tensor in ((right_name, right), (left_name, left)):
        location = plan.layout.locations[name]
        checksums[name] = write_tensor(folder, location, tensor.to("cpu", location.dtype))
    norm = measure_factors([merged]).norms[0]
    report = {"method": choice.method.name, "shape": [m, n], "rank": merged.left.shape[1]}
    measures = measure_factors(factors).document()
    return {"crc32": checksums, "report": report | measures | {"delta_norm": float(f"{norm:.6g}")}}


def _fit_rank(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (m, rank) and (rank, n) of the same product.

    The file is laid out before the merge, whose rank depends on the values. A lower rank is padded
    with zeros; a higher one exceeds a side of the matrix, so one factor becomes the identity.
    """
    left, right = factors.left, factors.right
    if left.shape[1] > rank:
        if left.shape[0] <= right.shape[1]:
            left, right = torch.eye(rank).to(left), left @ right
        else:
            left, right = left @ right, torch.eye(rank).to(left)
    padding = rank - left.shape[1]
    return (
        torch.nn.functional.pad(left, (0, padding)),
        torch.nn.functional.pad(right, (0, 0, 0, padding)),
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
