"""Preparing in this process: what comes out, resuming, refusing, bad input."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymix.corpus import PrepareProgress, differences, prepare
from raymix.corpus.console import clock, print_manifest, short, watching
from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig
from raymix.store import Corpus, Manifest
from raymix.store.remote import files

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def texts(count: int, name: str) -> list[str]:
    rng = np.random.default_rng(len(name))
    return [
        f"{name} {n}: " + " ".join(rng.choice(WORDS, rng.integers(3, 60))) for n in range(count)
    ]


def jsonl(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """Two domains in four formats, the second with named held-out files."""
    src = tmp_path / "src"
    one = jsonl(src / "one.jsonl", [{"text": text} for text in texts(150, "one")])
    (src / "more.txt").write_text("\n".join(texts(150, "more")))
    pq.write_table(pa.table({"text": texts(200, "two")}), src / "two.parquet", row_group_size=64)
    table = pa.table({"text": texts(20, "held")})
    with pa.ipc.new_file(src / "held.arrow", table.schema) as writer:
        writer.write_table(table)
    return [
        {"name": "one", "train": [one, str(src / "more.txt")], "text_unit": "line"},
        {"name": "two", "train": str(src / "*.parquet"), "valid": str(src / "held.arrow")},
    ]


def config(path: Path, domains: list[dict[str, Any]], **fields: Any) -> CorpusConfig:
    document = {"path": str(path / "corpus"), "domains": domains, **fields}
    return CorpusConfig.model_validate(document)


def run(corpus_config: CorpusConfig, **options: Any) -> Manifest:
    return prepare(corpus_config, parallelism=0, **options)


def refusal(corpus_config: CorpusConfig, **options: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        run(corpus_config, **options)
    return str(caught.value)


def decoded(corpus: Corpus, domain: str, split: str) -> list[str]:
    """Return the documents of a split of a byte-tokenized corpus."""
    count = corpus.split(domain, split).blocks
    blocks = corpus.read_blocks(domain, split, range(count))
    stream = np.concatenate([block.tokens for block in blocks])
    assert stream[-1] == 256
    return bytes(np.where(stream == 256, 255, stream).astype(np.uint8)).decode(
        errors="surrogateescape"
    ).split("\udcff")[:-1]  # fmt: skip


def content(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "prepare.json"
    }


def test_every_document_is_there_once(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    manifest = run(config(tmp_path, sources, valid_fraction=0.1, block_tokens=4096))
    corpus = Corpus.open(str(tmp_path / "corpus"))
    train, valid = decoded(corpus, "one", "train"), decoded(corpus, "one", "valid")
    assert sorted([*train, *valid]) == sorted([*texts(150, "one"), *texts(150, "more")])
    order = [*texts(150, "one"), *texts(150, "more")]
    assert train == [text for text in order if text in set(train)]
    assert 10 < len(valid) < 60
    assert decoded(corpus, "two", "train") == texts(200, "two")
    assert decoded(corpus, "two", "valid") == texts(20, "held")
    one = manifest.domains["one"]
    assert one.train.documents == len(train)
    assert one.train.bytes == sum(map(len, train)) == one.train.tokens - len(train)
    assert one.records_read == 300
    assert 0 < one.train.bigram_entropy < one.train.unigram_entropy < np.log(257)
    lengths = corpus.document_lengths("one", "train")
    assert lengths.tolist() == [len(text) + 1 for text in train]
    assert not (tmp_path / "corpus" / ".prepare").exists()


def test_trained_tokenizer_serves_the_corpus(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    corpus_config = config(tmp_path, sources, tokenizer={"train": "bpe", "vocab_size": 300})
    manifest = run(corpus_config)
    assert manifest.tokenizer.vocab_size == 300
    from transformers import AutoTokenizer

    corpus = Corpus.open(corpus_config.path)
    theirs = AutoTokenizer.from_pretrained(corpus.tokenizer_path)
    block = corpus.read_block("two", "train", 0)
    first = theirs.decode(block.tokens[: block.starts[1]], skip_special_tokens=True)
    assert first == texts(200, "two")[0]


def test_cleaning_counts_what_it_drops(tmp_path: Path) -> None:
    rows = ["a fine text", "", "   ", "ab", "x" * 50, "a fine text", "another one"]
    path = jsonl(tmp_path / "a.jsonl", [{"text": row} for row in rows])
    domains = [{"name": "d", "train": path}]
    corpus_config = config(tmp_path, domains, min_characters=3, max_characters=40)
    info = run(corpus_config).domains["d"]
    assert (info.too_short, info.too_long, info.duplicates) == (3, 1, 1)
    assert info.train.documents + info.valid.documents == 2
    unfiltered = config(tmp_path / "kept", domains, deduplicate=False, min_characters=0)
    info = run(unfiltered).domains["d"]
    assert info.train.documents + info.valid.documents == len(rows)


def test_bad_records_are_counted_and_shown(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": text} for text in texts(300, "good")]
    bad = ["{", '{"text": null}', '{"text": 7}', "[]", "", '{"text": "\\ud800"}', '{"id": 1}']
    path = jsonl(tmp_path / "a.jsonl", [*rows[:100], *bad, *rows[100:]])
    corpus_config = config(tmp_path, [{"name": "d", "train": path}], max_rejected=0.05)
    info = run(corpus_config).domains["d"]
    assert info.rejected == 4
    assert info.records_read == 306
    assert (info.too_short, info.repaired) == (1, 1)
    assert set(info.rejected_by_reason) == {
        "invalid JSON", "not text", "not a JSON object", "no 'text' key",
    }  # fmt: skip
    shown = [json.loads(line) for line in (tmp_path / "corpus/d/rejects.jsonl").open()]
    assert {(row["line"], row["reason"]) for row in shown} >= {
        (101, "invalid JSON"), (104, "not a JSON object"), (107, "no 'text' key"),
    }  # fmt: skip
    assert all(row["file"] == path for row in shown)


def test_line_numbers_hold_across_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymix.corpus.read.parts.MIN_PART_BYTES", 1000)
    rows: list[Any] = [{"text": text} for text in texts(300, "good")]
    path = jsonl(tmp_path / "a.jsonl", [*rows[:200], "", "bad", *rows[200:], "worse"])
    corpus_config = config(tmp_path, [{"name": "d", "train": path}], max_rejected=0.05)
    events: list[PrepareProgress] = []
    run(corpus_config, progress=events.append)
    assert max(event.total for event in events) > 10
    shown = [json.loads(line) for line in (tmp_path / "corpus/d/rejects.jsonl").open()]
    assert [(row["line"], row["excerpt"]) for row in shown] == [(202, "bad"), (303, "worse")]


def test_too_many_bad_records_are_fatal(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "fine"}] * 8 + ["{", "{"])
    said = refusal(config(tmp_path, [{"name": "d", "train": path}]))
    assert said.startswith(f"file = '{path}': line 9: invalid JSON: '{{'")
    assert "corpus.max_rejected = 0.01, and 2 of 10 records of domain 'd' are bad" in said
    assert (tmp_path / "corpus/d/rejects.jsonl").exists()
    assert not (tmp_path / "corpus/manifest.json").exists()
    raised = config(tmp_path, [{"name": "d", "train": path}], max_rejected=0.5, deduplicate=False)
    with pytest.raises(CorpusError, match=r"corpus\.deduplicate"):
        run(raised)
    raised = config(tmp_path, [{"name": "d", "train": path}], max_rejected=0.2)
    assert run(raised).domains["d"].duplicates == 7


def test_ready_token_ids(tmp_path: Path) -> None:
    ids = [[n % 250, 1, 2] for n in range(100)] + [[5, 256], [300], [-1], []]
    pq.write_table(pa.table({"input_ids": ids}), tmp_path / "a.parquet")
    domain = {"name": "d", "train": str(tmp_path / "a.parquet"), "tokens_column": "input_ids"}
    info = run(config(tmp_path, [domain], max_rejected=0.05, block_tokens=4096)).domains["d"]
    assert info.rejected_by_reason == {"token id outside 0..256": 2}
    assert info.too_short == 1
    assert info.train.bytes == 0
    assert info.train.tokens + info.valid.tokens == 100 * 4 + 2
    (tmp_path / "a.txt").write_text("x")
    said = refusal(config(tmp_path / "two", [{**domain, "train": str(tmp_path / "a.txt")}]))
    assert "a text file has no column 'input_ids'" in said


def test_same_bytes_however_it_is_cut_short(
    tmp_path: Path, sources: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after every job in turn and run again, the corpus is the same to the byte."""
    monkeypatch.setattr("raymix.corpus.read.parts.MIN_PART_BYTES", 4000)
    monkeypatch.setattr("raymix.corpus.passes.assemble.SHARD_BYTES", 9000)
    options = {"tokenizer": {"train": "bpe", "vocab_size": 300}, "block_tokens": 4096}
    whole = config(tmp_path / "whole", sources, **options)
    events: list[PrepareProgress] = []
    manifest = run(whole, progress=events.append)
    jobs = sum(1 for event in events if event.done)
    assert jobs > 15
    broken = config(tmp_path / "broken", sources, **options)
    tries = 0
    while not files.exists(files.join(broken.path, "manifest.json")):
        tries += 1
        with contextlib.suppress(KeyboardInterrupt):
            run(broken, progress=interrupt_after(2))
    assert tries > 5
    assert content(tmp_path / "whole") == content(tmp_path / "broken")
    assert Corpus.open(broken.path).fingerprint == manifest.fingerprint


