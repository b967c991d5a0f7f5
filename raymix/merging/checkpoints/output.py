"""Resumable writer of a sharded safetensors checkpoint, tensor by tensor and in any order.

The size and offset of each tensor are known before the first is merged. Files are laid out up front
(header, then reserved space), and a finished tensor is written at its offset: no shard is held in
memory, workers need no order, and the bytes do not depend on how the work is divided. A journal has
one line per finished job with the checksums of its tensors; a second run verifies those and merges
the rest. All of it happens in a hidden directory beside the output, which is renamed to the output
when it is complete.
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
# Bytes per read or write call; Linux transfers at most 2 GiB in one.
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """File, byte offset, dtype and shape of a tensor of the output."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Return the size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """Files of the output and the location of each tensor in them."""

    locations: dict[str, TensorLocation]
    headers: dict[str, bytes]
    """Header of each file, the leading 8 bytes of its length included."""
    stem: str
    """File name without shard number and extension."""

    @property
    def total_bytes(self) -> int:
        """Return the size of all tensors in bytes, headers not counted."""
        return sum(location.n_bytes for location in self.locations.values())

    def index(self) -> str | None:
        """Return the text of the index file, or None for a single file."""
        if len(self.headers) == 1:
            return None
        weight_map = {name: where.file for name, where in sorted(self.locations.items())}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        return json.dumps(index, indent=2) + "\n"


def plan_checkpoint_layout(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_bytes: int, stem: str = "model"
) -> CheckpointLayout:
    """Return the layout of tensors in files of at most `max_bytes`; a file has at least one tensor.

    Args:
        tensors: Dtype and shape by name; tensors stay in this order across files.
        max_bytes: Size limit of a file's tensors, in bytes.
        stem: File name without shard number and extension.
    """
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and shard_bytes + size > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    locations: dict[str, TensorLocation] = {}
    headers: dict[str, bytes] = {}
    for number, names in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{suffix}.safetensors"
        # The format allows no padding between tensors. Wide dtypes first keeps all of them aligned
        # for memory mapping; the sort is stable, so the order within a dtype stays.
        ordered = sorted(names, key=lambda name: -tensors[name][0].itemsize)
        headers[file] = _header(file, ordered, tensors, locations)
    return CheckpointLayout(locations, headers, stem)


def _header(
    file: str,
    names: Iterable[str],
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    locations: dict[str, TensorLocation],
) -> bytes:
    """Return a file's header; adds the locations of its tensors to `locations`."""
    # transformers refuses files whose metadata do not say which framework wrote them.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        starts[name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces are valid JSON after the object; with them the first tensor starts at a multiple of 8.
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    # Offsets in the header count from its end, those of `locations` from the start of the file.
    for name, start in starts.items():
        locations[name] = TensorLocation(file, len(header) + start, *tensors[name])
    return header


def write_tensor(folder: str, location: TensorLocation, tensor: Tensor) -> int:
    """Write a tensor's bytes at their location and return their CRC-32."""
    # numpy has no bfloat16, so the bytes go through a view as uint8.
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    file = os.open(os.path.join(folder, location.file), os.O_WRONLY)
    try:
        for start in range(0, len(data), _BLOCK_BYTES):
            block = data[start : start + _BLOCK_BYTES]
            written = 0
            # pwrite has an offset of its own, so threads and processes share a file without a lock;
            # POSIX lets it write less than it was given.
            while written < len(block):
                written += os.pwrite(file, block[written:], location.offset + start + written)
    finally:
        os.close(file)
    return zlib.crc32(data)


def read_checksum(folder: str, location: TensorLocation) -> int:
    """Return the CRC-32 of a tensor's bytes in the file; -1 if the file ends before them."""
    checksum = 0
    with open(os.path.join(folder, location.file), "rb") as file:
        file.seek(location.offset)
        remaining = location.n_bytes
        while remaining:
            block = file.read(min(remaining, _BLOCK_BYTES))
            if not block:
                return -1  # no CRC-32 is negative, so it matches none
            checksum = zlib.crc32(block, checksum)
            remaining -= len(block)
    return checksum


