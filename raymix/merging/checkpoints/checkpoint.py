"""Checkpoints in the Hugging Face layout, read tensor by tensor from memory-mapped files.

All that can be checked without reading values is checked when a checkpoint is opened: files,
headers, dtypes, and that no path of an index leaves the model's directory. Pickle files are read
only on request and only by torch's `weights_only` loader.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raymix._utils.json import parse_json
from raymix.errors import MergeError, did_you_mean

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Supported dtypes by their names in safetensors files."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SAFETENSORS_FILE, _PICKLE_FILE = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
# Field of a configuration by which it names its weights file.
_NAMED_WEIGHTS = "transformers_weights"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """File, dtype and shape of one tensor, known without reading its values."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Return the size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(slots=True)
class Checkpoint:
    """A directory of weights, opened lazily; `read` maps a tensor and copies nothing."""

    path: str
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """Return the tensor `name` as stored; its pages are read at first access."""
        # Two threads may open a file twice; the second handle replaces an equal first one.
        file = self.specs[name].file
        if file not in self._open:
            self._open[file] = _open_weights(os.path.join(self.path, file))
        handle = self._open[file]
        if isinstance(handle, dict):  # torch.load's mapping, of a pickle file
            return handle[name]
        tensor: Tensor = handle.get_tensor(name)
        return tensor

    def files(self) -> list[str]:
        """Return the names of the weights files, sorted."""
        return sorted({spec.file for spec in self.specs.values()})

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files: safetensors handles do not pickle for Ray."""
        return {"path": self.path, "config": self.config, "specs": self.specs}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.path, self.config, self.specs = state["path"], state["config"], state["specs"]
        self._open = {}


def open_checkpoint(path: str, field_path: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Return the checkpoint in the directory `path`, with its files checked.

    Args:
        path: A directory in the Hugging Face layout.
        field_path: Dotted path of the field for messages, e.g. `models.0.model`.
        allow_pickle: Whether `.bin` files are read, with torch's `weights_only` loader.

    Raises:
        MergeError: If a file is absent, truncated, unsupported, or outside the directory.
    """
    check_directory(path, field_path)
    config = read_json(os.path.join(path, "config.json"), field_path)
    specs: dict[str, TensorSpec] = {}
    # Of all tensors of all files, the last one of a name counts, whatever an index says of it: so
    # transformers reads them.
    files = _weight_files(path, config, field_path, allow_pickle=allow_pickle)
    for file, names in sorted(files.items()):
        file_tensors = file_specs(os.path.join(path, file), field_path)
        missing = [name for name in names or () if name not in file_tensors]
        if missing:
            raise MergeError.at(
                field_path,
                path,
                f"the index file puts {missing[0]!r} in {file}, where it is not",
                fix="Download it again",
            )
        specs |= file_tensors
    if not specs:
        raise MergeError.at(field_path, path, "its files hold no tensors")
    return Checkpoint(path, config, specs)


def check_directory(path: str, field_path: str) -> None:
    """Raise MergeError unless `path` is a directory; suggest a similar name beside it."""
    if os.path.isdir(path):
        return
    if os.path.exists(path):
        raise MergeError.at(
            field_path, path, "not a directory", fix="Name the directory of the model"
        )
    folder, name = os.path.split(path)
    suggestion = did_you_mean(name, os.listdir(folder)) if os.path.isdir(folder) else ""
    raise MergeError.at(field_path, path, "no such directory", fix=suggestion)


