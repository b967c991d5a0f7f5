r"""Merge files: YAML in mergekit's spirit, read strictly; mergekit's own files mean the same here.

    merge_method: drm
    base_model: base
    models:
      - model: math
        parameters: {weight: 1.0}
      - model: code
    parameters:
      direction: auto
      drop: [0.9, 0.7]                 # over the layers, first to last
    rules:
      - match: 'mlp\.down_proj'       # a regular expression on names
        layers: ["0-3"]
        merge_method: ties
        parameters: {density: 0.3}
      - match: embed_tokens
        merge_method: base             # the base's bytes

A parameter is a value, a list over the layers (interpolated), or mergekit's `{filter, value}`
entries. Where several places set it, the model's comes first, then the rules', then the file's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from raymix._utils.yaml import parse_yaml
from raymix.errors import MergeError, RecipeError
from raymix.recipe.base import Fault, Faults, Integer, RecipeModel
from raymix.recipe.overrides import apply_overrides
from raymix.recipe.translate import translate

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
KEEP_BASE = "base"
"""The method of a rule that leaves the base's bytes."""


class ModelEntry(RecipeModel):
    """One model to merge."""

    model: str = Field(min_length=1)
    """A Hugging Face directory, a PEFT adapter's directory, or `MODEL+ADAPTER`."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Options of this model."""


class SliceSource(ModelEntry):
    """A model's layers in a slice; only all of them are supported."""

    layer_range: tuple[Integer, Integer]
    """First layer, and the one after the last."""


class OutputSlice(RecipeModel):
    """mergekit's way to name layers; one slice of all layers is read as `models`."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    """The models."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Options of the slice."""


class ParameterRule(RecipeModel):
    """Another method, or other options, for parameters by name and layer."""

    match: str = ""
    """A regular expression that is searched for in the parameter's name."""
    layers: tuple[Integer | str, ...] = ()
    """Layer numbers, or ranges such as `0-3`; none: any layer, and parameters of no layer."""
    merge_method: str | None = None
    """Another method, or `base` to keep the base's bytes."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Options that hold here."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise Faults(Fault("", value, f"not a regular expression: {error}")) from None
        return value

    @field_validator("layers")
    @classmethod
    def _is_range(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for item in value:
            if isinstance(item, str) and not re.fullmatch(r"\d+-\d+", item):
                raise Faults(Fault("", item, "not a layer number or a range such as 0-3"))
        return value

    def applies(self, name: str, layer: int | None) -> bool:
        """Return whether the rule is about the parameter `name` of `layer`."""
        if not re.search(self.match, name):
            return False
        return not self.layers or (layer is not None and any(_in(layer, r) for r in self.layers))


class MergeFile(RecipeModel):
    """A merge: what is merged, how, and in what form it is written."""

    merge_method: str
    """The method; see `raymix.merge` for which one when."""
    models: tuple[ModelEntry, ...] = ()
    """The models to merge; the base need not be among them."""
    slices: tuple[OutputSlice, ...] | None = None
    """mergekit's layer ranges: one slice that holds all layers."""
    base_model: str | None = None
    """The model that the others were fine-tuned from."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Options for all models and parameters."""
    rules: tuple[ParameterRule, ...] = ()
    """Exceptions by name and layer; of several that apply, the first that says something."""
    dtype: Dtype | None = None
    """The dtype of the output, if `out_dtype` does not say; arithmetic is `precision`'s."""
    out_dtype: Dtype | None = None
    """The dtype of the output; else that of the base (or first) model, tensor by tensor."""
    precision: Literal["float32", "float64"] = "float32"
    """The dtype of all arithmetic; Gram matrices are fp64 in either."""
    output: Literal["model", "adapter"] | None = None
    """`adapter`: write a LoRA adapter; else if there are only adapters and no base."""
    tokenizer_source: str | None = None
    """`base`, or the path of one of the models; the tokenizers must agree in any case."""
    check_tokenizer: bool = True
    """Whether models with another tokenizer than the base are refused."""
    max_shard_bytes: Annotated[Integer, Field(ge=1)] = 5_000_000_000
    """The most bytes of a weights file, one tensor at least."""
    allow_pickle: bool = False
    """Whether `.bin` checkpoints are read, by torch's loader that takes weights only."""
    name: str | None = None
    """A name, for the model card."""


