"""Models of a merge: checkpoints, optionally with a LoRA adapter applied.

A reference is a checkpoint's directory, an adapter's directory (then its base is `base_model`), or
`MODEL+ADAPTER`. A merge writes an adapter where only adapters are given and no base.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymix._utils.hub import HUB
from raymix.errors import MergeError, StorageError
from raymix.merging.checkpoints.adapter import Adapter, is_adapter, open_adapter
from raymix.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from raymix.merging.recipe import MergeFile
from raymix.store.remote.hub import fetch_model, model_repo


@dataclass(slots=True)
class SourceModel:
    """One model to merge."""

    label: str
    """The path, as messages, model card and report show it."""
    field: str
    """Dotted path of the field that names it, for messages."""
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a weight: as stored, or with the adapter's delta added in `dtype`."""
        # Unadapted weights keep their stored dtype and stay memory-mapped.
        stored = self.checkpoint.read(name)
        module = name.removesuffix(".weight")
        if self.adapter is None or module not in self.adapter.scale:
            return stored
        return stored.to(dtype) + self.adapter.delta(module, dtype)

    def delta(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return the adapter's delta of a weight; None for a model without an adapter."""
        if self.adapter is None:
            return None
        module = name.removesuffix(".weight")
        if module in self.adapter.scale:
            return self.adapter.delta(module, dtype)
        # One zero with strides of 0: a delta of the full shape without its memory.
        return torch.zeros((), dtype=dtype).expand(self.checkpoint.specs[name].shape)

    def weight_files(self) -> list[str]:
        """Return the paths of its weights files, the adapter's included."""
        files = [os.path.join(self.checkpoint.path, name) for name in self.checkpoint.files()]
        if self.adapter is not None:
            weights = self.adapter.weights
            files += [os.path.join(weights.path, name) for name in weights.files()]
        return files


@dataclass(slots=True)
class SourceModels:
    """The base and the models of a merge, in the order of the merge file."""

    base: SourceModel | None
    listed: tuple[SourceModel, ...]
    """The models under `models`; the base may be among them."""

    @property
    def tasks(self) -> tuple[SourceModel, ...]:
        """Return the listed models without the base."""
        if self.base is None:
            return self.listed
        return tuple(model for model in self.listed if model.label != self.base.label)

    @property
    def first(self) -> SourceModel:
        """Return the model that the output has its configuration, dtypes and tokenizer from."""
        return self.base or self.listed[0]

    def unique(self) -> list[SourceModel]:
        """Return all models without duplicates, `first` at the front."""
        # A dict keeps the order of first insertion, so duplicates do not move a model.
        return list({model.label: model for model in (self.first, *self.listed)}.values())


def with_local_models(file: MergeFile) -> MergeFile:
    """Return a merge file whose models of the Hub are directories of the local cache.

    Raises:
        MergeError: With one message per model that cannot be downloaded.
    """
    problems: list[str] = []

    def local(reference: str | None, field: str) -> str | None:
        if reference is None or HUB not in reference:
            return reference
        parts = []
        for part in reference.split("+"):
            name, _, revision = part.partition("@")
            repo = model_repo(name, revision or None, field)
            try:
                # An adapter's directory has other weights than a model's.
                stems = ("model", "adapter_model")
                parts.append(part if repo is None else str(fetch_model(repo, stems)))
            except StorageError as error:
                problems.extend(error.problems)
        return "+".join(parts)

    source = file.tokenizer_source
    listed = [file.base_model, *(entry.model for entry in file.models)]
    changes: dict[str, Any] = {
        "models": tuple(
            entry.model_copy(update={"model": local(entry.model, f"models.{i}.model")})
            for i, entry in enumerate(file.models)
        ),
        "base_model": local(file.base_model, "base_model"),
        # Another one is refused where all are known.
        "tokenizer_source": local(source, "tokenizer_source") if source in listed else source,
    }
    if problems:
        raise MergeError(*dict.fromkeys(problems))
    return file.model_copy(update=changes)


def writes_adapter(file: MergeFile) -> bool:
    """Return whether the merge writes an adapter: by `output`, else if only adapters are given."""
    if file.output is not None:
        return file.output == "adapter"
    return file.base_model is None and all(is_adapter(entry.model) for entry in file.models)


def open_adapters(file: MergeFile) -> list[Adapter]:
    """Return the adapters of a merge that writes an adapter.

    Raises:
        MergeError: If one of the models is not an adapter, or their bases differ.
    """
    adapters = []
    for index, entry in enumerate(file.models):
        path = entry.model.partition("+")[2] or entry.model
        if not is_adapter(path):
            raise MergeError.at(
                f"models.{index}.model",
                path,
                "not an adapter, and an adapter is to be written",
                fix="Set output: model",
            )
        adapters.append(open_adapter(path, f"models.{index}.model"))
    # Compared as text: the bases need not be on this machine to merge adapters.
    bases = {str(adapter.config.get("base_model_name_or_path")) for adapter in adapters}
    if len(bases) > 1:
        raise MergeError.at(
            "models",
            sorted(bases),
            "the adapters were trained on different bases",
            fix="Merge adapters of one base",
        )
    return adapters


def open_models(file: MergeFile) -> SourceModels:
    """Return the models of a merge file, with their files checked and adapters opened.

    Raises:
        MergeError: With one message per model that cannot be used.
    """
    checkpoints: dict[str, Checkpoint] = {}
    problems: list[str] = []

    # One object per path: `run.work` compares checkpoints by identity to skip base - base.
    def checkpoint(path: str, field: str) -> Checkpoint:
        if path not in checkpoints:
            checkpoints[path] = open_checkpoint(path, field, allow_pickle=file.allow_pickle)
        return checkpoints[path]

    def open_or_collect(reference: str, field: str) -> SourceModel | None:
        try:
            return open_model(reference, field)
        except MergeError as error:
            problems.extend(error.problems)
            return None

    def open_model(reference: str, field: str) -> SourceModel:
        # A directory may have a "+" in its own name; an existing path is taken as it is.
        path, _, added = ("", "", "") if os.path.exists(reference) else reference.partition("+")
        if added:
            base_model = checkpoint(path, field)
            return SourceModel(reference, field, base_model, open_adapter(added, field))
        if not is_adapter(reference):
            return SourceModel(reference, field, checkpoint(reference, field))
        if file.base_model is None:
            raise MergeError.at(
                field,
                reference,
                "an adapter beside full models, and no base to add it to",
                fix="Set base_model",
            )
        adapter = open_adapter(reference, field)
        return SourceModel(reference, field, checkpoint(file.base_model, "base_model"), adapter)

    base = None if file.base_model is None else open_or_collect(file.base_model, "base_model")
    listed = [
        open_or_collect(entry.model, f"models.{i}.model") for i, entry in enumerate(file.models)
    ]
    if problems:
        # A fault of the base is met once per adapter on it, with the same message.
        raise MergeError(*dict.fromkeys(problems))
    models = SourceModels(base, tuple(m for m in listed if m is not None))
    _check_adapters(models.listed)
    return models


def _check_adapters(models: Sequence[SourceModel]) -> None:
    """Raise MergeError if an adapter does not fit its base: an absent module, another shape."""
    for model in models:
        for module in model.adapter.modules() if model.adapter else ():
            spec = model.checkpoint.specs.get(f"{module}.weight")
            shape = model.adapter.shape(module) if model.adapter else ()
            # Conv1D stores (inputs, outputs); the adapter's shape is always (outputs, inputs).
            if model.adapter is not None and model.adapter.fan_in_fan_out:
                shape = shape[::-1]
            if spec is None or spec.shape != shape:
                base_has = "does not have" if spec is None else f"has in shape {spec.shape}"
                raise MergeError.at(
                    model.field,
                    model.label,
                    f"it changes {module} in shape {tuple(shape)}, which the base {base_has}",
                    fix="Name the base it was trained on",
                )
