"""Writing a sharded safetensors checkpoint tensor by tensor, in any order, so that it resumes.

The size and place of every tensor are known before the first is merged. So every file is laid out
at once (header, then room for the data), and a finished tensor's bytes go straight to their place:
memory holds no shard, workers need no order, and the bytes are the same however the work is
divided. A journal has one line per finished tensor with a checksum of its bytes; a second run
checks those and merges the rest. All of it happens in a hidden directory beside the output, which
takes the output's name when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymix._utils.json import parse_json
from raymix.errors import MergeError
from raymix.merging.checkpoints.checkpoint import DTYPE_NAMES

JOURNAL = "progress.jsonl"
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor of the output lies."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Return its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """The files of the output and the place of every tensor in them."""

    places: dict[str, TensorLocation]
    headers: dict[str, bytes]
    stem: str

    @property
    def total_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(place.n_bytes for place in self.places.values())

    def index(self) -> str | None:
        """Return the index file's text, or None for a single file."""
        if len(self.headers) == 1:
            return None
        weight_map = {name: place.file for name, place in sorted(self.places.items())}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        return json.dumps(index, indent=2) + "\n"


def plan_checkpoint_layout(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_bytes: int, stem: str = "model"
) -> CheckpointLayout:
    """Return the layout of tensors in files of at most `max_bytes`, one tensor at least each."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    places: dict[str, TensorLocation] = {}
    headers: dict[str, bytes] = {}
    for number, names in enumerate(shards, 1):
        of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{of}.safetensors"
        # The format wants no holes, so wide dtypes come first and all stay aligned.
        ordered = sorted(names, key=lambda name: -tensors[name][0].itemsize)
        headers[file] = _header(file, ordered, tensors, places)
    return CheckpointLayout(places, headers, stem)


def _header(
    file: str,
    names: Iterable[str],
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    places: dict[str, TensorLocation],
) -> bytes:
    """Return a file's header and note the places of its tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    at = 0
    for name in names:
        dtype, shape = tensors[name]
        end = at + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        starts[name], at = at, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    for name, start in starts.items():
        places[name] = TensorLocation(file, len(header) + start, *tensors[name])
    return header


def write_tensor(folder: str, place: TensorLocation, tensor: Tensor) -> int:
    """Write a tensor's bytes to their place and return their checksum.

    Raises:
        MergeError: If values that were finite do not fit the output's dtype.
    """
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    file = os.open(os.path.join(folder, place.file), os.O_WRONLY)
    try:
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            written = 0
            while written < len(block):
                written += os.pwrite(file, block[written:], place.offset + start + written)
    finally:
        os.close(file)
    return zlib.crc32(data)


def read_checksum(folder: str, place: TensorLocation) -> int:
    """Return the checksum of a tensor's bytes as they lie in the file."""
    found = 0
    with open(os.path.join(folder, place.file), "rb") as file:
        file.seek(place.offset)
        left = place.n_bytes
        while left:
            block = file.read(min(left, _BLOCK))
            if not block:
                return -1
            found = zlib.crc32(block, found)
            left -= len(block)
    return found


class OutputWorkspace:
    """The hidden directory beside the output, its journal, and what is done already."""

    def __init__(self, out: str | os.PathLike[str]) -> None:
        """Refuse an output that exists.

        Raises:
            MergeError: If `out` is taken.
        """
        self.out = Path(os.path.abspath(out))
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise MergeError.at(
                "out", str(out), "it exists, and nothing is overwritten", fix="Name a new directory"
            )
        self.path = self.out.with_name(f".{self.out.name}.merging")
        self.done: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def opened(self, layout: CheckpointLayout, identity: str) -> Iterator[None]:
        """Prepare the files, or take up what an interrupted run of the same merge left.

        When the block ends by a MergeError everything is removed; by anything else it stays
        for the next run.

        Args:
            layout: The files to write.
            identity: Text that is the same only for the same merge of the same inputs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise MergeError.at("out", str(self.out), "another process is writing it") from None
            try:
                if not self._resume(layout, identity):
                    self._start(layout, identity)
                yield
            except MergeError:
                shutil.rmtree(self.path, ignore_errors=True)
                raise

    def note(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a finished job to the journal; `crc32` maps its tensors to their checksums."""
        self.done[name] = {"name": name, **line}
        with (self.path / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(self.done[name]) + "\n")

    def finish(self) -> None:
        """Give the directory the output's name."""
        for name in (JOURNAL, ".lock"):
            (self.path / name).unlink()
        if self.out.exists():
            self.out.rmdir()
        os.replace(self.path, self.out)

    def _resume(self, layout: CheckpointLayout, identity: str) -> bool:
        """Fill `done` with the tensors whose bytes are as the journal says."""
        journal = self.path / JOURNAL
        if not journal.exists():
            return False
        lines = []
        for text in journal.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line torn by the crash
                lines.append(parse_json(text))
        if not lines or lines[0] != {"identity": identity}:
            return False
        for line in lines[1:]:
            sums = line.get("crc32", {}).items()
            if all(read_checksum(str(self.path), layout.places[t]) == crc for t, crc in sums):
                self.done[line["name"]] = line
        return True

    def _start(self, layout: CheckpointLayout, identity: str) -> None:
        for entry in self.path.iterdir():
            if entry.name != ".lock":
                entry.unlink()
        for name, header in layout.headers.items():
            ends = [p.offset + p.n_bytes for p in layout.places.values() if p.file == name]
            with (self.path / name).open("wb") as file:
                file.write(header)
                file.flush()
                self._reserve(file.fileno(), max(ends))
        (self.path / JOURNAL).write_text(json.dumps({"identity": identity}) + "\n", "utf-8")

    def _reserve(self, file: int, size: int) -> None:
        """Claim the disk space now rather than fail at the last tensor."""
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            raise MergeError.at(
                "out",
                str(self.out),
                f"no room for {size:,} bytes: {error.strerror}",
                fix="Free space there, or choose another directory",
            ) from None
