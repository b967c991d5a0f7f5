"""The manifest of a prepared corpus, written last: its presence means that it is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from raymix._utils.json import parse_json
from raymix.errors import CorpusError
from raymix.store.formats.info import TokenFileInfo
from raymix.store.remote import files

FORMAT = 2
"""Highest version of the layout that can be read; a reader refuses a higher one."""

_SHARDS_FORMAT, _IN_PLACE_FORMAT = 1, 2

MANIFEST = "manifest.json"
"""Name of the manifest's file in the corpus directory."""

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")
"""The two splits of every domain, in the order in which they are fingerprinted."""


class _ManifestModel(BaseModel):
    # A later minor version may add fields; the format number says when that breaks reading.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


def _inside(path: str) -> str:
    """Return `path` if it stays inside the corpus directory."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    # A manifest may come from a download: its paths must not reach other files. A colon starts a
    # URL scheme, or names a drive.
    if not parts or parts[0] == "/" or ".." in parts or ":" in path or "\0" in path:
        raise ValueError(f"{path!r} leads out of the corpus; do not trust this download")
    return path


_Inside = Annotated[str, AfterValidator(_inside)]


class TokenizerInfo(_ManifestModel):
    """The tokenizer that made the ids; its files lie under `CORPUS/tokenizer`."""

    kind: str
    """`byte`, `bpe` (trained on the corpus), `pretrained`, or `none` (ids came ready)."""
    fingerprint: str
    """Hash of the canonical JSON of the tokenizer."""
    vocab_size: int
    """Ids are below this."""
    eos_id: int
    """The id that ends every document."""


class ShardInfo(_ManifestModel):
    """One shard: consecutive blocks of a split in one Arrow IPC file."""

    file: _Inside
    """Path under the corpus directory, with slashes."""
    blocks: int
    """Blocks in it."""
    tokens: int
    """Tokens in it."""
    sha256: str
    """Hash of the file's bytes."""


class SplitInfo(_ManifestModel):
    """One split of a domain: a stream of documents, cut into blocks."""

    documents: int
    """Documents in the stream."""
    tokens: int
    """Tokens in the stream, one end-of-text token per document among them."""
    bytes: int
    """UTF-8 bytes of the text; 0 where ready token ids were given."""
    blocks: int
    """Blocks in all shards."""
    shards: tuple[ShardInfo, ...]
    """The shards, in the order of the stream."""
    length_quantiles: dict[str, int]
    """Tokens per document: `p50`, `p90`, `p99`, `max`; empty without documents."""
    length_histogram: dict[str, int]
    """Documents by length in tokens; key `2**k` counts lengths in [2**k, 2**(k + 1))."""
    unigram_entropy: float | None
    """Entropy of the token distribution, nats per token; None where tokens were not counted."""
    bigram_entropy: float | None
    """Entropy of the next token given the current one, nats per token; None likewise."""
    # Likewise optional: corpora of plain text have no mask.
    loss_mask: str | None = None
    """Hash of the loss mask's file; None: all tokens but each document's first are predicted."""
    loss_tokens: int | None = None
    """Number of tokens to predict; None: all but each document's first."""
    first_token: int = 0
    """Of a corpus read in place: the split's first token in the stream of the domain's files."""


class DomainInfo(_ManifestModel):
    """One domain: its splits, and what became of its source records."""

    train: SplitInfo
    """The training split."""
    valid: SplitInfo
    """The held-out split."""
    records_read: int
    """Records found in the sources."""
    rejected: int
    """Bad records: all reasons together."""
    # With a default, so that corpora prepared before the field existed can be read.
    rejected_by_reason: dict[str, int] = {}
    """Bad records by reason."""
    duplicates: int
    """Documents dropped because an equal one came before."""
    too_short: int
    """Documents dropped as empty or too short."""
    too_long: int
    """Documents dropped as too long."""
    repaired: int = 0
    """Documents with half characters (lone surrogates in JSON), which became U+FFFD."""
    token_files: tuple[TokenFileInfo, ...] = ()
    """The files of a corpus that is read in place, in the order of the stream; else none."""


