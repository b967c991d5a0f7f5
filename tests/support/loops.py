"""A small corpus that a model can learn from, prepared without tokenizing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raymix.recipe import Recipe
from raymix.store import Corpus, Manifest, SplitInfo, atomic_write_text, corpus_fingerprint
from raymix.training.api import train
from tests.support.corpora import write_corpus

VOCAB = 61
BLOCK = 256
_BYTES_PER_TOKEN = 3


def train_corpus(root: Path, tokens: Mapping[str, int], *, seed: int = 0) -> Corpus:
    """Return a corpus of short documents of slowly rising ids; a tenth is held out."""
    train, valid = (
        write_corpus(
            root / split,
            {
                name: _documents(np.random.default_rng([seed, number, size]), size, number)
                for number, (name, size) in enumerate(sizes.items())
            },
            block_tokens=BLOCK,
            vocab_size=VOCAB,
        )
        for split, sizes in (
            ("train", tokens),
            ("valid", {name: size // 10 for name, size in tokens.items()}),
        )
    )
    return _joined(root, train, valid)


def _documents(
    generator: np.random.Generator, size: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    if not size:
        return np.zeros(0, np.uint16), np.zeros(0, np.int64)
    lengths = generator.integers(3, 50, size // 20)
    lengths = lengths[np.cumsum(lengths) <= size]
    lengths = np.append(lengths, size - lengths.sum())
    ids = (np.cumsum(generator.integers(0, 3, size)) + 7 * number) % (VOCAB - 1)
    ids[np.cumsum(lengths) - 1] = VOCAB - 1
    return ids.astype(np.uint16), lengths.astype(np.int64)


def _joined(root: Path, train: Corpus, valid: Corpus) -> Corpus:
    """Return one corpus of the train splits of two, the second as held-out text."""
    infos = {}
    for name in train.domain_names:
        split = {
            "train": _moved(root, train, name, "train"),
            "valid": _moved(root, valid, name, "valid"),
        }
        infos[name] = train.manifest.domains[name].model_copy(update=split)
    tokenizer = train.manifest.tokenizer.model_copy(update={"eos_id": VOCAB - 1})
    manifest = Manifest(
        fingerprint=corpus_fingerprint(tokenizer, BLOCK, infos),
        tokenizer=tokenizer,
        block_tokens=BLOCK,
        domains=infos,
    )
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    atomic_write_text(str(root / "manifest.json"), manifest.model_dump_json())
    return Corpus.open(str(root))


def _moved(root: Path, corpus: Corpus, name: str, split: str) -> SplitInfo:
    info = corpus.split(name, "train")
    target = root / name / split
    target.parent.mkdir(exist_ok=True)
    (Path(corpus.path) / name / "train").rename(target)
    shards = tuple(
        shard.model_copy(update={"file": f"{name}/{split}/{Path(shard.file).name}"})
        for shard in info.shards
    )
    entropy = float(np.log(VOCAB))
    return info.model_copy(
        update={
            "shards": shards,
            "bytes": _BYTES_PER_TOKEN * info.tokens,
            "unigram_entropy": entropy,
        }
    )


def smallest_run(folder: Path) -> Recipe:
    """Return the recipe of a run of four steps in this process, and of its corpus, in `folder`."""
    corpus = train_corpus(folder / "corpus", {"a": 3000, "b": 2000})
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    document: dict[str, Any] = {
        "name": "run",
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 16, "rows_per_step": 2},
        "model": {"type": "llama", "config": shape},
        "train": {"steps": 4, "checkpoint_every": 2},
        "eval": {"rows_per_domain": 1},
        "cluster": {"workers": 0},
        "run": {"dir": str(folder / "run"), "tensorboard": False},
    }
    made = Recipe.model_validate(document)
    train(made, report=False)
    return made
