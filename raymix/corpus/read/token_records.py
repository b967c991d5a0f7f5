"""Records of ready token ids: documents of token files, and which of their ids are in the loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from raymix.corpus.read.parts import FileSlice
from raymix.corpus.read.sources import DomainSources
from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig, DomainConfig
from raymix.store import TokenizerInfo
from raymix.store.formats.detect import MAPPED, token_files
from raymix.store.formats.info import MappedFormat, TokenFileInfo, TokenFileOptions
from raymix.store.formats.mds import mds_shards, shard_documents
from raymix.store.formats.token_file import TokenFile

TokenIds = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]

# What Hugging Face's trainers leave out of the loss.
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class LabeledTokens:
    """The ids of a document, and which of them are in the loss, both of shape (L,)."""

    ids: TokenIds
    in_loss: Mask


def file_options(domain: DomainConfig, tokenizer: TokenizerInfo) -> TokenFileOptions:
    """Return what is known of the token files of a domain before they are opened."""
    return TokenFileOptions(
        tokenizer.vocab_size, tokenizer.eos_id, domain.token_dtype, domain.eos_at
    )


def has_loss_mask(domain: DomainConfig, sources: DomainSources) -> bool:
    """Return whether not all tokens of a domain are in the loss."""
    if domain.messages_column or domain.labels_column:
        return True
    return any(
        file.format == "datatrove" and Path(file.url + ".loss").is_file()
        for file in (*sources.train, *sources.valid)
    )


def check_indices(
    config: CorpusConfig, sources: Mapping[str, DomainSources], tokenizer: TokenizerInfo
) -> None:
    """Check the token files of a corpus by their indices, before any work is done.

    Raises:
        CorpusError: With a message per file that is missing its index, damaged, or cannot hold the
            vocabulary.
    """
    problems: list[str] = []
    for domain in config.domains:
        for file in (*sources[domain.name].train, *sources[domain.name].valid):
            try:
                if file.format == "mds":
                    mds_shards(file.url, domain.tokens_column or "tokens", domain.token_dtype)
                elif file.format in MAPPED:
                    options = file_options(domain, tokenizer)
                    token_files(file.url, cast(MappedFormat, file.format), options)
            except CorpusError as error:
                problems += error.problems
    if problems:
        raise CorpusError(*problems)


def token_records(
    file_slice: FileSlice, domain: DomainConfig, tokenizer: TokenizerInfo
) -> Iterator[tuple[int, TokenIds | LabeledTokens]]:
    """Yield the documents of a slice of a token file, numbered from 1.

    A document that begins with the end-of-text id comes without it, as prepared documents end
    with it.

    Raises:
        CorpusError: If the file or its index is missing or damaged.
    """
    if file_slice.file.format == "mds":
        column = domain.tokens_column or "tokens"
        shard = mds_shards(file_slice.file.url, column, domain.token_dtype)[file_slice.low]
        yield from enumerate(shard_documents(shard), 1)
        return
    options = file_options(domain, tokenizer)
    infos = _infos(file_slice.file.url, cast(MappedFormat, file_slice.file.format), options)
    if file_slice.file.format == "litdata":
        info, low, high = infos[file_slice.low], 0, infos[file_slice.low].tokens
    else:
        (info,) = infos
        low, high = (_token(info, byte) for byte in (file_slice.low, file_slice.high))
    file = TokenFile(info, options)
    for number, (first, end) in enumerate(file.documents(low, high), 1):
        if info.eos_at == "start" and int(file.tokens[first]) == tokenizer.eos_id:
            first += 1
        # Signed types show a negative id as what it is.
        ids: TokenIds = file.tokens[first:end].view(info.dtype)
        in_loss = file.in_loss(first, end)
        yield number, ids if in_loss is None else LabeledTokens(ids, in_loss)


# A part may hold many slices of one file, whose index may take seconds to read.
@functools.lru_cache(maxsize=4)
def _infos(path: str, file_format: MappedFormat, options: TokenFileOptions) -> list[TokenFileInfo]:
    return token_files(path, file_format, options)


def _token(info: TokenFileInfo, byte: int | None) -> int:
    """Return the first token that begins at or after a byte of the file."""
    if byte is None:
        return info.tokens
    return min(max(-((info.offset - byte) // info.itemsize), 0), info.tokens)


def labels_mask(ids: TokenIds, labels: object) -> Mask:
    """Return which ids are in the loss, shape (L,), from labels (-100 is not) or a mask of 0 and 1.

    Raises:
        ValueError: If there is not one for each id, or labels are other ids.
    """
    if not isinstance(labels, list) or len(labels) != len(ids) or None in labels:
        raise ValueError("not one label for each id")
    values = np.array(labels)
    if values.dtype.kind not in "biu":
        raise ValueError("labels are not integers")
    if np.array_equal(values, ids):
        return np.ones(len(ids), np.bool_)
    if values.dtype.kind == "b" or (values.min(initial=0) >= 0 and values.max(initial=0) <= 1):
        return values != 0
    in_loss = values != _IGNORED
    # Labels that are shifted already would teach each token itself.
    if not np.array_equal(values[in_loss], ids[in_loss]):
        raise ValueError("labels are not the ids at their own positions")
    return in_loss


def loss_edges(in_loss: Mask | None, n_ids: int, n_tokens: int) -> npt.NDArray[np.int64]:
    """Return the edges of the spans in the loss of a document, shape (E,).

    Args:
        in_loss: Which of the ids are in the loss, shape (n_ids,); None: all.
        n_ids: Ids that were given.
        n_tokens: The same, or one more for the end-of-text id, which is learned after an answer.
    """
    mask = np.zeros(n_tokens + 2, np.int8)
    mask[1 : n_ids + 1] = 1 if in_loss is None else in_loss
    mask[n_ids + 1 : n_tokens + 1] = mask[n_ids]
    # Nothing comes before the first token that it could be predicted from.
    mask[1] = 0
    return np.flatnonzero(np.diff(mask)).astype(np.int64)