class Manifest(_ManifestModel):
    """Everything about a prepared corpus that a reader needs before opening a shard."""

    format: int = _SHARDS_FORMAT
    """Version of the layout; 2 where tokens stay in the files of other tools."""
    fingerprint: str
    """Hash of the content: equal for equal tokens in equal order, wherever they lie."""
    tokenizer: TokenizerInfo
    """The tokenizer that made the ids."""
    block_tokens: int
    """Tokens per block; the last block of a split may be shorter."""
    domains: dict[_Inside, DomainInfo]
    """The domains, in the order of the recipe."""

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Return the type of a token id on disk."""
        return token_dtype(self.tokenizer.vocab_size)

    @property
    def in_place(self) -> bool:
        """Return whether the tokens are in files of other tools, and not in shards."""
        return self.format == _IN_PLACE_FORMAT


def in_place_manifest(
    tokenizer: TokenizerInfo, block_tokens: int, domains: dict[str, DomainInfo]
) -> Manifest:
    """Return the manifest of a corpus whose tokens stay in the files that they are in."""
    return Manifest(
        # Readers of format 1 would find no shard, and no reason.
        format=_IN_PLACE_FORMAT,
        fingerprint=corpus_fingerprint(tokenizer, block_tokens, domains),
        tokenizer=tokenizer,
        block_tokens=block_tokens,
        domains=domains,
    )


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return uint16 where every id below `vocab_size` fits it, else uint32."""
    # Half the bytes on disk, in memory and on the network.
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def corpus_fingerprint(
    tokenizer: TokenizerInfo, block_tokens: int, domains: Mapping[str, DomainInfo]
) -> str:
    """Return the hash of a corpus: names, tokenizer, block size and the bytes of every shard."""
    content = {
        "tokenizer": tokenizer.fingerprint,
        "block_tokens": block_tokens,
        "domains": [
            # Hashes of files, so that a copy elsewhere, or another compression, is the same corpus.
            [name, *(_hashes(getattr(info, split)) for split in SPLITS), *_digests(info)]
            for name, info in domains.items()
        ],
    }
    # Sorted keys and no spaces: the hash must not depend on how Python prints JSON.
    canonical = json.dumps(content, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _hashes(info: SplitInfo) -> list[str]:
    return [shard.sha256 for shard in info.shards] + ([info.loss_mask] if info.loss_mask else [])


def _digests(info: DomainInfo) -> list[str]:
    # Nothing for a corpus of shards, whose fingerprint must not change. The range of the held-out
    # split is content: it decides what is trained on.
    if not info.token_files:
        return []
    cut = f"{info.train.tokens}:{info.valid.first_token}:{info.valid.tokens}"
    return [file.digest for file in info.token_files] + [cut]


def read_manifest(corpus: str) -> Manifest:
    """Return the manifest of the corpus at the path or URL `corpus`.

    Raises:
        CorpusError: If there is none, or it is damaged, or of a newer format.
    """
    try:
        document = parse_json(files.read_bytes(files.join(corpus, MANIFEST)))
    except FileNotFoundError as error:
        raise CorpusError.at(
            "corpus.path",
            corpus,
            f"no prepared corpus is here ({MANIFEST} is absent)",
            fix="run `raymix prepare` on the recipe",
        ) from error
    except ValueError as error:
        raise _damaged(corpus, error) from error
    if isinstance(document, dict) and isinstance(version := document.get("format"), int):
        # Before the fields: a newer format may lack some, and upgrading is the better advice.
        _check_format(corpus, version)
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise _damaged(corpus, error) from error


def _check_format(corpus: str, version: int) -> None:
    if version > FORMAT:
        raise CorpusError.at(
            "corpus.path",
            corpus,
            f"the corpus has format {version}, this raymix reads up to {FORMAT}",
            fix="upgrade raymix or prepare the corpus again",
        )


def _damaged(corpus: str, error: Exception) -> CorpusError:
    # One line: pydantic lists every field of every domain otherwise.
    first = str(error).splitlines()[0]
    if isinstance(error, ValidationError):
        first_error = error.errors(include_url=False, include_context=False, include_input=False)[0]
        first = f"{'.'.join(map(str, first_error['loc']))}: {first_error['msg']}"
    return CorpusError.at(
        "corpus.path", corpus, f"{MANIFEST} is damaged ({first})", fix="prepare the corpus again"
    )
