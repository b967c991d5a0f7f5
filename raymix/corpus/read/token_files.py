"""Checks of token files by sampling: ids, ends of documents, and a hash that tells files apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from raymix.store.formats.info import TokenFileOptions, bad_file
from raymix.store.formats.token_file import TokenFile

_SAMPLE_TOKENS = 4096


def check_samples(file: TokenFile, options: TokenFileOptions, samples: int) -> None:
    """Check ids and ends of documents at `samples` places, the first and the last among them.

    Raises:
        CorpusError: If an id is outside the vocabulary, or end-of-text is not where it should be.
    """
    for low in _positions(file, samples):
        file.read(low, min(low + _SAMPLE_TOKENS, file.info.tokens), file.tokens.dtype)
    if file.info.eos_at == "end":
        _check_ends(file, options.eos_id, samples)
    elif file.info.eos_at == "start":
        _check_starts(file, options.eos_id, samples)


def file_digest(file: TokenFile, samples: int) -> str:
    """Return the hash of a file's index and of tokens at `samples` places, wherever it lies."""
    info = file.info
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str(info.tokens).encode())
    for low in _positions(file, samples):
        # In one width, so that the same ids have one hash in every format.
        digest.update(file.tokens[low : low + _SAMPLE_TOKENS].astype("<u4").data)
    for starts in file.edges.chunks():
        digest.update(starts.astype("<i8").data)
    return digest.hexdigest()


def _positions(file: TokenFile, samples: int) -> Iterator[int]:
    """Yield the first tokens of samples; the last sample ends with the file."""
    last = max(file.info.tokens - _SAMPLE_TOKENS, 0)
    yield from np.unique(np.linspace(0, last, samples, dtype=np.int64)).tolist()


def _check_ends(file: TokenFile, eos_id: int, samples: int) -> None:
    for position in _positions(file, samples):
        end = file.edges.next(position + 1)
        _check_end(file, end, eos_id)
    _check_end(file, file.info.tokens, eos_id)


def _check_end(file: TokenFile, end: int, eos_id: int) -> None:
    actual = int(file.tokens[end - 1])
    if actual == eos_id:
        return
    place = "its last document" if end == file.info.tokens else f"the document up to token {end:,}"
    raise bad_file(
        file.info.file.path,
        f"{place} ends with id {actual:,} and not with the tokenizer's end-of-text, {eos_id:,}",
        fix="set corpus.tokenizer to the one that made the file, or eos_at of the domain: start "
        "where end-of-text comes first, none where there is none or documents may be cut",
    )


def _check_starts(file: TokenFile, eos_id: int, samples: int) -> None:
    # Files of llm.c go on from one to the next: the first document may be the end of one.
    start = file.edges.next(1)
    if start == file.info.tokens and int(file.tokens[0]) != eos_id:
        raise bad_file(
            file.info.file.path,
            f"the tokenizer's end-of-text, {eos_id:,}, begins no document in it",
            fix="set corpus.tokenizer to the one that made the file, or eos_at: none of the domain",
        )
    for position in _positions(file, samples):
        if start < file.info.tokens and int(file.tokens[start]) != eos_id:
            raise bad_file(
                file.info.file.path,
                f"the document at token {start:,} begins with id {int(file.tokens[start]):,} and "
                f"not with the tokenizer's end-of-text, {eos_id:,}",
                fix="set corpus.tokenizer to the one that made the file, or eos_at of the domain",
            )
        start = file.edges.next(max(position, 1))
