"""Readers: every record of every format comes out once, and damage is named or counted."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.corpus.read.lines import lines_between
from raymix.corpus.read.parts import FileSlice, check_column, plan_parts
from raymix.corpus.read.readers import json_value, read_slice
from raymix.corpus.read.records import TOO_LONG, Reject
from raymix.corpus.read.sources import find_sources
from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig, DomainConfig

TEXTS = [
    "one",
    "",
    "  ",
    "zwei\nlines\r\n",
    "日本語",
    'quote " and \\',
    "nul \x00 inside",
    "é" * 300,
]
Outcome = str | list[int] | None


def domain(**fields: object) -> DomainConfig:
    return DomainConfig.model_validate({"name": "d", "train": "x", **fields})


def slices(path: Path, **fields: object) -> list[FileSlice]:
    entry = {"name": "d", "train": str(path), **fields}
    config = CorpusConfig.model_validate({"path": "unused", "domains": [entry]})
    parts = plan_parts(config.domains, find_sources(config))["d"]
    return [piece for part in parts for piece in part.slices]


def read(path: Path, max_characters: int = 10_000, **fields: object) -> list[object]:
    values: list[object] = []
    for piece in slices(path, **fields):
        records = read_slice(piece, domain(**fields), max_characters=max_characters)
        for _, value in records:
            if isinstance(value, Reject):
                values.append(value.reason)
            elif value is not None:
                values.append(value if isinstance(value, str) else value.tolist())
    return values


def packed(path: Path, content: bytes) -> Path:
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
        ".bz2": bz2.compress,
    }
    path.write_bytes(packers.get(path.suffix, bytes)(content))
    return path


def arrow(path: Path, table: pa.Table, *, stream: bool) -> Path:
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".bz2"])
def test_jsonl_in_every_compression(tmp_path: Path, ending: str) -> None:
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS)
    assert read(packed(tmp_path / f"a.jsonl{ending}", lines.encode())) == TEXTS


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([text.encode() for text in TEXTS]),
        pa.array(TEXTS, pa.string_view()),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_of_text(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"text": column, "other": range(len(TEXTS))})
    assert read(arrow(tmp_path / "a.arrow", table, stream=False)) == TEXTS
    assert read(arrow(tmp_path / "b.arrow", table, stream=True)) == TEXTS
    if not pa.types.is_string_view(column.type):
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
        assert read(tmp_path / "a.parquet") == TEXTS


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.uint16())])
def test_columns_of_token_ids(tmp_path: Path, kind: pa.DataType) -> None:
    ids = [[1, 2, 3], [], None, [65535]]
    table = pa.table({"input_ids": pa.array(ids, kind)})
    wanted = [[1, 2, 3], [], "null", [65535]]
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", tokens_column="input_ids") == wanted
    path = arrow(tmp_path / "a.arrow", table, stream=False)
    assert read(path, tokens_column="input_ids") == wanted
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in ids)
    path = packed(tmp_path / "a.jsonl", lines.encode())
    assert read(path, tokens_column="input_ids") == wanted


@pytest.mark.parametrize(
    ("unit", "wanted"),
    [
        ("file", ["a\nb\r\n\n \n\nc\n"]),
        ("line", ["a", "b", "c"]),
        ("paragraph", ["a\nb", "c"]),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_plain_text(tmp_path: Path, unit: str, wanted: list[str], ending: str) -> None:
    path = packed(tmp_path / f"a.txt{ending}", b"a\nb\r\n\n \n\nc\n")
    assert read(path, text_unit=unit) == wanted


@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_what_is_too_long_is_not_kept(tmp_path: Path, unit: str) -> None:
    path = packed(tmp_path / "a.txt", b"x" * 5000)
    assert read(path, text_unit=unit, max_characters=1000) == [TOO_LONG.reason]
    assert read(path, text_unit=unit, max_characters=5000) == ["x" * 5000]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "invalid JSON"),
        (b'{"text": "x"} tail', "invalid JSON"),
        (b'{"text": "\x00"}', "invalid JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid JSON"),
        (b'{"text": ' + b"9" * 10_000 + b"}", "invalid JSON"),
        (b'{"id": 1}', "no 'text' key"),
        (b'{"text": null}', "null"),
        (b'{"text": 1.5}', "not text"),
        (b'{"text": ["x"]}', "not text"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_bad_json_is_named_by_reason(line: bytes, reason: str) -> None:
    reject = json_value(line, domain())
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert len(reject.excerpt) <= 200
    reject.excerpt.encode()


@pytest.mark.parametrize("ids", ["1", '["1"]', "[1.0]", "[true]", "[[1]]", f"[{2**70}]", "{}"])
def test_bad_token_ids_are_rejected(ids: str) -> None:
    reject = json_value(f'{{"input_ids": {ids}}}'.encode(), domain(tokens_column="input_ids"))
    assert isinstance(reject, Reject)
    assert reject.reason == "not a list of token ids"


def test_invalid_utf8_in_columns_is_one_bad_record(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", None, b"fine"])
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 4, raw.buffers())})
    pq.write_table(table, tmp_path / "a.parquet")
    wanted = ["good", "invalid UTF-8", "null", "fine"]
    assert read(tmp_path / "a.parquet") == wanted
    assert read(arrow(tmp_path / "a.arrow", table, stream=True)) == wanted


@given(
    content=st.binary(max_size=60).map(lambda raw: raw.replace(b"\r", b"\n\n")),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    chunk=st.integers(1, 20),
)
def test_ranges_share_out_the_lines(content: bytes, cuts: list[int], chunk: int) -> None:
    """Whatever the cuts, every line comes out once and in order."""
    edges = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    whole_lines: list[bytes] = []
    for low, high in pairwise(edges):
        source = io.BytesIO(content)
        source.seek(max(low - 1, 0))
        lines = lines_between(lambda size, s=source: s.read(min(size, chunk)), low, high, limit=99)
        whole_lines += [line for line, whole in lines if whole]
    assert whole_lines == content.split(b"\n")[: -1 if content[-1:] in (b"\n", b"") else None]


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(0, 20))
def test_long_lines_are_cut_and_say_so(lengths: list[int], limit: int) -> None:
    content = b"".join(b"x" * length + b"\n" for length in lengths)
    lines = list(lines_between(io.BytesIO(content).read, 0, None, limit=limit))
    assert lines == [(b"x" * min(n, limit), n <= limit) for n in lengths]


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n{\n')
    (piece,) = slices(path)
    numbered = list(read_slice(piece, domain(), max_characters=10))
    assert [number for number, value in numbered if value is not None] == [1, 3, 4]
    assert [value for _, value in numbered][:3] == ["a", None, "b"]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_compression_names_the_file(tmp_path: Path, ending: str, damage: str) -> None:
    rng = random.Random(0)
    text = "".join(f'{{"text": "{rng.random()}"}}\n' for _ in range(50_000)).encode()
    path = packed(tmp_path / f"a.jsonl{ending}", text)
    good = path.read_bytes()
    path.write_bytes({"cut": good[: len(good) // 2], "noise": b"\x00" * 100, "empty": b""}[damage])
    if damage == "empty":
        assert read(path) == []
        return
    with pytest.raises(CorpusError, match=f"file = '{path}': cannot be read as jsonl"):
        read(path)


def damaged(good: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    content = bytearray(good)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(content))
        kind = rng.randrange(3)
        if kind == 0:
            content[at] = rng.randrange(256)
        elif kind == 1:
            del content[at : at + rng.randrange(1, 50)]
        else:
            content[at:at] = rng.randbytes(rng.randrange(1, 50))
    return bytes(content)


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.arrow", "s.arrow", "a.jsonl", "a.txt", "a.jsonl.gz"]
)
@pytest.mark.parametrize("tokens", [False, True])
def test_damaged_files_are_corpus_errors_or_rejects(
    tmp_path: Path, name: str, tokens: bool
) -> None:
    rows: list[object] = [[n] * n for n in range(20)] if tokens else [t * 3 for t in TEXTS]
    table = pa.table({"text": rows})
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(table, path, row_group_size=4)
    elif name.endswith("arrow"):
        arrow(path, table, stream=name[0] == "s")
    else:
        packed(path, "".join(json.dumps({"text": row}) + "\n" for row in rows).encode())
    good = path.read_bytes()
    fields = {"tokens_column": "text"} if tokens else {}
    for seed in range(40):
        path.unlink()
        path.write_bytes(damaged(good, seed))
        try:
            values = read(path, **fields)
        except CorpusError as error:
            values = [str(error)]
            named = str(path) in str(error)
        else:
            named = True
        assert named
        assert all(isinstance(value, str | list) for value in values)


def test_a_file_that_lost_its_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    (piece,) = slices(tmp_path / "a.parquet")
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="no such column"):
        list(read_slice(piece, domain(), max_characters=10))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(CorpusError, match="cannot be read"):
        list(read_slice(piece, domain(), max_characters=10))


def test_nested_text_is_not_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [{"a": "x"}]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="not text"):
        slices(tmp_path / "a.parquet")
    schema = pa.schema([pa.field("text", pa.list_(pa.string()))])
    (file,) = [p.file for p in slices(packed(tmp_path / "b.txt", b"x"))]
    with pytest.raises(CorpusError, match="not text"):
        check_column(domain(), file, schema, "text")


def test_token_ids_with_holes_are_not_integers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [[1, None, 2]]}), tmp_path / "a.parquet")
    (piece,) = slices(tmp_path / "a.parquet", tokens_column="text")
    ((_, value),) = read_slice(piece, domain(tokens_column="text"), max_characters=10)
    assert isinstance(value, np.ndarray)
    assert value.dtype.kind == "f"
