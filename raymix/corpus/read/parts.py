"""Parts: the input cut into pieces of a few megabytes, the unit of parallel work and of resuming.

The cut depends on the files alone, never on the parallelism: Parquet by row groups, Arrow files
by record batches, plain lines by byte ranges, everything else by whole files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raymix.corpus.read.file_formats import is_json_values
from raymix.corpus.read.sources import DomainSources, SourceFile
from raymix.errors import CorpusError, RaymixError
from raymix.recipe import DomainConfig
from raymix.store.formats.litdata import read_index
from raymix.store.remote import files
from raymix.store.remote.errors import storage_errors, translate_storage_errors

MIN_PART_BYTES = 4 << 20
"""Bytes of text in a part of a small corpus: a few seconds of tokenizing on one core."""

MAX_PART_BYTES = 64 << 20
"""Bytes of text in a part of a huge one, so that there are not too many parts."""

# About as many parts as hundreds of CPUs can take, each still of some seconds.
_TARGET_PARTS = 512
# A part of very many tiny files would be a huge job description, pickled into its task.
_MAX_SLICES = 1000
# Text usually shrinks to a quarter; the size only orders and bundles the work.
_COMPRESSED_RATIO = 4

# Records that begin in a range of bytes can be found without what is before it.
_TOKENS_END_TO_END = ("megatron", "olmo", "datatrove", "nanogpt", "llmc")
_BYTE_RANGES = ("jsonl", "text", *_TOKENS_END_TO_END)

# Enough to see whether JSON is written line by line.
_HEAD = 256

HeldOut = Literal["by hash", "yes", "no"]

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A range of one file: row groups, record batches or bytes in [low, high); None is the end.

    `size` estimates its bytes of text.
    """

    file: SourceFile
    low: int
    high: int | None
    size: int


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive slices of a domain that one task tokenizes; `number` counts in the domain."""

    domain: str
    number: int
    held_out: HeldOut
    slices: tuple[FileSlice, ...]

    @property
    def size(self) -> int:
        """Return the estimated bytes of text."""
        return sum(file_slice.size for file_slice in self.slices)

    def key(self, *content: object) -> str:
        """Return a hash of the part's input and of `content`: equal means the same output."""
        ranges = [
            [
                file_slice.file.url,
                file_slice.file.size,
                file_slice.file.changed,
                file_slice.low,
                file_slice.high,
            ]
            for file_slice in self.slices
        ]
        return digest([self.held_out, ranges, *content])


