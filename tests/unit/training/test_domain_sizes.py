"""What domains have to give, estimated from files of every kind before anything is prepared."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig, DocumentData, DomainConfig, PackedData, TrainedTokenizer
from raymix.training.plan.domain_sizes import DomainSizes, estimated_sizes

TEXTS = [
    f"Document {number} holds some words, and {number * 7} more. " * 20 for number in range(99)
]
BYTES = sum(len(text.encode()) for text in TEXTS)


def sizes_of(domain: DomainConfig, *, length: int = 8, **corpus: Any) -> DomainSizes:
    config = CorpusConfig(path="/none", domains=(domain,), **corpus)
    (sizes,) = estimated_sizes(config, PackedData(sequence_length=length))
    return sizes


def test_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    sizes = sizes_of(DomainConfig(name="d", train=(f"{tmp_path}/*.txt",)), valid_fraction=0.1)
    assert sizes.tokens == pytest.approx(0.9 * BYTES, rel=0.01)
    assert sizes.valid_tokens == pytest.approx(0.1 * BYTES, rel=0.01)
    assert sizes.documents is None
    assert sizes.unigram_entropy is None


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
    plain = sizes_of(DomainConfig(name="d", train=(f"{tmp_path}/a.jsonl",)))
    packed = sizes_of(DomainConfig(name="d", train=(f"{tmp_path}/b.jsonl.gz",)))
    assert plain.tokens == pytest.approx(0.98 * BYTES, rel=0.05)
    assert 0 < packed.tokens < plain.tokens


def test_files_held_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    (tmp_path / "b.txt").write_text("".join(TEXTS[:33]))
    domain = DomainConfig(name="d", train=(f"{tmp_path}/a.txt",), valid=(f"{tmp_path}/b.txt",))
    sizes = sizes_of(domain)
    assert sizes.tokens == pytest.approx(BYTES, rel=0.01)
    assert sizes.valid_tokens == pytest.approx(BYTES / 3, rel=0.05)


def test_ready_token_ids(tmp_path: Path) -> None:
    ids = pa.array([list(range(1000))] * 10, pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": ids}), tmp_path / "a.parquet", use_dictionary=False)
    domain = DomainConfig(name="d", train=(f"{tmp_path}/*",), tokens_column="input_ids")
    assert sizes_of(domain).tokens == pytest.approx(9_800, rel=0.1)


def test_a_larger_vocabulary_gives_fewer_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    domain = DomainConfig(name="d", train=(f"{tmp_path}/a.txt",))
    sizes = [512, 4096, 32_768, 262_144, 1_000_000]
    counts = [
        sizes_of(domain, tokenizer=TrainedTokenizer(train="bpe", vocab_size=size)).tokens
        for size in sizes
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] < BYTES
    assert counts[-1] == counts[-2] > BYTES / 5


def test_only_whole_rows_are_usable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    domain = DomainConfig(name="d", train=(f"{tmp_path}/a.txt",))
    sizes = sizes_of(domain, length=300, valid_fraction=0.01)
    assert (sizes.tokens, sizes.usable, sizes.dropped) == (990, 900, 90)
    (whole,) = estimated_sizes(
        CorpusConfig(path="/none", domains=(domain,), valid_fraction=0.01),
        DocumentData(mode="documents"),
    )
    assert whole.usable == whole.tokens


def test_a_column_that_is_not_there_is_said_before_preparing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="the columns found are: id, body"):
        sizes_of(DomainConfig(name="d", train=(f"{tmp_path}/a.parquet",)))


def test_domains_keep_the_order_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    names = ("zeta", "alpha", "mid")
    domains = tuple(DomainConfig(name=name, train=(f"{tmp_path}/a.txt",)) for name in names)
    sizes = estimated_sizes(CorpusConfig(path="/none", domains=domains), PackedData())
    assert tuple(domain.name for domain in sizes) == names
