"""Preparing on Ray Data: the same bytes as without it, whatever the parallelism; faults."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from raymix.corpus import PrepareProgress, prepare
from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig

DOMAINS = ("fortunes", "japanese", "python")


def content(root: str) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file() and path.name != "prepare.json"
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the work finer than a small corpus would be; the plan is made in this process."""
    monkeypatch.setattr("raymix.corpus.read.parts.MIN_PART_BYTES", 200_000)
    monkeypatch.setattr("raymix.corpus.passes.assemble.SHARD_BYTES", 500_000)


def config(path: Path, shared: Path, **fields: Any) -> CorpusConfig:
    source = shared / "corpus_small"
    domains = [
        {
            "name": name,
            "train": str(source / "train" / f"{name}.parquet"),
            "valid": str(source / "valid" / f"{name}.parquet"),
        }
        for name in DOMAINS
    ]
    tokenizer = {"train": "bpe", "vocab_size": 1000, "sample_bytes": 300_000}
    document = {"path": str(path), "domains": domains, "tokenizer": tokenizer, **fields}
    return CorpusConfig.model_validate(document)


def test_the_same_bytes_whatever_the_parallelism(
    tmp_path: Path, shared_data: Path, small_parts: None, ray_cluster: None
) -> None:
    results = []
    for parallelism in (0, 1, 3, None):
        corpus = config(tmp_path / str(parallelism), shared_data)
        events: list[PrepareProgress] = []
        manifest = prepare(corpus, parallelism=parallelism, progress=events.append)
        results.append((manifest, content(corpus.path)))
        last = [event for event in events if event.stage == "tokenize"][-1]
        assert last.done == last.total > 3
        assert last.bytes_done == last.bytes_total
        counts = [
            getattr(manifest.domains[name], s) for name in DOMAINS for s in ("train", "valid")
        ]
        assert last.tokens >= sum(split.tokens for split in counts)
    assert all(entry == results[0] for entry in results)


def test_interrupted_on_ray_and_finished_without(
    tmp_path: Path, shared_data: Path, small_parts: None, ray_cluster: None
) -> None:
    broken = config(tmp_path / "broken", shared_data)

    def interrupt(event: PrepareProgress) -> None:
        if event.stage == "tokenize" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(broken, parallelism=2, progress=interrupt)
    notes: list[str] = []
    prepare(broken, parallelism=0, progress=lambda event: notes.append(event.note))
    assert any("were done before" in note for note in notes)
    whole = config(tmp_path / "whole", shared_data)
    prepare(whole, parallelism=0)
    assert content(broken.path) == content(whole.path)


def test_a_fault_in_a_task_is_the_users_error(
    tmp_path: Path, small_parts: None, ray_cluster: None
) -> None:
    good = "".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(100))
    (tmp_path / "a.jsonl").write_text(good)
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip at all")
    domain = {"name": "d", "train": str(tmp_path / "*.jsonl*")}
    document = {"path": str(tmp_path / "corpus"), "domains": [domain]}
    with pytest.raises(CorpusError) as caught:
        prepare(CorpusConfig.model_validate(document), parallelism=2)
    assert type(caught.value) is CorpusError
    assert "b.jsonl.gz': cannot be read as jsonl" in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp"))
