"""Sources and prepared corpora, damaged: prepared with rejects counted, or refused."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymix.corpus import prepare
from raymix.recipe import CorpusConfig
from raymix.store import Corpus
from tests.support.corpora import labeled_domain, write_corpus
from tests.support.fuzzing import damaged, outcome

CASES = [60, pytest.param(1200, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
MANY = [300, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
TEXTS = [
    f"Document {at} of some words, é and 漢字, to be cut into tokens.\nAnd a line."
    for at in range(40)
]


def jsonl() -> bytes:
    return "".join(
        json.dumps({"id": at, "text": text}) + "\n" for at, text in enumerate(TEXTS)
    ).encode()


def text() -> bytes:
    return "\n\n".join(TEXTS).encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), sink, row_group_size=16)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    return sink.getvalue()


def gzipped() -> bytes:
    return gzip.compress(jsonl(), mtime=0)


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(
    ("name", "write", "more"),
    [
        ("a.jsonl", jsonl, {}),
        ("a.jsonl.gz", gzipped, {}),
        ("a.txt", text, {"text_unit": "paragraph"}),
        ("a.txt", text, {"text_unit": "line"}),
        ("a.parquet", parquet, {}),
        ("a.arrow", arrow, {}),
    ],
)
def test_sources(
    name: str, write: Callable[[], bytes], more: dict[str, Any], cases: int, tmp_path: Path
) -> None:
    raw, source, out = write(), tmp_path / name, tmp_path / "corpus"
    config = CorpusConfig.model_validate(
        {
            "path": str(out),
            "domains": [{"name": "a", "train": str(source), **more}],
            "valid_fraction": 0.1,
            "block_tokens": 64,
        }
    )
    for case in range(cases):
        source.write_bytes(raw if case == 0 else damaged(raw, case))
        label = f"{name} {more} case {case}"
        done = outcome(lambda: prepare(config, parallelism=0), label)
        assert (out / "manifest.json").exists() == (done is not None), label
        if done is not None:
            corpus = Corpus.open(str(out))
            assert corpus.split("a", "train").tokens > 0, label
        else:
            assert case != 0
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("cases", MANY)
def test_prepared_corpora(cases: int, tmp_path: Path) -> None:
    """Every file of a prepared corpus in turn: what can be read is what was written."""
    whole = tmp_path / "whole"
    domains = {name: labeled_domain(at, 600) for at, name in enumerate("ab")}
    write_corpus(whole, domains, block_tokens=64, shard_blocks=4)
    expected = {name: contents(str(whole), name) for name in domains}
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    for case in range(cases):
        file = files[case % len(files)]
        raw = (whole / file).read_bytes()
        (whole / file).write_bytes(damaged(raw, case))
        label = f"{file} case {case}"
        for name in domains:
            actual = outcome(lambda name=name: contents(str(whole), name), label)
            # A manifest is believed; what it says of shards is not: they carry checksums.
            if actual is not None and file.name.startswith("shard"):
                assert np.array_equal(actual, expected[name]), label
        (whole / file).write_bytes(raw)


def contents(path: str, domain: str) -> np.ndarray:
    corpus = Corpus.open(path)
    corpus.document_lengths(domain, "train")
    count = min(corpus.split(domain, "train").blocks, 64)
    blocks = [corpus.read_block(domain, "train", at).tokens for at in range(count)]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.uint16)
