r"""Merge files: a YAML recipe of a merge; mergekit's files are accepted with the same meaning.

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
        merge_method: base             # the base's bytes, unchanged

A parameter is a value, a list over the layers (interpolated), or a list of mergekit's
`{filter, value}` entries. Precedence: the model's own value, then that of a rule, then the file's.
Unlike mergekit, unknown keys are errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from raymix._utils.hub import HUB, is_hub_name
from raymix._utils.yaml import parse_yaml
from raymix.errors import MergeError, RecipeError
from raymix.recipe.base import Fault, Faults, Integer, RecipeModel
from raymix.recipe.overrides import apply_overrides
from raymix.recipe.translate import translate

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
KEEP_BASE = "base"
"""The `merge_method` of a rule that copies the base's bytes."""


class ModelEntry(RecipeModel):
    """One model to merge."""

    model: str = Field(min_length=1)
    """A Hugging Face directory, a PEFT adapter's directory, or `MODEL+ADAPTER`."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Options for this model only."""


class SliceSource(ModelEntry):
    """A model's layers in a slice; only all layers are supported."""

    layer_range: tuple[Integer, Integer]
    """First layer, and the layer after the last."""


class OutputSlice(RecipeModel):
    """mergekit's selection of layers; a single slice of all layers is read as `models`."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    """The models."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Options of the slice."""


class ParameterRule(RecipeModel):
    """A different method, or different options, for parameters selected by name and layer."""

    match: str = ""
    """A regular expression that is searched in the parameter's name."""
    layers: tuple[Integer | str, ...] = ()
    """Layer numbers, or ranges such as `0-3`; empty: all layers, and parameters outside layers."""
    merge_method: str | None = None
    """A different method, or `base` to copy the base's bytes."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Options for these parameters."""

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
        """Return whether the rule selects the parameter `name` of `layer` (None: of no layer)."""
        # Names alone cannot decide: "layers.1" is also the start of "layers.10".
        if not re.search(self.match, name):
            return False
        return not self.layers or (
            layer is not None and any(_in_range(layer, r) for r in self.layers)
        )


class MergeFile(RecipeModel):
    """A merge: the models, the method and the form of the output."""

    merge_method: str
    """The method; `raymix.merge` has a table of methods and when to use them."""
    models: tuple[ModelEntry, ...] = ()
    """The models to merge; the base need not be among them."""
    slices: tuple[OutputSlice, ...] | None = None
    """mergekit's layer ranges; a single slice of all layers is supported."""
    base_model: str | None = None
    """The model that the others were fine-tuned from."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Options for all models and parameters."""
    rules: tuple[ParameterRule, ...] = ()
    """Exceptions by name and layer; of several that apply, the first that sets a value wins."""
    dtype: Dtype | None = None
    """The dtype of the output where `out_dtype` is not set; arithmetic uses `precision`."""
    out_dtype: Dtype | None = None
    """The dtype of the output; default: that of the base (or first) model, tensor by tensor."""
    precision: Literal["float32", "float64"] = "float32"
    """The dtype of all arithmetic; Gram matrices are fp64 with both."""
    output: Literal["model", "adapter"] | None = None
    """`adapter`: write a LoRA adapter, the default where there are only adapters and no base."""
    tokenizer_source: str | None = None
    """`base`, or the path of one of the models; the tokenizers must agree unless unchecked."""
    check_tokenizer: bool = True
    """Whether a tokenizer that differs from the base's is an error."""
    max_shard_bytes: Annotated[Integer, Field(ge=1)] = 5_000_000_000
    """Size limit of a weights file in bytes; a file has at least one tensor."""
    allow_pickle: bool = False
    """Whether `.bin` checkpoints are read, with torch's `weights_only` loader."""
    name: str | None = None
    """The model's name in the model card."""


def load_merge(
    source: str | os.PathLike[str] | Mapping[str, Any] | MergeFile, overrides: Sequence[str] = ()
) -> MergeFile:
    """Return a merge file with its model paths made absolute; names of the Hub become hf://NAME.

    Args:
        source: A YAML file, its content as a mapping, or a MergeFile. Relative model paths are
            resolved against the file's directory, else against the working directory; what is in
            neither may be a name of the Hub, also as NAME@REVISION.
        overrides: Changes such as `parameters.drop=0.5`; values are YAML.

    Raises:
        MergeError: With one message per fault.
    """
    # A MergeFile goes through the same path, so that overrides are validated with it.
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
        file = MergeFile.model_validate(_normalize(data))
    except RecipeError as error:
        raise MergeError(*error.problems) from None
    except ValidationError as error:
        # pydantic reports each branch of a union; after translation they can be the same message.
        messages = translate(error.errors(include_url=False), MergeFile)
        raise MergeError(*dict.fromkeys(messages)) from None
    return _resolve_paths(_slices_to_models(file), folder)


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text("utf-8-sig")  # editors on Windows write a byte order mark
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


