"""One job of a merge: read a parameter of all models, merge it, write it. Runs on any worker."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.checkpoints.models import SourceModel, SourceModels
from raymix.merging.checkpoints.output import write_tensor
from raymix.merging.registry import Deltas, Factors, Merged, MergeMethod, Options
from raymix.merging.run.measure import measure, measure_factors
from raymix.merging.run.plan import Plan
from raymix.merging.run.settings import MethodChoice, is_matrix


def merge_job(plan: Plan, job: str, folder: str) -> dict[str, Any]:
    """Return the journal's line for a job, its tensors written in `folder`.

    Raises:
        MergeError: If an input holds NaN or Inf, or the result does not fit the output's dtype.
    """
    choice = plan.choices[job]
    if plan.models is None:
        return _merge_adapters(plan, job, choice, folder)
    tensor, report = _merge_parameter(plan, plan.models, job, choice)
    return {"crc32": {job: write_tensor(folder, plan.layout.places[job], tensor)}, "report": report}


def hash_file(path: str) -> str:
    """Return a file's SHA-256: the name that the Hub's storage has for it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _merge_parameter(
    plan: Plan, models: SourceModels, name: str, choice: MethodChoice
) -> tuple[Tensor, dict[str, Any]]:
    """Return the merged parameter in the output's dtype, and what the report says of it."""
    place = plan.layout.places[name]
    stored = models.first.checkpoint.read(name)
    about: dict[str, Any] = {"shape": list(place.shape)}
    if not stored.dtype.is_floating_point or not stored.numel():
        _check_equal(models, name, stored)
        return stored, about | {"method": "copied"}
    if choice.method is None or choice.options is None:
        return stored.to(place.dtype), about | {"method": "base"}
    method = choice.method
    deltas, base = _deltas(plan, models, name, method)
    measures = measure(deltas)
    about |= {"method": method.name} | measures.document()
    if not torch.isfinite(measures.gram_KK).all():
        _refuse_non_finite(models, name)
    if base is not None and not measures.gram_KK.any():  # frozen everywhere: exactly the base
        return base.to(place.dtype), about | {"delta_norm": 0.0}
    merged = _applied(method, name, deltas, choice.options, base)
    norm = float(torch.linalg.vector_norm(merged.delta))
    about |= {"delta_norm": float(f"{norm:.6g}"), "kept": merged.kept, "rank": merged.rank}
    out = _finished(merged.delta, base, place.dtype)
    if not math.isfinite(norm) or (
        place.dtype == torch.float16 and not bool(torch.isfinite(out).all())
    ):
        raise MergeError.at(
            "out_dtype",
            _dtype_name(place.dtype),
            f"values of the merged {name!r} do not fit {_dtype_name(place.dtype)}",
            fix="Lower weights or lambda, or set out_dtype: float32",
        )
    return out, about


def _deltas(
    plan: Plan, models: SourceModels, name: str, method: MergeMethod
) -> tuple[Deltas, Tensor | None]:
    """Return the task vectors (or the models) that a method gets, and the base it works from."""
    dtype, merged = plan.dtype, plan.members(method)
    if method.base == "first":
        merged = [models.first, *merged]
    if method.base in ("none", "first") or models.base is None:
        parts = [model.read(name, dtype) for model in merged]
        return Deltas(parts, dtype=dtype, device=plan.device), None
    base = models.base.read(name, dtype)
    found = [_part(model, models.base, name, dtype) for model in merged]
    parts = [part for part, _ in found]
    bases = [None if is_delta else base for _, is_delta in found]
    return Deltas(parts, bases, dtype=dtype, device=plan.device), base