def digest(content: object) -> str:
    """Return the hash of JSON-able content."""
    # Canonical JSON, so that equal content has one hash in every process and version.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def plan_parts(
    domains: Iterable[DomainConfig], sources: Mapping[str, DomainSources]
) -> dict[str, list[Part]]:
    """Return the parts of every domain in source order, held-out files first.

    Held-out files come first so that a document in both splits stays in the held-out one.

    Raises:
        CorpusError: If a file cannot be read or lacks the column.
    """
    configs = {domain.name: domain for domain in domains}
    groups: list[tuple[DomainConfig, HeldOut, tuple[SourceFile, ...]]] = []
    for name, group_files in sources.items():
        if group_files.valid:
            groups.append((configs[name], "yes", group_files.valid))
        groups.append((configs[name], "no" if group_files.valid else "by hash", group_files.train))
    # Footers of all files are read first: the size of parts depends on the total.
    sliced = [_slices(domain, group_files) for domain, _, group_files in groups]
    total = sum(file_slice.size for slices in sliced for file_slice in slices)
    part_bytes = min(max(total // _TARGET_PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
    planned: dict[str, list[Part]] = {name: [] for name in sources}
    for (domain, held_out, _), slices in zip(groups, sliced, strict=True):
        parts = planned[domain.name]
        for bundle in _bundles(_cut(slices, part_bytes), part_bytes):
            parts.append(Part(domain.name, len(parts), held_out, tuple(bundle)))
    for name, parts in planned.items():
        if not parts:  # files without a single row group or record batch
            parts.append(Part(name, 0, "no", ()))
    return planned


def _bundles(slices: Iterable[FileSlice], part_bytes: int) -> Iterator[list[FileSlice]]:
    bundle: list[FileSlice] = []
    size = 0
    for file_slice in slices:
        if bundle and (size + file_slice.size > part_bytes or len(bundle) == _MAX_SLICES):
            yield bundle
            bundle, size = list[FileSlice](), 0
        bundle.append(file_slice)
        size += file_slice.size
    if bundle:
        yield bundle


def _cut(slices: Iterable[FileSlice], part_bytes: int) -> Iterator[FileSlice]:
    """Yield the slices, those of byte ranges cut to about `wanted` bytes."""
    for file_slice in slices:
        file, end = file_slice.file, file_slice.high
        count = max(1, round(file_slice.size / part_bytes))
        if file.format not in _BYTE_RANGES or end is None or count == 1:
            yield file_slice
            continue
        # The cuts fall anywhere; a reader takes the lines that start within its range.
        edges = [end * number // count for number in range(count + 1)]
        for low, high in itertools.pairwise(edges):
            yield FileSlice(file, low, high, high - low)


def _slices(domain: DomainConfig, domain_files: tuple[SourceFile, ...]) -> list[FileSlice]:
    # Reading a footer waits for the disk or the network, not for a core.
    with ThreadPoolExecutor(8) as pool:
        cuts = pool.map(_file_slices, itertools.repeat(domain), domain_files)
        return list(itertools.chain.from_iterable(cuts))


def _file_slices(domain: DomainConfig, file: SourceFile) -> list[FileSlice]:
    column = domain.column
    if file.format == "parquet":
        return _guarded(file, lambda: _parquet_slices(domain, file, column))
    if file.format == "arrow":
        return _guarded(file, lambda: _arrow_slices(domain, file, column))
    if file.format in ("mds", "litdata"):
        return _shard_slices(file)
    if file.format in _TOKENS_END_TO_END:
        return [FileSlice(file, 0, file.size, file.size)]
    if file.compression:
        return [FileSlice(file, 0, None, file.size * _COMPRESSED_RATIO)]
    # A paragraph or a whole file can span any cut, so only single lines may be cut by bytes.
    if file.format == "jsonl":
        lines = _guarded(file, lambda: not is_json_values(_head(file)))
    else:
        lines = file.format == "text" and domain.text_unit == "line"
    return [FileSlice(file, 0, file.size if lines else None, file.size)]


def _shard_slices(file: SourceFile) -> list[FileSlice]:
    """Return a slice per shard that the `index.json` of MDS or litData names."""
    index = read_index(file.url)
    if file.format == "mds":
        sizes = [entry["raw_data"]["bytes"] for entry in index.get("shards") or []]
    else:
        sizes = [entry["chunk_bytes"] for entry in index.get("chunks") or []]
    return [FileSlice(file, number, number + 1, size) for number, size in enumerate(sizes)]


def _head(file: SourceFile) -> bytes:
    filesystem, path = files.locate(file.url)
    with filesystem.open_input_stream(path, compression=None) as source:
        return source.read(_HEAD)


def _guarded(file: SourceFile, read: Callable[[], _Result]) -> _Result:
    try:
        with translate_storage_errors(file.url, "file"):
            return read()
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise unreadable(file, error) from error


def unreadable(file: SourceFile, error: BaseException) -> RaymixError:
    """Return the error for a file that cannot be read as what its name says."""
    # Arrow's messages go on with a stack of C++ calls.
    first = (str(error) or type(error).__name__).splitlines()[0]
    return storage_errors(file.url, error, "file") or CorpusError.at(
        "file",
        file.url,
        f"cannot be read as {file.format}: {first}",
        fix="restore the file, or leave it out",
    )


def _parquet_slices(domain: DomainConfig, file: SourceFile, column: str) -> list[FileSlice]:
    filesystem, path = files.locate(file.url)
    with filesystem.open_input_file(path) as source:
        footer = pq.ParquetFile(source)
        check_column(domain, file, footer.schema_arrow, column)
        # The size of all columns, since asking for one column's can abort the process when the
        # footer is damaged (an exception that Arrow's binding does not catch).
        groups = map(footer.metadata.row_group, range(footer.metadata.num_row_groups))
        return [
            FileSlice(file, number, number + 1, group.total_byte_size)
            for number, group in enumerate(groups)
        ]


def _arrow_slices(domain: DomainConfig, file: SourceFile, column: str) -> list[FileSlice]:
    with files.open_mapped(file.url) as source:
        if not is_arrow_file(source):
            check_column(domain, file, pa.ipc.open_stream(source).schema, column)
            return [FileSlice(file, 0, None, file.size)]
        reader = pa.ipc.open_file(source)
        check_column(domain, file, reader.schema, column)
        count = reader.num_record_batches
    # Record batches have no size in the footer; an even split is good enough to order the work.
    return [FileSlice(file, low, low + 1, file.size // count) for low in range(count)]


def is_arrow_file(source: pa.NativeFile) -> bool:
    """Return whether an Arrow source has the random-access form, leaving it at its start."""
    # Random-access files begin with this; the stream form begins with a message length.
    magic = source.read(6)
    source.seek(0)
    return magic == b"ARROW1"


def check_column(domain: DomainConfig, file: SourceFile, schema: pa.Schema, column: str) -> None:
    """Check that a file has the column a domain reads, of a type that can hold it.

    Raises:
        CorpusError: If not; it lists the columns found.
    """
    field = f"{domain.name}.{domain.column_field}"
    column_type = _column_type(schema, column)
    if column_type is None:
        raise no_column(field, column, file, schema.names)
    for beside in ("labels_column", "tools_column", "system_column"):
        name = getattr(domain, beside)
        if name and name not in schema.names:
            raise no_column(f"{domain.name}.{beside}", name, file, schema.names)
    expected = _misfit(domain, column_type)
    if expected is None:
        return
    fix = f"the columns found are {', '.join(schema.names)}"
    if pa.types.is_struct(column_type):
        fields = [f"{column}.{inner.name}" for inner in column_type]
        fix = f"name a field of it: {', '.join(fields)}"
    problem = f"the column is of type {column_type} in {file.url}, not {expected}"
    raise CorpusError.at(field, column, problem, fix=fix)


def _misfit(domain: DomainConfig, column_type: Any) -> str | None:
    """Return what a column should be, None where it is or where all of it is null."""
    inner = column_type.value_type if _is_list(column_type) else column_type
    # Of nulls alone, or of empty lists: other files of the domain tell the type.
    if pa.types.is_null(inner):
        return None
    if domain.messages_column:
        fits = _is_text(column_type) or (_is_list(column_type) and pa.types.is_struct(inner))
        expected = "a list of messages (role, content), or its JSON"
    elif domain.tokens_column:
        fits = _is_list(column_type) and pa.types.is_integer(inner)
        expected = "a list of integers"
    else:
        column_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
        fits = _is_text(column_type)
        expected = "text"
    return None if fits else expected


def _column_type(schema: pa.Schema, column: str) -> Any:
    """Return the type of a column, or of a field inside structs such as `doc.text`; else None."""
    if column in schema.names:
        return schema.field(column).type
    first, *path = column.split(".")
    if not path or first not in schema.names:
        return None
    column_type: Any = schema.field(first).type
    for name in path:
        if pa.types.is_null(column_type):
            return column_type
        if not pa.types.is_struct(column_type) or column_type.get_field_index(name) < 0:
            return None
        column_type = column_type.field(name).type
    return column_type


def nested_column(records: pa.RecordBatch, column: str) -> pa.Array:
    """Return a column, or the field inside structs that a path such as `doc.text` names."""
    if column in records.schema.names:
        return records.column(column)
    first, *path = column.split(".")
    values = records.column(first)
    for name in path:
        if pa.types.is_null(values.type):
            return values
        # A null struct has null fields.
        values = pc.call_function("struct_field", [values], pc.StructFieldOptions([name]))
    return values


def no_column(field: str, column: str, file: SourceFile, columns: Iterable[str]) -> CorpusError:
    """Return the error for a column that a file lacks."""
    names = ", ".join(columns) or "none"
    return CorpusError.at(
        field, column, f"no such column in {file.url}", fix=f"the columns found are: {names}"
    )


def _is_list(column_type: pa.DataType) -> bool:
    return (
        pa.types.is_list(column_type)
        or pa.types.is_large_list(column_type)
        or pa.types.is_fixed_size_list(column_type)
    )


def _is_text(column_type: pa.DataType) -> bool:
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    raw = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(check(column_type) for check in (*text, *raw))
