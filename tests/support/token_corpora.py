"""Corpora of token files, checked token by token against what the formats' own readers return."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from raymix.corpus import prepare
from raymix.recipe import CorpusConfig
from raymix.store import SPLITS, Corpus, Split

FIXTURES = Path(__file__).parent / "token_files"
LARGE = 100_278
# Options of a domain by the first word of the case; what is left out is found by itself.
SOURCES: dict[str, dict[str, Any]] = {
    "megatron": {"train": "text_document.bin"},
    "olmo": {"train": "*"},
    "datatrove": {"train": "*"},
    "nanogpt": {"train": "*.bin", "format": "nanogpt"},
    "llmc": {"train": "*.bin"},
    "litdata": {"train": "index.json"},
    "mds": {"train": "index.json"},
    "arrow": {"train": "*.arrow", "tokens_column": "input_ids", "labels_column": "labels"},
    "parquet": {"train": "*.parquet", "tokens_column": "input_ids", "labels_column": "labels"},
}
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
IN_PLACE = [name for name in CASES if name.split("_")[0] not in ("mds", "arrow", "parquet")]


@functools.cache
def large_tokenizer() -> str:
    """Return a tokenizer of 100,278 ids, the last of which is end-of-text."""
    vocabulary = {f"t{number}": number for number in range(LARGE)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": model,
    }  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return str(folder)


def config(root: Path, case: str, path: Path, **options: Any) -> CorpusConfig:
    """Return the corpus of a case's files, to be prepared at `path`."""
    source = SOURCES[case.split("_")[0]]
    domain = {"name": "d", **source, "train": str(root / case / source["train"])}
    if case in ("mds", "mds_zstd"):
        domain["token_dtype"] = "int64"
    large = {"path": large_tokenizer(), "eos_token": f"t{LARGE - 1}"}
    tokenizer: Any = large if case.endswith("_large") else "byte"
    corpus = {"path": str(path), "tokenizer": tokenizer, "domains": [domain], "block_tokens": 64}
    return CorpusConfig.model_validate({**corpus, **options})


def stream(corpus: Corpus, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a split and its document starts, block by block."""
    tokens: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    for number in range(corpus.split("d", split).blocks):
        block = corpus.read_block("d", split, number)
        starts.append(block.starts.astype(np.int64) + 64 * number)
        tokens.append(block.tokens)
        assert block.tokens.dtype == corpus.dtype
    joined = np.concatenate([*tokens, np.empty(0, corpus.dtype)])
    return joined, np.concatenate([*starts, np.empty(0, np.int64)])


def documents(corpus: Corpus) -> list[tuple[list[int], list[bool]]]:
    """Return the documents of both splits with their loss masks, checking what must agree."""
    result = []
    for split in SPLITS:
        tokens, starts = stream(corpus, split)
        info = corpus.split("d", split)
        lengths = corpus.document_lengths("d", split)
        assert len(tokens) == info.tokens
        assert len(lengths) == info.documents
        np.testing.assert_array_equal(starts, np.cumsum(lengths) - lengths)
        mask = corpus.loss_mask("d", split)
        in_loss = mask.mask(0, len(tokens)) if mask else np.ones(len(tokens), np.bool_)
        if mask is None:
            in_loss[starts] = False
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            end = start + length
            result.append((tokens[start:end].tolist(), in_loss[start:end].tolist()))
    return result


def expected(root: Path, case: str) -> list[tuple[list[int], list[bool]]]:
    """Return the documents that the library read, less the empty ones."""
    arrays = np.load(root / "expected.npz")
    tokens, lengths = arrays[f"{case}/tokens"], arrays[f"{case}/lengths"]
    loss = arrays.get(f"{case}/loss", np.ones(len(tokens), np.bool_)).copy()
    ends = np.cumsum(lengths)
    result = []
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        if length:
            loss[end - length] = False  # nothing could predict a document's first token
            result.append((tokens[end - length : end].tolist(), loss[end - length : end].tolist()))
    return result


def check_in_place(root: Path, case: str, path: Path) -> None:
    """Check that a case is read in place as its own reader reads it, in the same order."""
    prepare(config(root, case, path, in_place=True), parallelism=0)
    corpus = Corpus.open(str(path))
    assert documents(corpus) == expected(root, case)
    assert corpus.split("d", "valid").documents >= 1


def check_copy(root: Path, case: str, path: Path) -> None:
    """Check that a prepared copy of a case has the documents that its own reader reads."""
    prepare(config(root, case, path, deduplicate=False, max_rejected=0.2), parallelism=0)
    wanted = expected(root, case)
    if case.startswith("llmc"):
        # Prepared documents end with end-of-text; llm.c's begin with it.
        rolled = [(tokens[1:] + tokens[:1], [False, *loss[1:]]) for tokens, loss in wanted]
        wanted = [(tokens, loss) for tokens, loss in rolled if len(tokens) > 1]
    # Empty answers and documents of one id teach nothing and are rejected where a mask is.
    if any(name in case for name in ("arrow", "parquet", "datatrove_large")):
        wanted = [(tokens, loss) for tokens, loss in wanted if any(loss)]
    assert sorted(documents(Corpus.open(str(path)))) == sorted(wanted)