def load_merge(
    source: str | os.PathLike[str] | Mapping[str, Any] | MergeFile, overrides: Sequence[str] = ()
) -> MergeFile:
    """Return a merge file with its model paths made absolute.

    Args:
        source: A YAML file, its content as a mapping, or a MergeFile. Relative model paths start
            at the file's directory, or at the working directory where they are not there.
        overrides: Changes such as `parameters.drop=0.5`; values are YAML.

    Raises:
        MergeError: With one message per fault.
    """
    if isinstance(source, MergeFile):
        source = source.model_dump(mode="json", exclude_unset=True)
    folder = os.getcwd()
    try:
        if isinstance(source, Mapping):
            data = dict(source)
        else:
            folder = os.path.dirname(os.path.abspath(source))
            data = _read(os.fspath(source))
        data = apply_overrides(data, overrides, MergeFile)
        found = MergeFile.model_validate(_plain(data))
    except RecipeError as error:
        raise MergeError(*error.problems) from None
    except ValidationError as error:
        messages = translate(error.errors(include_url=False), MergeFile)
        raise MergeError(*dict.fromkeys(messages)) from None
    return _resolved(_without_slices(found), folder)


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise MergeError.at(
            "merge",
            path,
            "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror),
        ) from None
    except UnicodeDecodeError:
        raise MergeError.at("merge", path, "not UTF-8 text") from None
    data = parse_yaml(text, name="merge", value=path)
    if not isinstance(data, dict):
        raise MergeError.at("merge", path, "not a mapping of keys to values")
    return data


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """Return mergekit's forms in ours: empty keys absent, dicts for tokenizers refused."""
    data = {key: value for key, value in data.items() if value is not None}
    for key, advice in _UNSUPPORTED.items():
        if key in data:
            raise MergeError.at(key, _short(data[key]), "not supported here", fix=advice)
    for entry in data.get("models", []) if isinstance(data.get("models"), list) else []:
        if isinstance(entry, dict) and entry.get("parameters", {}) is None:
            del entry["parameters"]
    return data


_UNSUPPORTED = {
    "modules": "List the models under `models`",
    "tokenizer": "The models' tokenizers must be the same; it is copied",
    "chat_template": "Edit the output's chat_template.jinja afterwards",
}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _without_slices(found: MergeFile) -> MergeFile:
    """Return the file with its one slice of all layers written as `models`."""
    if found.slices is None:
        if not found.models:
            raise MergeError.at("models", [], "no models to merge")
        return found
    if found.models:
        raise MergeError.at("slices", "...", "`models` says it, too", fix="Keep one of the two")
    ranges = {source.layer_range for part in found.slices for source in part.sources}
    if len(found.slices) != 1 or len(ranges) != 1 or min(ranges)[0] != 0:
        raise MergeError.at(
            "slices",
            _short(sorted(ranges)),
            "only one slice of the same layers, from 0, of each model is supported",
            fix="Models put together from layers of others are not merged weight by weight",
        )
    only = found.slices[0]
    models = tuple(ModelEntry(model=s.model, parameters=s.parameters) for s in only.sources)
    both = {**found.parameters, **only.parameters}
    return found.model_copy(update={"models": models, "parameters": both})


def _resolved(found: MergeFile, folder: str) -> MergeFile:
    models = tuple(
        entry.model_copy(update={"model": _absolute(entry.model, folder)}) for entry in found.models
    )
    base = None if found.base_model is None else _absolute(found.base_model, folder)
    source = found.tokenizer_source
    if source is not None and source != "base":
        source = _absolute(source, folder)
    return found.model_copy(
        update={"models": models, "base_model": base, "tokenizer_source": source}
    )


def _absolute(path: str, folder: str) -> str:
    """Return `MODEL` or `MODEL+ADAPTER` with absolute paths."""
    whole = _place(path, folder)
    if os.path.exists(whole) or "+" not in path:
        return whole
    model, _, adapter = path.partition("+")
    return f"{_place(model, folder)}+{_place(adapter, folder)}"


def _place(path: str, folder: str) -> str:
    expanded = os.path.expanduser(path)
    beside = os.path.normpath(os.path.join(folder, expanded))
    here = os.path.abspath(expanded)
    return beside if os.path.exists(beside) or not os.path.exists(here) else here


def _in(layer: int, entry: int | str) -> bool:
    if isinstance(entry, int):
        return layer == entry
    first, _, last = entry.partition("-")
    return int(first) <= layer <= int(last)