def _normalize(data: dict[str, Any]) -> dict[str, Any]:
    """Return the document without empty keys.

    Raises:
        MergeError: For mergekit's keys that are not supported.
    """
    # `parameters:` without a value is null in YAML; mergekit takes it for absent.
    data = {key: value for key, value in data.items() if value is not None}
    for key, advice in _UNSUPPORTED.items():
        if key in data:
            raise MergeError.at(key, _shorten(data[key]), "not supported here", fix=advice)
    # Not validated yet, so the document may have any type in any place.
    for entry in data.get("models", []) if isinstance(data.get("models"), list) else []:
        if isinstance(entry, dict) and entry.get("parameters", {}) is None:
            del entry["parameters"]
    return data


# mergekit's keys that would change the result if they were ignored, with what to do instead.
_UNSUPPORTED = {
    "modules": "List the models under `models`",
    "tokenizer": "The models' tokenizers must be the same; it is copied",
    "chat_template": "Edit the output's chat_template.jinja afterwards",
}


def _shorten(value: Any) -> str:
    """Return a value as text of at most 60 characters, for messages."""
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _slices_to_models(file: MergeFile) -> MergeFile:
    """Return the file with a single slice of all layers written as `models`.

    Raises:
        MergeError: If there are no models, or slices that do not cover all layers of each.
    """
    if file.slices is None:
        if not file.models:
            raise MergeError.at("models", [], "no models to merge")
        return file
    if file.models:
        raise MergeError.at("slices", "...", "`models` is set, too", fix="Remove one of the two")
    ranges = {source.layer_range for part in file.slices for source in part.sources}
    if len(file.slices) != 1 or len(ranges) != 1 or min(ranges)[0] != 0:
        raise MergeError.at(
            "slices",
            _shorten(sorted(ranges)),
            "only one slice of the same layers, from 0, of each model is supported",
            fix="To stack layers of different models, use another tool",
        )
    (layers,) = file.slices
    models = tuple(ModelEntry(model=s.model, parameters=s.parameters) for s in layers.sources)
    # In mergekit a slice's parameters take precedence over the file's.
    parameters = {**file.parameters, **layers.parameters}
    return file.model_copy(update={"models": models, "parameters": parameters})


def _resolve_paths(file: MergeFile, folder: str) -> MergeFile:
    """Return the file with absolute paths: Ray workers have another working directory."""
    models = tuple(
        entry.model_copy(update={"model": _resolve_model(entry.model, folder)})
        for entry in file.models
    )
    base = None if file.base_model is None else _resolve_model(file.base_model, folder)
    source = file.tokenizer_source
    if source is not None and source != "base":
        source = _resolve_model(source, folder)
    return file.model_copy(
        update={"models": models, "base_model": base, "tokenizer_source": source}
    )


def _resolve_model(reference: str, folder: str) -> str:
    """Return `MODEL` or `MODEL+ADAPTER` with absolute paths."""
    path = _resolve_path(reference, folder)
    # A directory may have a "+" in its own name; if it exists, it is meant.
    if os.path.exists(path) or "+" not in reference:
        return path
    model, _, adapter = reference.partition("+")
    return f"{_resolve_path(model, folder)}+{_resolve_path(adapter, folder)}"


def _resolve_path(path: str, folder: str) -> str:
    if path.startswith(HUB):
        return path
    expanded = os.path.expanduser(path)
    in_folder = os.path.normpath(os.path.join(folder, expanded))
    in_working_directory = os.path.abspath(expanded)
    if os.path.exists(in_folder):
        return in_folder
    if os.path.exists(in_working_directory):
        return in_working_directory
    # NAME or NAME@REVISION of the Hub, as mergekit has it.
    if is_hub_name(path.partition("@")[0]):
        return HUB + path
    # Where neither exists, the message names the file's directory, where users look first.
    return in_folder


def _in_range(layer: int, entry: int | str) -> bool:
    """Return whether `layer` is the number `entry`, or in the range `entry`, both ends included."""
    if isinstance(entry, int):
        return layer == entry
    first, _, last = entry.partition("-")
    return int(first) <= layer <= int(last)
