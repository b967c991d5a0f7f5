"""Faults of token files: each is an error that names the file, and never a wrong token."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raymix.errors import CorpusError
from raymix.store.formats.detect import detect, is_companion, token_files
from raymix.store.formats.info import MappedFormat, TokenFileInfo, TokenFileOptions
from raymix.store.formats.mds import mds_shards, shard_documents
from raymix.store.formats.token_file import TokenFile
from tests.support.token_corpora import FIXTURES

SMALL = TokenFileOptions(vocab_size=257, eos_id=256)
LARGE = TokenFileOptions(vocab_size=100_278, eos_id=100_277)


def write_megatron(
    folder: Path, lengths: list[int], *, code: int = 8, offsets: list[int] | None = None
) -> Path:
    """Write a pair whose documents count up to end-of-text, 256."""
    dtype = {8: "<u2", 4: "<i4", 5: "<i8", 7: "<f4"}[code]
    stream = [np.arange(256 - length + 1, 257) for length in lengths]
    path = folder / "text.bin"
    np.concatenate(stream).astype(dtype).tofile(path)
    if offsets is None:
        offsets = (np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize).tolist()
    entries = len(lengths) + 1
    content = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), entries)
    content += np.array(lengths, "<i4").tobytes() + np.array(offsets, "<i8").tobytes()
    content += np.arange(entries, dtype="<i8").tobytes()
    path.with_suffix(".idx").write_bytes(content)
    return path


def parse(path: Path, kind: MappedFormat, options: TokenFileOptions = SMALL) -> TokenFileInfo:
    (info,) = token_files(str(path), kind, options)
    return info


def starts(info: TokenFileInfo, options: TokenFileOptions = SMALL) -> list[int]:
    return np.concatenate(list(TokenFile(info, options).edges.chunks())).tolist()


def test_sequences_of_length_0_are_no_documents(tmp_path: Path) -> None:
    info = parse(write_megatron(tmp_path, [0, 3, 0, 0, 4, 2, 0]), "megatron")
    assert (info.tokens, starts(info)) == (9, [0, 3, 7])
    file = TokenFile(info, SMALL)
    assert list(file.documents(1, 9)) == [(3, 7), (7, 9)]
    assert list(file.documents(0, 3)) == [(0, 3)]
    assert list(file.documents(4, 7)) == []
    assert [file.edges.next(position) for position in (0, 1, 3, 4, 8, 9)] == [0, 3, 3, 7, 9, 9]


def test_modes_of_zero_are_allowed_and_others_are_not(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, [2, 3])
    index = path.with_suffix(".idx")
    content = index.read_bytes()
    index.write_bytes(content + b"\0\0")
    assert parse(path, "megatron").tokens == 5
    index.write_bytes(content + b"\0\1")
    with pytest.raises(CorpusError, match="several modes"):
        parse(path, "megatron")


def corrupted(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:20], "not a Megatron index"),
        (lambda c: b"XXIDIDX" + c[7:], "not a Megatron index"),
        (lambda c: corrupted(c, 9, struct.pack(">Q", 1)), "big-endian"),
        (lambda c: corrupted(c, 9, struct.pack("<Q", 2)), "version 2"),
        (lambda c: corrupted(c, 17, b"\x07"), "float32"),
        (lambda c: corrupted(c, 17, b"\x63"), "unknown type 99"),
        (lambda c: c[:-8], "cut short"),
        (lambda c: corrupted(c, 34, struct.pack("<i", 4)), "expected"),
        (lambda c: corrupted(c, 34, struct.pack("<i", -2)), "length -2"),
        (lambda c: corrupted(c, 34 + 4, struct.pack("<i", 9)), "past the end"),
        (lambda c: corrupted(c, 34 + 8 + 8, struct.pack("<q", 1 << 40)), "past the end"),
        (lambda c: corrupted(c, 34 + 8 + 8, struct.pack("<q", -4)), "byte -4"),
        (lambda c: corrupted(c, len(c) - 8, struct.pack("<q", 1)), "do not span"),
    ],
)  # fmt: skip
def test_a_damaged_megatron_index_is_named(
    change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = write_megatron(tmp_path, [2, 3])
    index = path.with_suffix(".idx")
    index.write_bytes(change(index.read_bytes()))
    with pytest.raises(CorpusError, match=message) as caught:
        parse(path, "megatron")
    assert str(caught.value).startswith("file = '")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, [2, 3])
    os.truncate(path, 8)
    with pytest.raises(CorpusError, match="past the end of the file of 8 bytes"):
        parse(path, "megatron")
    os.truncate(path, 0)
    with pytest.raises(CorpusError, match="holds no token"):
        parse(path, "megatron")


@pytest.mark.parametrize(
    ("case", "file", "remove", "kind"),
    [
        ("megatron", "text_document.bin", "text_document.idx", "megatron"),
        ("datatrove", "00000_unshuffled.ds", "00000_unshuffled.ds.index", "datatrove"),
    ],
)
def test_a_missing_index_is_named(
    case: str, file: str, remove: str, kind: MappedFormat, tmp_path: Path
) -> None:
    for path in (FIXTURES / case).iterdir():
        if path.name != remove:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CorpusError, match="is missing"):
        parse(tmp_path / file, kind)


def test_ids_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, [2, 3])
    with pytest.raises(CorpusError, match=r"uint16.*100,278 ids.*above 65,535"):
        parse(path, "megatron", LARGE)
    # 65,536 ids are 0 to 65,535: they fit.
    assert parse(path, "megatron", TokenFileOptions(1 << 16, 256)).tokens == 5


@pytest.mark.parametrize(
    ("dtype", "bad", "shown"), [("<u2", 300, "300"), ("<i4", -1, "-1"), ("<i8", 1 << 40, "1,099")]
)
def test_ids_outside_the_vocabulary_are_found_when_they_are_read(
    dtype: str, bad: int, shown: str, tmp_path: Path
) -> None:
    ids = np.full(9, 256, dtype)
    ids[5] = bad
    ids.tofile(tmp_path / "x.bin")
    options = TokenFileOptions(257, 256, dtype=np.dtype(dtype).name)
    file = TokenFile(parse(tmp_path / "x.bin", "nanogpt", options), options)
    assert file.read(0, 5, np.uint16).tolist() == [256] * 5
    with pytest.raises(CorpusError, match=f"token 5 is {shown}"):
        file.read(2, 9, np.uint16)


def test_a_file_that_changes_is_named(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, [2, 3])
    info = parse(path, "megatron")
    os.utime(path, ns=(1, 1))
    with pytest.raises(CorpusError, match="has changed"):
        TokenFile(info, SMALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"\1\0\2", "cut short"), (b"\x93NUMPY\1\0garbage", "header is damaged")],
)
def test_a_bad_npy_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        parse(tmp_path / "x.npy", "olmo")


def write_olmo(folder: Path, rows: list[str], ids: np.ndarray) -> Path:
    ids.tofile(folder / "x.npy")
    (folder / "x.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    return folder / "x.npy"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0,2,a", "2,9,b"], "ends at token 9"),
        (["0,2,a", "3,5,b"], r"document 1 is \[3, 5\), 2 expected"),
        (["0,2,a", "x"], "cannot be read as lines"),
        ([], "ends at token 0"),
    ],
)
def test_an_index_of_dolma_that_does_not_fit_is_named(
    rows: list[str], message: str, tmp_path: Path
) -> None:
    path = write_olmo(tmp_path, rows, np.full(5, 256, np.uint16))
    with pytest.raises(CorpusError, match=message):
        parse(path, "olmo")


def test_dolmas_index_tells_the_width_of_ids_and_the_documents(tmp_path: Path) -> None:
    # No document ends with end-of-text, which the index makes up for.
    path = write_olmo(tmp_path, ["0,2,a", "2,2,b", "2,5,c"], np.arange(5, dtype=np.uint32))
    info = parse(path, "olmo")
    assert (info.dtype, info.tokens, starts(info)) == ("uint32", 5, [0, 2])


def test_a_numpy_file_of_ids_is_read_behind_its_header(tmp_path: Path) -> None:
    ids = np.array([256, 1, 2, 256, 3], np.uint16)
    np.save(tmp_path / "x.npy", ids)
    info = parse(tmp_path / "x.npy", "olmo")
    assert TokenFile(info, SMALL).tokens.tolist() == ids.tolist()
    assert starts(info) == [0, 3]
    np.save(tmp_path / "x.npy", ids.astype(">u2"))
    with pytest.raises(CorpusError, match="big-endian"):
        parse(tmp_path / "x.npy", "olmo")
    np.save(tmp_path / "x.npy", ids.reshape(1, 5))
    with pytest.raises(CorpusError, match="shape"):
        parse(tmp_path / "x.npy", "olmo")


def header(magic: int, version: int, tokens: int, order: str = "<") -> bytes:
    numbers = np.zeros(256, f"{order}i4")
    numbers[:3] = magic, version, tokens
    return numbers.tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(20240520, 1, 3), "holds no token"),
        (header(20240520, 1, 3) + b"\0\0\0\0", "header says 3 tokens, the file holds 2"),
        (header(20240520, 1, 3) + b"\0\0\0", "cut short"),
        (header(20240520, 2, 2) + b"\0\0\0\0", "version 2"),
        (header(20240520, 1, 2, ">") + b"\0\0\0\0", "big-endian"),
        (b"\1\0" * 600, "does not begin with llm.c's header"),
    ],
)
def test_a_bad_llmc_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        parse(tmp_path / "x.bin", "llmc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: os.truncate(f / "x.ds", 516), "its index leads to token 259"),
        (lambda f: os.truncate(f / "x.ds.index", 92), "cut short"),
        (lambda f: (f / "x.ds.index").write_bytes(struct.pack("<Q", 9999)), "past the end"),
        (lambda f: (f / "x.ds.metadata").write_text("gpt2|4\n259\n"), "2 bytes per token"),
        (lambda f: (f / "x.ds.metadata").write_text("gpt2|2\n258\n"), "says 258"),
        (lambda f: (f / "x.ds.loss").write_bytes(b"\1" * 258), "holds 258 bytes"),
    ],
)
def test_a_bad_datatrove_file_is_named(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    for path in (FIXTURES / "datatrove").iterdir():
        name = path.name.replace("00000_unshuffled", "x")
        (tmp_path / name).write_bytes(path.read_bytes())
    change(tmp_path)
    with pytest.raises(CorpusError, match=message):
        parse(tmp_path / "x.ds", "datatrove")


def test_offsets_that_do_not_ascend_are_named(tmp_path: Path) -> None:
    np.full(9, 256, np.uint16).tofile(tmp_path / "x.ds")
    np.array([4, 2, 9], "<u8").tofile(tmp_path / "x.ds.index")
    with pytest.raises(CorpusError, match="do not ascend"):
        starts(parse(tmp_path / "x.ds", "datatrove"))
    np.array([4, 12, 9], "<u8").tofile(tmp_path / "x.ds.index")
    with pytest.raises(CorpusError, match="do not ascend"):
        starts(parse(tmp_path / "x.ds", "datatrove"))


def test_a_bad_litdata_chunk_is_named(tmp_path: Path) -> None:
    for path in (FIXTURES / "litdata").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    os.truncate(tmp_path / "chunk-0-1.bin", 300)
    with pytest.raises(CorpusError, match="cut short"):
        token_files(str(tmp_path / "index.json"), "litdata", SMALL)
    index = json.loads((tmp_path / "index.json").read_text())
    index["config"]["data_format"] = ["int", "str"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CorpusError, match="TokensLoader"):
        token_files(str(tmp_path / "index.json"), "litdata", SMALL)


def test_a_bad_mds_shard_is_named(tmp_path: Path) -> None:
    for path in (FIXTURES / "mds").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = str(tmp_path / "index.json")
    with pytest.raises(CorpusError, match="do not tell the type"):
        mds_shards(index, "tokens", None)
    with pytest.raises(CorpusError, match="columns found are id, name, tokens"):
        mds_shards(index, "input_ids", "int64")
    with pytest.raises(CorpusError, match="of type str"):
        mds_shards(index, "name", "int64")
    os.truncate(tmp_path / "shard.00001.mds", 1000)
    first, second = mds_shards(index, "tokens", "int64")
    assert len(list(shard_documents(first))) == 4
    with pytest.raises(CorpusError, match="damaged"):
        list(shard_documents(second))


def test_formats_are_found_by_neighbors_and_first_bytes(tmp_path: Path) -> None:
    found = {
        case: detect(str(next(p for p in sorted((FIXTURES / case).iterdir(), reverse=True)
                              if not is_companion(str(p)))))
        for case in ("megatron", "olmo", "datatrove", "llmc", "nanogpt", "litdata", "mds")
    }  # fmt: skip
    assert found == {case: case for case in found} | {"nanogpt": None}
    (tmp_path / "index.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert detect(str(tmp_path / "index.json")) is None
    assert not is_companion(str(tmp_path / "other.idx"))