def interrupt_after(count: int) -> Any:
    seen = iter(range(count))

    def listen(event: PrepareProgress) -> None:
        if event.done and next(seen, None) is None:
            raise KeyboardInterrupt

    return listen


def test_second_run_does_nothing(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    corpus_config = config(tmp_path, sources)
    first = run(corpus_config)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}
    events: list[PrepareProgress] = []
    assert run(corpus_config, progress=events.append) == first
    assert "nothing to do" in events[-1].note
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}
    assert run(config(tmp_path, [])) == first
    assert run(config(tmp_path, sources, max_rejected=0.5)) == first


def test_another_configuration_is_refused(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    run(config(tmp_path, sources))
    other = config(tmp_path, sources[::-1], min_characters=9, tokenizer={"train": "bpe",
                   "vocab_size": 999})  # fmt: skip
    said = refusal(other)
    assert "corpus.min_characters = 9: the corpus at" in said
    assert "prepared with 1" in said
    assert "corpus.tokenizer.vocab_size = 999" in said
    assert "corpus.domain_order = ['two', 'one']" in said
    assert "--if-exists new" in said
    assert differences(other)
    assert refusal(config(tmp_path, sources), if_exists="fail").startswith("corpus.path")
    replaced = run(other, if_exists="new")
    assert list(replaced.domains) == ["two", "one"]


def test_unfinished_corpus_of_another_configuration(
    tmp_path: Path, sources: list[dict[str, Any]]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path, sources), progress=interrupt_after(2))
    assert "corpus.min_characters = 9" in refusal(config(tmp_path, sources, min_characters=9))


