"""The models of a merge: checkpoints, and checkpoints with an adapter on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raymix.errors import MergeError
from raymix.merging.checkpoints.adapter import Adapter, is_adapter, open_adapter
from raymix.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from raymix.merging.recipe import MergeFile


@dataclass(slots=True)
class SourceModel:
    """One model to merge."""

    label: str
    """Its path as messages, card and report show it."""
    field: str
    """Where the merge file names it."""
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a weight: as stored, or with the adapter's delta added in `dtype`."""
        stored = self.checkpoint.read(name)
        module = name.removesuffix(".weight")
        if self.adapter is None or module not in self.adapter.scale:
            return stored
        return stored.to(dtype) + self.adapter.delta(module, dtype)

    def delta(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return what the adapter adds to a weight; None for a model without an adapter."""
        if self.adapter is None:
            return None
        module = name.removesuffix(".weight")
        if module in self.adapter.scale:
            return self.adapter.delta(module, dtype)
        return torch.zeros((), dtype=dtype).expand(self.checkpoint.specs[name].shape)

    def weight_files(self) -> list[str]:
        """Return the paths of the files it is read from."""
        files = [os.path.join(self.checkpoint.path, name) for name in self.checkpoint.files()]
        if self.adapter is not None:
            weights = self.adapter.weights
            files += [os.path.join(weights.path, name) for name in weights.files()]
        return files


@dataclass(slots=True)
class SourceModels:
    """The base and the models of a merge, in the order of the file."""

    base: SourceModel | None
    listed: tuple[SourceModel, ...]

    @property
    def tasks(self) -> tuple[SourceModel, ...]:
        """Return the models without the base."""
        if self.base is None:
            return self.listed
        return tuple(model for model in self.listed if model.label != self.base.label)

    @property
    def first(self) -> SourceModel:
        """Return the model whose configuration, dtype and tokenizer the output has."""
        return self.base or self.listed[0]

    def every(self) -> list[SourceModel]:
        """Return all models, each once, the first one first."""
        return list({model.label: model for model in (self.first, *self.listed)}.values())


def only_adapters(file: MergeFile) -> bool:
    """Return whether the merge gives an adapter: asked for, or nothing but adapters are given."""
    if file.output is not None:
        return file.output == "adapter"
    return file.base_model is None and all(is_adapter(entry.model) for entry in file.models)


def open_adapters(file: MergeFile) -> list[Adapter]:
    """Return the adapters of a merge that gives an adapter.

    Raises:
        MergeError: If one of the models is none, or their bases differ.
    """
    found = []
    for index, entry in enumerate(file.models):
        path = entry.model.partition("+")[2] or entry.model
        if not is_adapter(path):
            raise MergeError.at(
                f"models.{index}.model",
                path,
                "not an adapter, and an adapter is to be written",
                fix="Set output: model",
            )
        found.append(open_adapter(path, f"models.{index}.model"))
    bases = {str(adapter.config.get("base_model_name_or_path")) for adapter in found}
    if len(bases) > 1:
        raise MergeError.at(
            "models",
            sorted(bases),
            "the adapters were trained on different bases",
            fix="Merge adapters of one base",
        )
    return found


def open_models(file: MergeFile) -> SourceModels:
    """Return the models of a merge file, their files checked and their adapters opened.

    Raises:
        MergeError: With one message per model that cannot be used.
    """
    opened: dict[str, Checkpoint] = {}
    problems: list[str] = []

    def get(path: str, field: str) -> Checkpoint:
        if path not in opened:
            opened[path] = open_checkpoint(path, field, allow_pickle=file.allow_pickle)
        return opened[path]

    def model(reference: str, field: str) -> SourceModel | None:
        try:
            return _open(reference, field)
        except MergeError as error:
            problems.extend(error.problems)
            return None

    def _open(reference: str, field: str) -> SourceModel:
        path, _, added = ("", "", "") if os.path.exists(reference) else reference.partition("+")
        if added:
            return SourceModel(reference, field, get(path, field), open_adapter(added, field))
        if not is_adapter(reference):
            return SourceModel(reference, field, get(reference, field))
        if file.base_model is None:
            raise MergeError.at(
                field,
                reference,
                "an adapter beside full models, and no base to add it to",
                fix="Set base_model",
            )
        adapter = open_adapter(reference, field)
        return SourceModel(reference, field, get(file.base_model, "base_model"), adapter)

    base = None if file.base_model is None else model(file.base_model, "base_model")
    listed = [model(entry.model, f"models.{i}.model") for i, entry in enumerate(file.models)]
    if problems:
        raise MergeError(*dict.fromkeys(problems))
    found = SourceModels(base, tuple(m for m in listed if m is not None))
    _check_adapters(found.listed)
    return found


def _check_adapters(models: Sequence[SourceModel]) -> None:
    """Raise MergeError if an adapter is for modules that its base does not have, or of a shape."""
    for model in models:
        for module in model.adapter.modules() if model.adapter else ():
            spec = model.checkpoint.specs.get(f"{module}.weight")
            shape = model.adapter.shape(module) if model.adapter else ()
            if model.adapter is not None and model.adapter.fan_in_fan_out:
                shape = shape[::-1]
            if spec is None or spec.shape != shape:
                has = "does not have" if spec is None else f"has in shape {spec.shape}"
                raise MergeError.at(
                    model.field,
                    model.label,
                    f"it changes {module} in shape {tuple(shape)}, which the base {has}",
                    fix="Name the base it was trained on",
                )
