"""The manifest: what a prepared corpus holds, written last, so that its presence means complete."""

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
from raymix.store.remote import files

FORMAT = 1
"""Version of the layout; a reader refuses a higher one."""

MANIFEST = "manifest.json"
"""Name of the manifest's file in the corpus directory."""

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")
"""The two splits of every domain, in the order in which they are fingerprinted."""


class _ManifestModel(BaseModel):
    # A later minor version may add fields; the format number says when that breaks reading.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


def _inside(path: str) -> str:
    """Return `path` if it stays in the directory that it starts at."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    # A colon starts a scheme, or names a drive.
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
    unigram_entropy: float
    """Entropy of the token distribution, nats per token."""
    bigram_entropy: float
    """Entropy of the next token given the current one, nats per token."""
    loss_mask: str | None = None
    """Hash of the file that says which tokens are learned; None: all but each document's first."""
    loss_tokens: int | None = None
    """How many are."""


class DomainInfo(_ManifestModel):
    """One domain: its splits and what became of the records that were read."""

    train: SplitInfo
    """What is trained on."""
    valid: SplitInfo
    """What is held out."""
    records_read: int
    """Records found in the sources."""
    rejected: int
    """Bad records: all reasons together."""
    rejected_by_reason: dict[str, int] = {}
    """Bad records by reason."""
    duplicates: int
    """Documents dropped because an equal one came before."""
    too_short: int
    """Documents dropped as empty or too short."""
    too_long: int
    """Documents dropped as too long."""


class Manifest(_ManifestModel):
    """Everything about a prepared corpus that a reader needs before opening a shard."""

    format: int = FORMAT
    """Version of the layout."""
    fingerprint: str
    """Hash of the content: equal for equal tokens in equal order, wherever they lie."""
    tokenizer: TokenizerInfo
    """What made the ids."""
    block_tokens: int
    """Tokens per block; the last block of a split may be shorter."""
    domains: dict[_Inside, DomainInfo]
    """The domains, in the order of the recipe."""

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Return the type of a token id on disk."""
        return token_dtype(self.tokenizer.vocab_size)


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return uint16 where every id below `vocab_size` fits it, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def corpus_fingerprint(
    tokenizer: TokenizerInfo, block_tokens: int, domains: Mapping[str, DomainInfo]
) -> str:
    """Return the hash that stands for a corpus: names, tokenizer, cut and every shard's bytes."""
    content = {
        "tokenizer": tokenizer.fingerprint,
        "block_tokens": block_tokens,
        "domains": [
            [name, *(_hashes(getattr(info, split)) for split in SPLITS)]
            for name, info in domains.items()
        ],
    }
    canonical = json.dumps(content, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _hashes(info: SplitInfo) -> list[str]:
    return [shard.sha256 for shard in info.shards] + ([info.loss_mask] if info.loss_mask else [])


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
    if isinstance(document, dict) and isinstance(found := document.get("format"), int):
        _check_format(corpus, found)
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise _damaged(corpus, error) from error


def _check_format(corpus: str, found: int) -> None:
    if found > FORMAT:
        raise CorpusError.at(
            "corpus.path",
            corpus,
            f"the corpus has format {found}, this raymix reads up to {FORMAT}",
            fix="upgrade raymix or prepare the corpus again",
        )


def _damaged(corpus: str, error: Exception) -> CorpusError:
    first = str(error).splitlines()[0]
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False, include_context=False, include_input=False)[0]
        first = f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
    return CorpusError.at(
        "corpus.path", corpus, f"{MANIFEST} is damaged ({first})", fix="prepare the corpus again"
    )
