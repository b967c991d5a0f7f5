"""The store: what is written comes back, and what is damaged is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.errors import CorpusError
from raymix.store import (
    Block,
    Corpus,
    DomainInfo,
    Manifest,
    ShardInfo,
    ShardWriter,
    SplitInfo,
    TokenizerInfo,
    atomic_write_text,
    block_schema,
    corpus_fingerprint,
    token_dtype,
    write_lengths,
)
from raymix.store.remote import files

CUT = 8


def split_info(shards: list[ShardInfo], documents: int) -> SplitInfo:
    return SplitInfo(
        documents=documents,
        tokens=sum(shard.tokens for shard in shards),
        bytes=0,
        blocks=sum(shard.blocks for shard in shards),
        shards=tuple(shards),
        length_quantiles={},
        length_histogram={},
        unigram_entropy=0.0,
        bigram_entropy=0.0,
    )


def write_corpus(path: str, lengths: list[int], *, vocab: int = 257, per_shard: int = 3) -> None:
    stream = np.arange(sum(lengths)) % vocab
    starts = np.cumsum([0, *lengths])[:-1]
    dtype = token_dtype(vocab)
    blocks = []
    for low in range(0, len(stream), CUT):
        inside = starts[(starts >= low) & (starts < low + CUT)] - low
        blocks.append(Block(stream[low : low + CUT].astype(dtype), inside.astype(np.uint32)))
    shards = []
    for number, low in enumerate(range(0, len(blocks), per_shard)):
        with ShardWriter(path, f"d/train/shard-{number:05d}.arrow", dtype) as writer:
            for block in blocks[low : low + per_shard]:
                writer.write(block)
        shards.append(writer.info)
    write_lengths(files.join(path, "d/train/documents.arrow"), [np.array(lengths)])
    tokenizer = TokenizerInfo(kind="byte", fingerprint="f", vocab_size=vocab, eos_id=vocab - 1)
    domain = DomainInfo(
        train=split_info(shards, len(lengths)),
        valid=split_info([], 0),
        records_read=len(lengths),
        rejected=0,
        duplicates=0,
        too_short=0,
        too_long=0,
    )
    manifest = Manifest(
        fingerprint=corpus_fingerprint(tokenizer, CUT, {"d": domain}),
        tokenizer=tokenizer,
        block_tokens=CUT,
        domains={"d": domain},
    )
    atomic_write_text(files.join(path, "manifest.json"), manifest.model_dump_json())


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    write_corpus(str(tmp_path), [5, 30, 1, 2, 60])
    return Corpus.open(str(tmp_path))


@given(
    tokens=st.lists(st.integers(0, 65535), max_size=50),
    starts=st.sets(st.integers(0, 50)),
    wide=st.booleans(),
)
def test_block_survives_arrow(tokens: list[int], starts: set[int], wide: bool) -> None:
    dtype = np.uint32 if wide else np.uint16
    block = Block(np.array(tokens, dtype), np.array(sorted(starts), np.uint32))
    batch = block.to_batch()
    assert batch.schema == block_schema(dtype)
    table = pa.Table.from_batches([batch, batch.slice(0, 0), batch, batch])
    for back in (Block.from_table(batch), Block.from_table(table, 2)):
        assert back.tokens.dtype == dtype
        np.testing.assert_array_equal(back.tokens, block.tokens)
        np.testing.assert_array_equal(back.starts, block.starts)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    vocab=st.sampled_from([257, 70_000]),
)
@settings(max_examples=40)
def test_stream_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], vocab: int
) -> None:
    path = str(tmp_path_factory.mktemp("corpus"))
    write_corpus(path, lengths, vocab=vocab)
    corpus = Corpus.open(path)
    info = corpus.split("d", "train")
    blocks = corpus.read_blocks("d", "train", range(info.blocks))
    stream = np.concatenate([block.tokens for block in blocks])
    np.testing.assert_array_equal(stream, np.arange(sum(lengths)) % vocab)
    assert stream.dtype == corpus.dtype == token_dtype(vocab)
    begins = np.concatenate([block.starts + CUT * i for i, block in enumerate(blocks)])
    np.testing.assert_array_equal(begins, np.cumsum([0, *lengths])[:-1])
    np.testing.assert_array_equal(corpus.document_lengths("d", "train"), lengths)
    assert len(corpus.document_lengths("d", "valid")) == 0


def test_blocks_are_views_of_the_file(corpus: Corpus) -> None:
    block = corpus.read_block("d", "train", 1)
    assert not block.tokens.flags.writeable
    assert not block.tokens.flags.owndata


def test_blocks_come_in_the_order_asked(corpus: Corpus) -> None:
    blocks = corpus.read_blocks("d", "train", [7, 0, 7])
    assert [int(block.tokens[0]) for block in blocks] == [56, 0, 56]
    assert corpus.shard_of("d", "train", 7) == ("d/train/shard-00002.arrow", 1)


def test_corpus_pickles_as_its_path(corpus: Corpus) -> None:
    corpus.read_block("d", "train", 0)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).fingerprint == corpus.fingerprint


def test_any_fsspec_store_will_do() -> None:
    write_corpus("memory://raymix-store/c", [9, 9])
    corpus = Corpus.open("memory://raymix-store/c")
    assert len(corpus.read_block("d", "train", 2).tokens) == 2
    np.testing.assert_array_equal(corpus.document_lengths("d", "train"), [9, 9])
    assert "d" in files.list_directory("memory://raymix-store/c")
    files.remove("memory://raymix-store/c")
    assert not files.exists("memory://raymix-store/c/manifest.json")


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    prints = []
    for name, lengths in (("a", [5, 5]), ("b", [5, 5]), ("c", [5, 6])):
        write_corpus(str(tmp_path / name), lengths)
        prints.append(Corpus.open(str(tmp_path / name)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def message(corpus: Corpus, block: int = 4) -> str:
    with pytest.raises(CorpusError) as caught:
        Corpus.open(corpus.path).read_block("d", "train", block)
    return str(caught.value)


def shard(corpus: Corpus) -> Path:
    return Path(corpus.path) / "d/train/shard-00001.arrow"


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "head", "noise", "flip", "other"])
def test_corrupt_shard_names_file_and_block(corpus: Corpus, damage: str) -> None:
    path, good = shard(corpus), shard(corpus).read_bytes()
    stored = corpus.read_block("d", "train", 4).tokens.tobytes()
    if damage == "gone":
        path.unlink()
    elif damage == "flip":
        at = good.index(stored)
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    elif damage == "other":
        path.write_bytes((path.parent / "documents.arrow").read_bytes())
    else:
        path.write_bytes(
            {"empty": b"", "cut": good[:-20], "head": good[:100], "noise": b"\xff" * len(good)}[
                damage
            ]
        )
    said = message(corpus)
    assert "d/train/shard-00001.arrow, block 1 of the file is corrupt" in said
    assert corpus.path in said


@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=40)
def test_no_single_byte_changes_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("corpus")
    write_corpus(str(path), [20])
    shard = path / "d/train/shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[at % len(content)] = value
    shard.write_bytes(content)
    try:
        block = Corpus.open(str(path)).read_block("d", "train", 1)
    except CorpusError:
        return
    np.testing.assert_array_equal(block.tokens, np.arange(8, 16))


def test_shard_of_wrong_size_is_found(corpus: Corpus) -> None:
    shard(corpus).write_bytes((Path(corpus.path) / "d/train/shard-00004.arrow").read_bytes())
    assert "2 tokens of uint16, 8 of uint16 expected" in message(corpus, 3)


def test_wrong_lengths_file_is_found(corpus: Corpus) -> None:
    write_lengths(corpus.path + "/d/train/documents.arrow", [np.array([3])])
    with pytest.raises(CorpusError, match="1 documents, 5 expected"):
        corpus.document_lengths("d", "train")


def test_unknown_names_are_explained(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match=r"domain = 'dd'.*it holds: d"):
        corpus.split("dd", "train")
    with pytest.raises(CorpusError, match="allowed: train, valid"):
        corpus.split("d", "test")
    with pytest.raises(CorpusError, match=r"d\.train\.block = 13: the split has 13 blocks"):
        corpus.read_block("d", "train", 13)


def test_unprepared_corpus_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no prepared corpus is here.*raymix prepare"):
        Corpus.open(str(tmp_path / "absent"))
    with pytest.raises(CorpusError, match="cannot be opened"):
        Corpus.open("nosuchscheme://x/y")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', '{"format": "x"}'])
def test_damaged_manifest_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match="is damaged"):
        Corpus.open(str(tmp_path))


def test_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 3, "novel": true}')
    with pytest.raises(CorpusError, match="format 3, this raymix reads up to 2"):
        Corpus.open(str(tmp_path))


def test_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    block = Block(np.arange(3, dtype=np.uint16), np.zeros(1, np.uint32))

    def interrupted() -> None:
        with ShardWriter(str(tmp_path), "s.arrow", np.uint16) as writer:
            writer.write(block)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    atomic_write_text(str(path), "old")
    with pytest.raises(TypeError), files.AtomicFile(str(path)) as file:
        file.write("not bytes")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_says_where_and_how_much(tmp_path: Path) -> None:
    file = files.AtomicFile(str(tmp_path / "x"))
    file._stream.close()
    file._stream = pa.OSFile("/dev/full", "wb")
    with pytest.raises(
        CorpusError, match=r"x': the disk is full: 9 bytes are needed, [\d,]+ bytes"
    ):
        file.write(b"123456789")
    file.abort()
    assert list(tmp_path.iterdir()) == []