def test_new_removes_only_what_is_ours(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    corpus_config = config(tmp_path, sources)
    run(corpus_config)
    mine = tmp_path / "corpus" / "one" / "notes.txt"
    mine.write_text("mine")
    (tmp_path / "corpus" / "README").write_text("mine")
    run(config(tmp_path, sources[1:]), if_exists="new")
    assert mine.read_text() == "mine"
    assert (tmp_path / "corpus" / "README").exists()
    assert not (tmp_path / "corpus" / "one" / "train").exists()


def test_changed_sources_are_reported(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    corpus_config = config(tmp_path, sources)
    run(corpus_config)
    path = Path(sources[0]["train"][1])
    path.write_text(path.read_text() + "more")
    pq.write_table(pa.table({"text": ["new"]}), path.parent / "zwei.parquet")
    notes = [event.note for event in collected(corpus_config) if event.note]
    assert f"changed: {path}" in notes
    assert f"new: {path.parent / 'zwei.parquet'}" in notes
    assert any("2 sources are not what they were" in note for note in notes)
    for file in path.parent.iterdir():
        file.unlink()
    assert any("sources are gone" in event.note for event in collected(corpus_config))


def collected(corpus_config: CorpusConfig) -> list[PrepareProgress]:
    events: list[PrepareProgress] = []
    run(corpus_config, progress=events.append)
    return events


def test_a_moved_corpus_is_the_same(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    run(config(tmp_path, sources))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "corpus").rename(moved / "corpus")
    (tmp_path / "src").rename(moved / "src")
    text = json.dumps(sources).replace(f"{tmp_path}/src", f"{moved}/src")
    assert differences(config(moved, json.loads(text))) == []


def test_a_source_changed_halfway_is_read_again(
    tmp_path: Path, sources: list[dict[str, Any]]
) -> None:
    corpus_config = config(tmp_path, sources)
    with pytest.raises(KeyboardInterrupt):
        run(corpus_config, progress=interrupt_after(6))
    path = Path(sources[0]["train"][1])
    path.write_text("one new text\nand another")
    manifest = run(corpus_config)
    assert manifest.domains["one"].records_read == 152


def test_empty_domains_are_named_together(tmp_path: Path) -> None:
    empty = jsonl(tmp_path / "empty.jsonl", [])
    blank = jsonl(tmp_path / "blank.jsonl", [{"text": " "}] * 3)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    fine = jsonl(tmp_path / "fine.jsonl", [{"text": "x"}])
    domains = [
        {"name": "empty", "train": empty},
        {"name": "blank", "train": blank},
        {"name": "none", "train": str(tmp_path / "none.parquet")},
        {"name": "unheld", "train": fine, "valid": str(tmp_path / "none.parquet")},
    ]
    said = refusal(config(tmp_path, domains)).splitlines()
    assert len(said) == 4
    assert "no document of domain 'blank' is left to use (records read 3, rejected 0" in said[1]
    assert "corpus.domains.3.valid" in said[3]


def test_wrong_key_lists_those_found(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"id": 1, "body": "x"}])
    said = refusal(config(tmp_path, [{"name": "d", "train": path}]))
    assert "no such column" in said
    assert "id, body" in said
    assert not (tmp_path / "corpus").exists()


