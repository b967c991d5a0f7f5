"""Files as people have them: containers, encodings and layouts that other tools write."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from raymix.corpus.preparation import prepare
from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig
from tests.integration.corpus.test_readers import read

LINES = "".join(f'{{"text": "document {number}"}}\n' for number in range(300)).encode()
TEXTS = [f"document {number}" for number in range(300)]


def zstd_frame(content: bytes, *, window_log: int = 20) -> bytes:
    """Return one frame of stored blocks (RFC 8878, 3.1.1), which no compressor would write."""
    limit = 1 << 17
    blocks = [content[low : low + limit] for low in range(0, len(content), limit)] or [b""]
    body = b"".join(
        ((number == len(blocks) - 1) | len(block) << 3).to_bytes(3, "little") + block
        for number, block in enumerate(blocks)
    )
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + body


def test_zstd_with_the_longest_window(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd_frame(LINES, window_log=31))
    assert read(tmp_path / "a.jsonl.zst") == TEXTS


def test_zstd_frames_and_skippable_frames(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    packed = zstandard.compress(LINES[:half]) + skippable + zstandard.compress(LINES[half:])
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + packed)
    assert read(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zstandard.compress)],
)
def test_members_padding_and_what_follows(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    half = LINES.index(b"\n", len(LINES) // 2) - 3  # within a line
    members = pack(LINES[:half]) + pack(LINES[half:])
    for padding in (b"", b"\0" * 512, b"\0" * 300_000):
        path.write_bytes(members + padding)
        assert read(path) == TEXTS
    path.write_bytes(pack(LINES[:half]) + b"\0" * 100 + pack(LINES[half:]))
    assert read(path) == TEXTS
    path.write_bytes(members + b"--end of tape--")
    assert read(path) == [*TEXTS, "data after the end of the compressed data"]
    for cut in (1, 9, len(members) // 3):
        path.write_bytes(members[:-cut])
        with pytest.raises(CorpusError, match=f"file = '{path}': cannot be read as jsonl"):
            read(path)


@pytest.mark.parametrize("content", [LINES, b"PAR1\x15\x04", gzip.compress(LINES)])
def test_a_compressed_name_without_compression_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="it is not zstd, as its name says"):
        read(path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(LINES), "gzip"),
        (zstandard.compress(LINES), "zstd"),
        (bz2.compress(LINES), "bz2"),
        (b"PK\x03\x04rest", "zip"),
        (b"%PDF-1.7", "PDF"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_other_formats_under_a_name_of_text(
    tmp_path: Path, content: bytes, kind: str, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=f"as its name says: it begins as {kind} does"):
        read(tmp_path / name)


RECORDS = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=1),
        "\ufeff \n" + json.dumps(RECORDS, indent="\t", ensure_ascii=False).replace("\n", "\r\n"),
        "\n".join(json.dumps(record, indent=2) for record in RECORDS),
        json.dumps(RECORDS[:100]) + json.dumps(RECORDS[100:]),
    ],
    ids=["one line", "indented", "windows", "objects", "two arrays"],
)
def test_json_that_is_not_lines(tmp_path: Path, ending: str, content: str) -> None:
    path = tmp_path / f"a{ending}"
    raw = content.encode()
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    assert read(path) == TEXTS


def test_long_json_arrays_are_read_in_chunks(tmp_path: Path) -> None:
    texts = ['é]}\\"[{,' * 40_000, "short", "\U0001f600" * 700_000]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False))
    assert read(path, max_characters=1_000_000) == texts


def test_bad_json_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "good"}, {"text": "caf\xe9"}, 5, {"txt": "x"}, {"text": null}]')
    values = read(path)
    assert values == ["good", "invalid UTF-8", "not a JSON object", "no 'text' key", "null"]
    for content in ('[{"text": "a"}', '[{"text": "a"}, {"te', '[{"text": "a"} nonsense]'):
        path.write_text(content)
        with pytest.raises(CorpusError, match="invalid JSON"):
            read(path)


def config(tmp: Path, *domains: dict[str, object], **fields: object) -> CorpusConfig:
    entries = [{"name": f"d{number}", **domain} for number, domain in enumerate(domains)]
    document = {"path": str(tmp / "corpus"), "valid_fraction": 0.1, "domains": entries}
    return CorpusConfig.model_validate(document | fields)


def test_a_null_column_among_files_of_text(tmp_path: Path) -> None:
    texts = pa.table({"text": TEXTS})
    pq.write_table(texts, tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "b.parquet")
    pq.write_table(texts.cast(pa.schema([("text", pa.large_string())])), tmp_path / "c.parquet")
    corpus = config(tmp_path, {"train": f"{tmp_path}/*.parquet"}, deduplicate=False)
    info = prepare(corpus, parallelism=0).domains["d0"]
    assert info.train.documents + info.valid.documents == 600
    assert (info.too_short, info.rejected, info.records_read) == (3, 0, 603)


def test_nulls_are_dropped_as_empty_texts_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [*TEXTS, *[None] * 100]}), tmp_path / "a.parquet")
    lines = LINES + b'{"text": null}\n{"text": ""}\n' * 40
    (tmp_path / "a.jsonl").write_bytes(lines)
    corpus = config(tmp_path, {"train": f"{tmp_path}/a.parquet"}, {"train": f"{tmp_path}/a.jsonl"})
    for info, dropped in zip(
        prepare(corpus, parallelism=0).domains.values(), (100, 80), strict=True
    ):
        assert (info.too_short, info.rejected) == (dropped, 0)


def test_only_nulls_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="no document of domain 'd0' is left to use"):
        prepare(config(tmp_path, {"train": f"{tmp_path}/a.parquet"}), parallelism=0)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "arrow"])
def test_text_in_a_struct(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    rows = [{"doc": {"meta": {"body": text}}, "a.b": text.upper()} for text in TEXTS[:5]]
    rows.append({"doc": None, "a.b": None})
    table = pa.Table.from_pylist(rows)
    if ending == "parquet":
        pq.write_table(table, path)
    elif ending == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path, text_column="doc.meta.body") == [*TEXTS[:5], "null"]
    # A column whose name has a dot comes first.
    assert read(path, text_column="a.b") == [*(text.upper() for text in TEXTS[:5]), "null"]
    if ending == "jsonl":
        assert read(path, text_column="doc.meta") == [*["not text"] * 5, "null"]
        assert set(read(path, text_column="doc.nothing")[:5]) == {"no 'doc.nothing' key"}
        return
    with pytest.raises(CorpusError, match=r"name a field of it: doc\.meta\.body"):
        read(path, text_column="doc.meta")
    for column in ("doc.nothing", "doc.meta.body.more"):
        with pytest.raises(CorpusError, match="no such column"):
            read(path, text_column=column)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str, name: str) -> None:
    mark = "\ufeff" if encoding[-2:] in ("le", "be") and "32" in encoding else ""
    raw = (mark + LINES.decode()).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    for attempt in (
        lambda: read(tmp_path / name),
        lambda: prepare(config(tmp_path, {"train": f"{tmp_path}/{name}"}), parallelism=0),
    ):
        with pytest.raises(CorpusError, match=r"it is UTF-(16|32).*iconv -f UTF-(16|32) -t UTF-8"):
            attempt()
    assert not (tmp_path / "corpus").exists()


def test_latin_1_is_named_as_the_cause(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1") * 9)
    with pytest.raises(CorpusError) as caught:
        prepare(config(tmp_path, {"train": f"{tmp_path}/a.jsonl"}), parallelism=0)
    said = str(caught.value)
    assert said.startswith(f"file = '{tmp_path}/a.jsonl': line 1: invalid UTF-8")
    assert "iconv -f WINDOWS-1252 -t UTF-8" in said


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for unit, wanted in (
        ("file", ["one\n\ntwo\n"]),
        ("line", ["one", "two"]),
        ("paragraph", ["one", "two"]),
    ):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
        assert read(tmp_path / "a.txt", text_unit=unit) == wanted


def test_half_characters_are_repaired_and_counted(tmp_path: Path) -> None:
    half = r'{"text": "cut \ud83d here"}' + "\n"
    (tmp_path / "a.jsonl").write_bytes(LINES + half.encode())
    (tmp_path / "b.jsonl").write_bytes(LINES + '{"text": "cut \ufffd here"}\n'.encode())
    fingerprints = []
    for name in ("a", "b"):
        corpus = config(tmp_path, {"train": f"{tmp_path}/{name}.jsonl"}, path=str(tmp_path / name))
        manifest = prepare(corpus, parallelism=0)
        fingerprints.append(manifest.fingerprint)
        assert manifest.domains["d0"].repaired == (name == "a")
        assert manifest.domains["d0"].rejected == 0
    # As tiktoken has it: U+FFFD for the half.
    assert fingerprints[0] == fingerprints[1]


AWKWARD = ["plain", 'quote " inside', "two\nlines", "comma, and ; and \t", "", "  ", "日本語", "NA"]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_of_pandas(tmp_path: Path, delimiter: str, end: str) -> None:
    frame = pandas.DataFrame({"id": range(len(AWKWARD)), "text": AWKWARD, "x": 1.5})
    path = tmp_path / "a.csv"
    frame.to_csv(path, index=False, sep=delimiter, lineterminator=end, encoding="utf-8-sig")
    back = pandas.read_csv(path, sep=delimiter, keep_default_na=False, encoding="utf-8-sig")
    assert read(path) == back["text"].tolist() == AWKWARD


def test_bad_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,good\n2\n3,caf\xe9\n\n4,"a ""quoted"" word"\n')
    wrong = "a row of 1 fields, the header has 2"
    assert read(path) == ["good", wrong, "invalid UTF-8", 'a "quoted" word']
    for content in ('id,text\n1,"never closed\n2,b\n', 'id,text\n1,"a \\"quoted\\" word"\n'):
        path.write_text(content)
        with pytest.raises(CorpusError, match="is no CSV"):
            read(path)
    path.write_text("id;body\n1;a\n")
    with pytest.raises(CorpusError, match=r"no such column.*found are: id, body"):
        read(path)


def test_csv_fields_of_megabytes(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["text"], [long], ["short"]])
    (tmp_path / "a.csv").write_text(buffer.getvalue())
    assert read(tmp_path / "a.csv", max_characters=4_000_000) == [long, "short"]


def test_source_code_is_text(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("print('hello')\n")
    assert read(tmp_path / "setup.py") == ["print('hello')\n"]