def read_json(path: str, field_path: str) -> dict[str, Any]:
    """Return the object in a JSON file of a model.

    Raises:
        MergeError: If the file is absent or not a JSON object.
    """
    try:
        data = parse_json(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        name = os.path.basename(path)
        folder = os.path.dirname(path)
        raise MergeError.at(
            field_path, folder, f"there is no {name}", fix="Name a model's directory"
        ) from None
    except (OSError, ValueError) as error:
        raise MergeError.at(field_path, path, f"cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise MergeError.at(field_path, path, "not a JSON object")
    return data


def file_specs(path: str, field_path: str) -> dict[str, TensorSpec]:
    """Return the specs of the tensors of a weights file, in file order.

    Raises:
        MergeError: If the file is absent, truncated or holds an unsupported dtype.
    """
    name = os.path.basename(path)
    try:
        handle = _open_weights(path)
    except FileNotFoundError:
        raise MergeError.at(field_path, path, "no such file", fix="Download it again") from None
    except (SafetensorError, OSError) as error:
        raise MergeError.at(
            field_path, path, f"not a complete safetensors file: {error}", fix="Download it again"
        ) from None
    except Exception as error:  # noqa: BLE001 - the unpickler raises whatever the bytes provoke
        raise MergeError.at(
            field_path,
            path,
            f"rejected by torch's weights_only loader: {str(error).splitlines()[0]}",
            fix="Convert it to safetensors",
        ) from None
    if isinstance(handle, dict):
        # A pickled training state holds counters and settings beside the weights.
        tensors = {key: value for key, value in handle.items() if isinstance(value, Tensor)}
        return {k: TensorSpec(name, v.dtype, tuple(v.shape)) for k, v in tensors.items()}
    specs = {}
    for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
        # A slice object reads the header only, not the values.
        header = handle.get_slice(key)
        if header.get_dtype() not in DTYPES:
            raise MergeError.at(
                field_path,
                path,
                f"{key!r} is of dtype {header.get_dtype()}, which cannot be merged",
                fix="Dequantize the model first",
            )
        specs[key] = TensorSpec(name, DTYPES[header.get_dtype()], tuple(header.get_shape()))
    return specs


def _open_weights(path: str) -> Any:
    if path.endswith(".safetensors"):
        return safe_open(path, framework="pt")
    # mmap reads pages on demand, as safetensors does; weights_only never runs the file's code.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _weight_files(
    path: str, config: Mapping[str, Any], field_path: str, *, allow_pickle: bool
) -> dict[str, list[str] | None]:
    """Return the weights files of a directory, with the tensors that an index names in each.

    The order is that of `from_pretrained`: a file that the configuration names, a whole file, an
    index; and safetensors before pickle files. The rest of the directory is not read.
    """
    named = config.get(_NAMED_WEIGHTS)
    candidates = [named] if isinstance(named, str) else []
    for single in (_SAFETENSORS_FILE, _PICKLE_FILE):
        candidates += [single, f"{single}{_INDEX}"]
    for name in candidates:
        if name == named:
            _check_inside(name, f"its {_NAMED_WEIGHTS} is", path, field_path)
        elif not os.path.isfile(os.path.join(path, name)):
            continue
        if name.removesuffix(_INDEX).endswith(".bin") and not allow_pickle:
            raise MergeError.at(
                field_path,
                path,
                "its weights are pickle files, which can run code when they are loaded",
                fix="Convert them, or set allow_pickle: true to use torch's weights_only loader",
            )
        if name.endswith(_INDEX):
            return _read_index(os.path.join(path, name), field_path)
        return {name: None}
    raise MergeError.at(
        field_path,
        path,
        f"holds neither {_SAFETENSORS_FILE} nor {_SAFETENSORS_FILE}{_INDEX}",
        fix="Name a model's or an adapter's directory",
    )


def _check_inside(file: object, origin: str, location: str, field_path: str) -> None:
    """Raise MergeError if a weights file is not one in the model's directory."""
    # A path out of the directory would read, and copy into the merge, any file of this machine.
    inside = isinstance(file, str) and file and not os.path.isabs(file)
    if not inside or ".." in PurePosixPath(str(file).replace("\\", "/")).parts:
        raise MergeError.at(
            field_path,
            location,
            f"{origin} {file!r}, outside the model's directory",
            fix="Do not trust this download",
        )


def _read_index(index: str, field_path: str) -> dict[str, list[str] | None]:
    """Return the tensor names of each file of a sharded checkpoint."""
    weight_map = read_json(index, field_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergeError.at(field_path, index, "has no weight_map")
    files: dict[str, list[str] | None] = {}
    for tensor, file in weight_map.items():
        _check_inside(file, f"it puts {tensor!r} in", index, field_path)
        names = files.setdefault(file, [])
        if names is not None:
            names.append(tensor)
    return files
