"""Corpora and runs in a bucket of a real S3-compatible server: what a local disk gives, they give.

Everything is read and written by the URLs that a recipe holds; the server and the credentials are
known from the environment alone.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from raymix.corpus import prepare
from raymix.errors import CorpusError, RaymixError, StorageError, UnreachableError
from raymix.recipe import CorpusConfig
from raymix.store import Corpus
from raymix.store.remote import files
from tests.support import buckets
from tests.support.shell import DOMAINS, QUICKSTART, recipe_document


@pytest.fixture(scope="module")
def texts(store: str) -> str:
    """Return the URL of the texts of four real domains."""
    buckets.put(f"{store}/texts", QUICKSTART)
    return f"{store}/texts"


@pytest.fixture
def locked_store(store: str) -> Iterator[None]:
    """Have the server check credentials, of which none are known to it."""
    with buckets.forbidding():
        yield


def config(path: str, texts: str) -> CorpusConfig:
    document = recipe_document()["corpus"] | {"path": path, "tokenizer": "byte"}
    document["domains"] = [
        {
            "name": name,
            "train": f"{texts}/train/{name}.p*t",
            "valid": f"{texts}/valid/{name}.parquet",
        }
        for name in DOMAINS
    ]
    return CorpusConfig.model_validate(document)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = str(tmp_path_factory.mktemp("local") / "corpus")
    prepare(config(path, str(QUICKSTART)), parallelism=0)
    return Corpus.open(path)


@pytest.fixture(scope="module")
def remote(store: str, texts: str) -> Corpus:
    prepare(config(f"{store}/corpus", texts), parallelism=0)
    return Corpus.open(f"{store}/corpus")


def test_a_corpus_in_a_bucket_is_that_of_a_disk(local: Corpus, remote: Corpus, texts: str) -> None:
    assert remote.manifest == local.manifest
    for name in DOMAINS:
        info = local.split(name, "train")
        for block in {0, info.blocks // 2, info.blocks - 1}:
            here, there = (each.read_block(name, "train", block) for each in (local, remote))
            assert (here.tokens == there.tokens).all()
            assert (here.starts == there.starts).all()
        lengths = (each.document_lengths(name, "valid") for each in (local, remote))
        assert (next(lengths) == next(lengths)).all()
    names = files.list_directory(remote.path)
    assert not [name for name in names if name.startswith(".")], "work is left behind"
    assert prepare(config(remote.path, texts), parallelism=0) == local.manifest


FORMATS = ("jsonl", "jsonl.gz", "txt", "arrow")


def write_texts(path: Path) -> None:
    """Write the same twenty texts in every format."""
    texts = [f"text {number}, " + "with words in it, " * number for number in range(20)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (path / "a.jsonl").write_bytes(lines)
    (path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (path / "a.txt").write_text("\n\n".join(texts))
    table = pa.table({"text": texts})
    with pa.ipc.new_file(path / "a.arrow", table.schema) as writer:
        writer.write_table(table)


def test_every_format_is_read_from_a_bucket(store: str, tmp_path: Path) -> None:
    write_texts(tmp_path)
    buckets.put(f"{store}/formats", tmp_path)
    manifests = []
    for path, texts in (
        (str(tmp_path / "corpus"), str(tmp_path)),
        (f"{store}/many", f"{store}/formats"),
    ):
        domains = [
            {"name": ending, "train": f"{texts}/a.{ending}", "text_unit": "paragraph"}
            for ending in FORMATS
        ]
        document = {"path": path, "domains": domains, "valid_fraction": 0.3}
        manifests.append(prepare(CorpusConfig.model_validate(document), parallelism=0))
    assert manifests[0] == manifests[1]
    assert {info.records_read for info in manifests[0].domains.values()} == {20}


def refusal(kind: type[RaymixError], path: str, texts: str) -> str:
    with pytest.raises(kind) as caught:
        prepare(config(path, texts), parallelism=0)
    return str(caught.value)


def test_a_bucket_that_is_not_there(store: str, texts: str) -> None:
    said = refusal(StorageError, "s3://no-such-bucket/corpus", texts)
    assert said == (
        "corpus.path = 's3://no-such-bucket/corpus': no such bucket. Create the bucket first."
    )
    said = refusal(StorageError, f"{store}/new", "s3://no-such-bucket")
    assert said.startswith("corpus.domains.0.train = 's3://no-such-bucket/train': no such")
    with pytest.raises(CorpusError, match="no prepared corpus is here"):
        Corpus.open("s3://no-such-bucket/corpus")


def test_a_store_that_does_not_answer(texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    said = refusal(UnreachableError, f"s3://{buckets.BUCKET}/new", texts)
    assert said.startswith(f"corpus.path = 's3://{buckets.BUCKET}/new': the store does not answer.")
    assert "AWS_ENDPOINT_URL" in said


def test_a_store_that_does_not_allow_it(
    texts: str, monkeypatch: pytest.MonkeyPatch, locked_store: None
) -> None:
    said = refusal(StorageError, f"s3://{buckets.BUCKET}/new", texts)
    assert said.startswith("corpus.path = ")
    assert "denies access" in said
    assert buckets.SECRET not in said


def test_an_object_that_vanished(store: str, remote: Corpus) -> None:
    buckets.copy(remote.path, f"{store}/holed")
    corpus = Corpus.open(f"{store}/holed")
    shard = corpus.split("math", "train").shards[0].file
    files.remove(f"{store}/holed/{shard}")
    with pytest.raises(CorpusError, match=f"{shard}, block 0 of the file is corrupt: .*missing"):
        corpus.read_block("math", "train", 0)


def test_a_flipped_bit_in_a_bucket(store: str, remote: Corpus) -> None:
    buckets.copy(remote.path, f"{store}/flipped")
    corpus = Corpus.open(f"{store}/flipped")
    file = f"{store}/flipped/{corpus.split('math', 'train').shards[0].file}"
    raw = bytearray(files.read_bytes(file))
    raw[len(raw) // 2] ^= 1
    files.atomic_write_bytes(file, bytes(raw))
    with pytest.raises(CorpusError, match="checksum"):
        corpus.read_blocks("math", "train", range(corpus.split("math", "train").blocks))


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(StorageError) as caught:
        Corpus.open("s3://somebody:hunter2@bucket/corpus")
    said = str(caught.value)
    assert "'s3://bucket/corpus/manifest.json': a password in a URL" in said
    assert "hunter2" not in said
