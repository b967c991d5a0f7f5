"""Recipe models of the corpus: where text comes from, how it is cleaned and tokenised."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from raymix.recipe._base import Model


class ByteTokenizer(Model):
    """One token per UTF-8 byte plus an end-of-text token: vocabulary 257."""

    kind: Literal["byte"] = "byte"
    """Selects this tokenizer."""


class TrainedTokenizer(Model):
    """A byte-level BPE trained on a fixed sample of the corpus itself."""

    train: Literal["bpe"]
    """The algorithm."""
    vocab_size: int = Field(ge=258, le=1_000_000)
    """Tokens in the vocabulary, the end-of-text token among them."""
    sample_bytes: int = Field(default=50_000_000, ge=1)
    """UTF-8 bytes of text to train on, drawn evenly from the domains."""


class PretrainedTokenizer(Model):
    """A Hugging Face `tokenizer.json`, or a directory that holds one."""

    path: str
    """The file or directory, local or any fsspec URL."""
    eos_token: str | None = None
    """The token that ends a document; needed only where the directory does not name one."""


def _tokenizer_kind(value: Any) -> str:
    if isinstance(value, dict):
        return next((key for key in ("train", "path") if key in value), "kind")
    return {"TrainedTokenizer": "train", "PretrainedTokenizer": "path"}.get(
        type(value).__name__, "kind"
    )


def _tokenizer_shorthand(value: Any) -> Any:
    if isinstance(value, str):
        return {"kind": "byte"} if value == "byte" else {"path": value}
    return value


TokenizerConfig = Annotated[
    Annotated[ByteTokenizer, Tag("kind")]
    | Annotated[TrainedTokenizer, Tag("train")]
    | Annotated[PretrainedTokenizer, Tag("path")],
    Discriminator(_tokenizer_kind),
    BeforeValidator(_tokenizer_shorthand),
]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Globs = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class DomainConfig(Model):
    """One domain of the mixture and the files that hold its documents."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)
    """What the domain is called everywhere: weights, metrics, directories."""
    train: Globs = Field(min_length=1)
    """Globs of training files, local or any fsspec URL; relative ones start at the recipe."""
    valid: Globs = ()
    """Globs of held-out files; left out, `valid_fraction` of the documents is held out."""
    format: Literal["auto", "parquet", "jsonl", "text", "arrow"] = "auto"
    """File format; `auto` goes by the name's ending (.parquet, .jsonl[.gz|.zst], .txt, .arrow)."""
    text_column: str = "text"
    """Column that holds the text (Parquet, JSONL, Arrow)."""
    tokens_column: str | None = None
    """Column of ready token ids, such as `input_ids`; then nothing is tokenised."""
    text_unit: Literal["file", "line", "paragraph"] = "file"
    """What one document is in a plain-text file."""


class CorpusConfig(Model):
    """The corpus: its sources, its tokenizer, and where the prepared form lies."""

    path: str
    """Directory of the prepared corpus, local or any fsspec URL."""
    tokenizer: TokenizerConfig = ByteTokenizer()
    """`byte`, a path, or `{train: bpe, vocab_size: N}`."""
    domains: tuple[DomainConfig, ...] = ()
    """The domains; left out, the corpus at `path` must have been prepared before."""
    valid_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of documents held out (by document hash) where a domain names no `valid` files."""
    min_characters: int = Field(default=1, ge=0)
    """Shorter documents are dropped, after stripping white space."""
    max_characters: int = Field(default=10_000_000, ge=1)
    """Longer documents are dropped."""
    deduplicate: bool = True
    """Drop exact duplicates of a document within its domain."""
    max_rejected: float = Field(default=0.01, ge=0, le=1)
    """Share of bad records above which preparing a domain fails."""
    block_tokens: int | Literal["auto"] = "auto"
    """Tokens per block, the unit of reading and shuffling; `auto` sizes it by the corpus."""