def _part(
    model: SourceModel, base: SourceModel, name: str, dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """Return a model's tensor, or its delta where that is known without a subtraction."""
    delta = model.delta(name, dtype)
    if delta is not None and base.adapter is None and model.checkpoint is base.checkpoint:
        return delta, True
    return model.read(name, dtype), False


def _applied(
    method: MergeMethod, name: str, deltas: Deltas, options: Options, base: Tensor | None
) -> Merged:
    """Return what the method makes of a parameter; experts one by one."""
    options = _seeded(options, name)
    function = method.function
    if method.matrix and not is_matrix(name, deltas.shape):
        function = method.otherwise or method.function
    elif method.matrix and len(deltas.shape) == 3:
        parts = [_called(function, base, expert, options) for expert in deltas.unstacked()]
        kept = [part.kept for part in parts if part.kept is not None]
        ranks = [part.rank for part in parts if part.rank is not None]
        return Merged(
            torch.stack([part.delta for part in parts]),
            kept=sum(kept) / len(kept) if kept else None,
            rank=max(ranks, default=None),
        )
    return _called(function, base, deltas, options)


def _called(function: Any, base: Tensor | None, deltas: Deltas, options: Options) -> Merged:
    found = function(base, deltas, options)
    return found if isinstance(found, Merged) else Merged(found)


def _seeded(options: Options, name: str) -> Options:
    """Return the options with a seed of the parameter's own, where the method draws."""
    if "seed" not in type(options).model_fields:
        return options
    text = f"{options.model_dump()['seed']}:{name}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "little")
    return options.model_copy(update={"seed": seed})


def _finished(delta: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return base + delta in the output's dtype, on the CPU; overwrites `delta` chunk by chunk."""
    if delta.device.type != "cpu":
        base = None if base is None else base.to(delta.device, delta.dtype)
        return (delta if base is None else delta + base).to(dtype).cpu()
    if base is None:
        return delta.to(dtype)
    out = torch.empty(delta.shape, dtype=dtype)
    flat, target, under = delta.reshape(-1), out.view(-1), base.reshape(-1)
    step = 1 << 17
    for start in range(0, flat.numel(), step):
        part = slice(start, start + step)
        target[part] = flat[part].add_(under[part].to(flat.dtype))
    return out


def _check_equal(models: SourceModels, name: str, stored: Tensor) -> None:
    for model in models.every()[1:]:
        if not torch.equal(model.checkpoint.read(name), stored):
            raise MergeError.at(
                model.field,
                model.label,
                f"{name!r} holds whole numbers that differ from those of {models.first.label}",
                fix="They cannot be merged",
            )


def _refuse_non_finite(models: SourceModels, name: str) -> None:
    """Raise MergeError that names the model whose tensor is at fault, if one is."""
    for model in models.every():
        tensor = model.read(name, torch.float32)
        if not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "Inf"
            raise MergeError.at(
                model.field,
                model.label,
                f"tensor {name!r} holds {kind}",
                fix="A model with such weights does not work; leave it out",
            )


def _merge_adapters(plan: Plan, module: str, choice: MethodChoice, folder: str) -> dict[str, Any]:
    """Merge a module of LoRA adapters into factors, padded with zeros to the rank laid out."""
    if choice.method is None or choice.method.factored is None:
        raise MergeError.at("rules", module, "an adapter has no base to keep")
    m, n = next(a.shape(module) for a in plan.adapters if module in a.scale)
    zeros = partial(torch.zeros, dtype=torch.float64, device=plan.device)
    nothing = Factors(zeros(m, 0), zeros(0, n))
    factors = [
        adapter.factors(module, torch.float64, plan.device) if module in adapter.scale else nothing
        for adapter in plan.adapters
    ]
    for adapter, own in zip(plan.adapters, factors, strict=True):
        if not (torch.isfinite(own.left).all() and torch.isfinite(own.right).all()):
            index = plan.adapters.index(adapter)
            raise MergeError.at(
                f"models.{index}.model", adapter.path, f"the factors of {module!r} hold NaN or Inf"
            )
    merged = choice.method.factored(factors, choice.options)
    right_name, left_name = plan.tensors(module)
    rank = plan.layout.places[right_name].shape[0]
    left, right = _fitted(merged, rank)
    sums = {}
    for name, tensor in ((right_name, right), (left_name, left)):
        place = plan.layout.places[name]
        sums[name] = write_tensor(folder, place, tensor.to("cpu", place.dtype))
    norm = measure_factors([merged]).norms[0]
    report = {"method": choice.method.name, "shape": [m, n], "rank": merged.left.shape[1]}
    measures = measure_factors(factors).document()
    return {"crc32": sums, "report": report | measures | {"delta_norm": float(f"{norm:.6g}")}}


def _fitted(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors with exactly `rank` directions: zeros added, or dependent ones joined."""
    left, right = factors.left, factors.right
    if left.shape[1] > rank:  # more factors than the matrix has rows or columns
        if left.shape[0] <= right.shape[1]:
            left, right = torch.eye(rank).to(left), left @ right
        else:
            left, right = left @ right, torch.eye(rank).to(left)
    more = rank - left.shape[1]
    return (
        torch.nn.functional.pad(left, (0, more)),
        torch.nn.functional.pad(right, (0, 0, 0, more)),
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