class OutputWorkspace:
    """Hidden directory beside the output, with its journal of finished jobs."""

    def __init__(self, out: str | os.PathLike[str]) -> None:
        """Check that the output can be created; write nothing yet.

        Raises:
            MergeError: If `out` is a file or a directory that is not empty.
        """
        self.out = Path(os.path.abspath(out))
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise MergeError.at(
                "out", str(out), "it exists, and nothing is overwritten", fix="Name a new directory"
            )
        # Beside the output, not in a temporary directory: a rename is atomic within a file system.
        self.path = self.out.with_name(f".{self.out.name}.merging")
        self.done: dict[str, dict[str, Any]] = {}
        """Journal line of each finished job, by its name."""

    @contextlib.contextmanager
    def opened(self, layout: CheckpointLayout, identity: str) -> Iterator[None]:
        """Create the files, or resume an interrupted run of the same merge.

        If the block raises a MergeError, the directory is removed; after any other exception it
        stays for the next run.

        Args:
            layout: The files to write.
            identity: Hash that is equal only for the same merge of the same inputs.

        Raises:
            MergeError: If another process writes the same output, or the disk is too small.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                # flock, not a file with a process id: the kernel drops it when the process dies.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise MergeError.at("out", str(self.out), "another process is writing it") from None
            try:
                if not self._resume(layout, identity):
                    self._start(layout, identity)
                yield
            except MergeError:
                # Bad input: it would fail again, so nothing is worth resuming.
                shutil.rmtree(self.path, ignore_errors=True)
                raise

    def record(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a finished job to the journal; its key `crc32` has the checksums by tensor."""
        # No fsync: after a power cut the checksums tell lost tensors from written ones.
        self.done[name] = {"name": name, **line}
        with (self.path / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(self.done[name]) + "\n")

    def finish(self) -> None:
        """Rename the directory to the output."""
        for name in (JOURNAL, ".lock"):
            (self.path / name).unlink()
        if self.out.exists():  # checked to be empty; rmdir fails if files came since
            self.out.rmdir()
        os.replace(self.path, self.out)

    def _resume(self, layout: CheckpointLayout, identity: str) -> bool:
        """Fill `done` with the jobs whose tensors match the journal; False: nothing to resume."""
        journal = self.path / JOURNAL
        if not journal.exists():
            return False
        lines = []
        for text in journal.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed run may be cut off
                lines.append(parse_json(text))
        if not lines or lines[0] != {"identity": identity}:
            return False
        for line in lines[1:]:
            checksums = line.get("crc32", {}).items()
            if all(
                read_checksum(str(self.path), layout.locations[tensor]) == crc32
                for tensor, crc32 in checksums
            ):
                self.done[line["name"]] = line
        return True

    def _start(self, layout: CheckpointLayout, identity: str) -> None:
        """Create the files with their headers and reserved space, and an empty journal."""
        for entry in self.path.iterdir():
            if entry.name != ".lock":  # removed, it would let a second process lock a new one
                entry.unlink()
        for name, header in layout.headers.items():
            ends = [t.offset + t.n_bytes for t in layout.locations.values() if t.file == name]
            with (self.path / name).open("wb") as file:
                file.write(header)
                file.flush()  # fallocate by descriptor must not come before Python's buffer
                self._reserve(file.fileno(), max(ends))
        # The journal last: its presence means that all files are laid out.
        (self.path / JOURNAL).write_text(json.dumps({"identity": identity}) + "\n", "utf-8")

    def _reserve(self, file: int, size: int) -> None:
        """Allocate the disk space now, rather than fail at the last tensor.

        Raises:
            MergeError: If the file system has too little space.
        """
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            raise MergeError.at(
                "out",
                str(self.out),
                f"no space for {size:,} bytes: {error.strerror}",
                fix="Free space there, or choose another directory",
            ) from None