def test_only_one_at_a_time(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    corpus_config = config(tmp_path, sources)
    said: list[str] = []

    def second(event: PrepareProgress) -> None:
        if event.done and not said:
            thread = threading.Thread(target=lambda: said.append(refusal(corpus_config)))
            thread.start()
            thread.join()

    run(corpus_config, progress=second)
    assert "another process is preparing this corpus" in said[0]


def test_disk_without_room_is_refused_before_writing(
    tmp_path: Path, sources: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda url: 17)
    said = refusal(config(tmp_path, sources))
    assert "the disk is full" in said
    assert "17 bytes are free" in said
    assert str(tmp_path / "corpus") in said
    assert (
        not list((tmp_path / "corpus").rglob("*.arrow"))
        or not (tmp_path / "corpus" / "manifest.json").exists()
    )
    monkeypatch.undo()
    assert run(config(tmp_path, sources)).domains


def test_missing_shard_of_a_finished_corpus(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    corpus_config = config(tmp_path, sources)
    run(corpus_config)
    os.remove(tmp_path / "corpus/one/valid/shard-00000.arrow")
    said = refusal(corpus_config)
    assert "1 of its shards are missing, the first is one/valid/shard-00000.arrow" in said


def test_any_store_will_do(sources: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    # Readers of one file in fsspec's memory store share their position.
    monkeypatch.setattr("raymix.corpus.runner._MAX_THREADS", 1)
    document = {"path": "memory://raymix-prepare/c", "domains": sources}
    corpus_config = CorpusConfig.model_validate(document)
    manifest = run(corpus_config)
    assert run(corpus_config) == manifest
    corpus = Corpus.open(corpus_config.path)
    assert decoded(corpus, "two", "valid") == texts(20, "held")
    files.remove("memory://raymix-prepare")


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda: capsys.readouterr().out


def test_what_a_person_sees(tmp_path: Path, sources: list[dict[str, Any]], printed: Any) -> None:
    corpus_config = config(tmp_path, sources)
    with watching() as listener:
        manifest = run(corpus_config, progress=listener)
    print_manifest(corpus_config.path, manifest)
    out = printed()
    assert "2 domains, 4 files" in out
    assert "tokenizing: 100%" in out
    assert "documents, took 0 s" in out
    assert f"fingerprint {manifest.fingerprint[:12]}" in out


@pytest.mark.parametrize(
    ("number", "wanted"), [(0, "0"), (999, "999"), (1234, "1.23k"), (5e6, "5M"), (3e13, "30T")]
)
def test_short_numbers(number: float, wanted: str) -> None:
    assert short(number) == wanted


@pytest.mark.parametrize(("seconds", "wanted"), [(3, "3 s"), (75, "1:15"), (3723, "1:02:03")])
def test_clock(seconds: float, wanted: str) -> None:
    assert clock(seconds) == wanted
