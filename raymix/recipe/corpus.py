"""Recipe models of the corpus: where text comes from, how it is cleaned and tokenized."""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from raymix.recipe.base import (
    Fault,
    Faults,
    FieldDescription,
    Integer,
    Number,
    PathOrUrl,
    RecipeModel,
    raise_if,
)

NAME = FieldDescription(
    "text of letters, digits, '_', '.' and '-' that begins with a letter or digit"
)
# Formats of ready token ids: in place, they need no copy; MDS has sizes between its ids.
IN_PLACE_FORMATS = ("megatron", "olmo", "datatrove", "nanogpt", "llmc", "litdata")
TOKEN_FORMATS = (*IN_PLACE_FORMATS, "mds")
CLOCK_DATE = datetime.date(2024, 7, 26)
"""Today, to chat templates that ask for the date: the one that Llama 3.1's names itself."""

# Entries of a prepared corpus' directory that are no domains.
RESERVED_NAMES = ("tokenizer", "manifest.json", "prepare.json")


class ByteTokenizer(RecipeModel):
    """One token per UTF-8 byte plus an end-of-text token: vocabulary 257."""

    kind: Literal["byte"] = "byte"
    """Selects this tokenizer."""


class TrainedTokenizer(RecipeModel):
    """A byte-level BPE trained on a fixed sample of the corpus itself."""

    train: Literal["bpe"]
    """The algorithm."""
    vocab_size: Integer = Field(ge=258, le=1_000_000)
    """Tokens in the vocabulary, the end-of-text token among them."""
    sample_bytes: Integer = Field(default=50_000_000, ge=1)
    """UTF-8 bytes of text to train on, drawn evenly from the domains."""


class PretrainedTokenizer(RecipeModel):
    """A Hugging Face `tokenizer.json`, or a directory or a repository of the Hub that holds one."""

    path: PathOrUrl = Field(min_length=1)
    """The file or directory, local or any fsspec URL; else a name of the Hub, such as gpt2."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a name of the Hub; left out, main: as it is in the local cache, else
    as it is now. A prepared corpus keeps its tokenizer."""
    eos_token: str | None = None
    """The token that ends a document; needed only where the directory does not name one."""


def _tokenizer_kind(value: Any) -> str:
    # pydantic also calls it with models when it serializes.
    if isinstance(value, dict):
        # Told by the fields, so that a tokenizer needs no `kind`; vocab_size alone means a trained
        # one.
        hints = {"train": "train", "path": "path", "vocab_size": "train", "eos_token": "path"}
        hints["revision"] = "path"
        return next((tag for key, tag in hints.items() if key in value), "kind")
    return {"TrainedTokenizer": "train", "PretrainedTokenizer": "path"}.get(
        type(value).__name__, "kind"
    )


def _tokenizer_shorthand(value: Any) -> Any:
    if isinstance(value, str):
        # `byte` is the one word that is no path; a directory of that name can be written ./byte.
        return {"kind": "byte"} if value == "byte" else {"path": value}
    return value


_TokenizerModels = ByteTokenizer | TrainedTokenizer | PretrainedTokenizer
TokenizerConfig = Annotated[
    Annotated[ByteTokenizer, Tag("kind")]
    | Annotated[TrainedTokenizer, Tag("train")]
    | Annotated[PretrainedTokenizer, Tag("path")],
    Discriminator(_tokenizer_kind),
    BeforeValidator(_tokenizer_shorthand, json_schema_input_type=_TokenizerModels | str),
    FieldDescription(
        "`byte`, a path, a name of the Hub, or a mapping such as {train: bpe, vocab_size: 8192}"
    ),
]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Glob = Annotated[PathOrUrl, Field(min_length=1)]
Globs = Annotated[
    tuple[Glob, ...],
    BeforeValidator(_listed, json_schema_input_type=tuple[Glob, ...] | Glob),
    FieldDescription("a glob or a list of globs"),
]


def _date(value: Any) -> Any:
    # YAML reads an unquoted date as one.
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, str):
        try:
            return datetime.date.fromisoformat(value).isoformat()
        except ValueError as error:
            raise Faults(Fault("", value, "not a date", ("Write it as 2024-07-26",))) from error
    return value


ChatDate = Annotated[str, BeforeValidator(_date), FieldDescription("a date, such as 2024-07-26")]


def _no_column(value: Any) -> Any:
    return "" if value is False else value


ColumnBeside = Annotated[
    str, BeforeValidator(_no_column, json_schema_input_type=str | Literal[False])
]


class DomainConfig(RecipeModel):
    """One domain of the mixture and the files that hold its documents."""

    name: Annotated[str, NAME] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)
    """What the domain is called everywhere: weights, metrics, directories."""
    train: Globs = Field(min_length=1)
    """Globs of training files, or directories; local or any fsspec URL."""
    valid: Globs = ()
    """Globs of held-out files; left out, `valid_fraction` of the documents is held out."""
    format: Literal[
        "auto",
        "parquet",
        "jsonl",
        "csv",
        "text",
        "arrow",
        "megatron",
        "olmo",
        "datatrove",
        "nanogpt",
        "llmc",
        "litdata",
        "mds",
    ] = "auto"
    """File format; `auto` goes by the name's ending (.parquet, .jsonl[.gz|.zst], .csv, .txt, .py,
    .arrow), and for token files by their neighbors and first bytes too (.bin, .npy, .ds,
    index.json)."""
    text_column: str = Field(default="text", min_length=1)
    """Column that holds the text (Parquet, JSONL, Arrow, CSV), or a field in it: `doc.text`."""
    tokens_column: str | None = Field(default=None, min_length=1)
    """Column of ready token ids, such as `input_ids`; then nothing is tokenized."""
    labels_column: str | None = Field(default=None, min_length=1)
    """Column that says which ids are in the loss: labels (-100 is not), or a mask of 0 and 1."""
    token_dtype: Literal["uint8", "uint16", "uint32", "uint64", "int32", "int64"] | None = None
    """Type of the ids in token files that do not tell it; left out, by format and vocabulary."""
    eos_at: Literal["end", "start", "none"] | None = None
    """Where the end-of-text id stands in the documents of token files; left out, by format."""
    messages_column: str | None = Field(default=None, min_length=1)
    """Column of conversations, such as `messages`: lists of {role, content}; only the assistant's
    answers are learned."""
    tools_column: ColumnBeside | None = None
    """Column of the tools that a conversation offers: lists of JSON schemas, or their JSON; left
    out, `tools` where it stands beside the messages; `false` (or no name) for none."""
    system_column: ColumnBeside | None = None
    """Column of the system turn that begins a conversation, as ShareGPT's files have it; left out,
    `system` where it stands beside the messages; `false` (or no name) for none."""
    text_unit: Literal["file", "line", "paragraph"] = "file"
    """What one document is in a plain-text file."""

    @property
    def column_field(self) -> Literal["text_column", "tokens_column", "messages_column"]:
        """Return the name of the field that says which column is read."""
        if self.messages_column:
            return "messages_column"
        return "tokens_column" if self.tokens_column else "text_column"

    @property
    def column(self) -> str:
        """Return the column that is read."""
        return self.messages_column or self.tokens_column or self.text_column

    @model_validator(mode="after")
    def _rules(self) -> DomainConfig:
        # Domains are directories of the prepared corpus, beside these entries.
        reserved = self.name.lower() in RESERVED_NAMES
        columnless = self.format == "text" and self.column_field != "text_column"
        plain = self.format == "csv" and self.column_field != "text_column"
        raise_if(
            Fault("name", self.name, "reserved for a file of the prepared corpus", ("Rename it",))
            if reserved
            else None,
            Fault(
                self.column_field,
                self.column,
                "plain text has no columns",
                ("Leave it out, or choose another format",),
            )
            if columnless
            else None,
            Fault(
                self.column_field,
                self.column,
                "a field of CSV is text, not a list",
                ("Use text_column, or write Parquet or JSONL",),
            )
            if plain
            else None,
            Fault(
                "messages_column",
                self.messages_column,
                f"tokens_column = {self.tokens_column!r} is given as well",
                ("Give one of the two",),
            )
            if self.messages_column and self.tokens_column
            else None,
            Fault(
                "tools_column",
                self.tools_column,
                "tools belong to conversations, and messages_column is not given",
                ("Give both",),
            )
            if self.tools_column and not self.messages_column
            else None,
            Fault(
                "system_column",
                self.system_column,
                "system turns belong to conversations, and messages_column is not given",
                ("Give both",),
            )
            if self.system_column and not self.messages_column
            else None,
            *self._token_faults(),
        )
        return self

    def _token_faults(self) -> list[Fault]:
        """Return a fault per column that does not go with the format or the other columns."""
        faults = []
        token_file = self.format in TOKEN_FORMATS
        if token_file and (self.messages_column or (self.tokens_column and self.format != "mds")):
            wrong = f"format = {self.format!r} has no such column"
            faults.append(Fault(self.column_field, self.column, wrong, ("Leave it out",)))
        if self.labels_column and not self.tokens_column:
            wrong = "labels are of ready token ids, and tokens_column is not given"
            faults.append(Fault("labels_column", self.labels_column, wrong, ("Give both",)))
        if self.labels_column and token_file:
            wrong = f"format = {self.format!r} has no such column"
            faults.append(Fault("labels_column", self.labels_column, wrong, ("Leave it out",)))
        return faults


class CorpusConfig(RecipeModel):
    """The corpus: its sources, its tokenizer, and where the prepared form lies."""

    path: PathOrUrl = Field(min_length=1)
    """Directory of the prepared corpus, local or any fsspec URL."""
    tokenizer: TokenizerConfig = ByteTokenizer()
    """`byte`, a path, a name of the Hub, or `{train: bpe, vocab_size: N}`."""
    chat_template: str | None = Field(default=None, min_length=1)
    """How conversations are written out: a Jinja file, local or any fsspec URL, or `chatml`;
    left out, the tokenizer's own."""
    chat_date: ChatDate | None = None
    """Today's date for chat templates that write it out; left out, 2024-07-26 for those with a
    clock (`strftime_now`), and what the template names itself for the others (`date_string`)."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables that the chat template is given, such as `{enable_thinking: false}`."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Reasoning beside the content of messages (`reasoning_content`): given to the template, which
    is refused if it leaves out that of an answer to learn; or dropped."""
    system: Literal["as_is", "fold"] = "as_is"
    """System turns of conversations: as they are, or put before the user turn that follows (`fold`)
    for chat templates that refuse them."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether documents of text begin with the beginning-of-sequence token: `auto` where the
    tokenizer's post-processor puts one. Conversations have what the chat template writes."""
    special_tokens_in_text: Literal["text", "special"] = "text"
    """Special tokens written out in a text or in the content of a message: characters like any
    other, or the tokens themselves."""
    domains: tuple[DomainConfig, ...] = ()
    """The domains; left out, the corpus at `path` must have been prepared before."""
    valid_fraction: Number = Field(default=0.02, gt=0, lt=1)
    """Share of documents held out (by document hash) where a domain names no `valid` files."""
    min_characters: Integer = Field(default=1, ge=0)
    """Shorter documents are dropped, after stripping white space."""
    max_characters: Integer = Field(default=10_000_000, ge=1)
    """Longer documents are dropped."""
    deduplicate: bool = True
    """Drop exact duplicates of a document within its domain."""
    in_place: bool = False
    """Read token files where they lie, without a copy: `path` gets an index only. Nothing is
    deduplicated or dropped, and the last documents of each domain are held out."""
    max_rejected: Number = Field(default=0.01, ge=0, le=1)
    """Share of bad records above which preparing a domain fails."""
    block_tokens: Annotated[Integer, Field(ge=16, le=2**31)] | Literal["auto"] = "auto"
    """Tokens per block, the unit of reading and shuffling; `auto` sizes it by the corpus."""

    @model_validator(mode="after")
    def _rules(self) -> CorpusConfig:
        raise_if(*_twice(self.domains), _too_short(self), *_untrainable(self), *_not_in_place(self))
        raise_if(*_reserved_variables(self))
        return self


def _reserved_variables(corpus: CorpusConfig) -> list[Fault]:
    """Return a fault per variable of the chat template that something else sets."""
    reserved = {"messages", "conversations", "tools", "documents", "chat_template"}
    reserved |= {"add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"}
    faults = [
        Fault(f"chat_template_kwargs.{name}", value, "set for each conversation", ("Leave it out",))
        for name, value in corpus.chat_template_kwargs.items()
        if name in reserved
    ]
    if corpus.chat_date and "date_string" in corpus.chat_template_kwargs:
        wrong = "chat_date is given as well"
        value = corpus.chat_template_kwargs["date_string"]
        faults.append(
            Fault("chat_template_kwargs.date_string", value, wrong, ("Give one of the two",))
        )
    return faults


def _twice(domains: tuple[DomainConfig, ...]) -> list[Fault]:
    """Return a fault per domain name that an earlier domain has; letter case does not count."""
    # On macOS and Windows `Books` and `books` are one directory.
    counts = Counter(domain.name.lower() for domain in domains)
    first: dict[str, int] = {}
    faults = []
    for index, domain in enumerate(domains):
        key = domain.name.lower()
        if counts[key] > 1 and first.setdefault(key, index) != index:
            wrong = f"corpus.domains.{first[key]} has this name already"
            faults.append(Fault(f"domains.{index}.name", domain.name, wrong, ("Rename one",)))
    return faults


def _too_short(corpus: CorpusConfig) -> Fault | None:
    if corpus.min_characters <= corpus.max_characters:
        return None
    wrong = f"more than max_characters = {corpus.max_characters:,}: every document would be dropped"
    return Fault("min_characters", corpus.min_characters, wrong)


def _untrainable(corpus: CorpusConfig) -> list[Fault]:
    """Return a fault per domain of ready token ids whose tokenizer is yet to be trained."""
    # A byte tokenizer is accepted: ids that fit its vocabulary may be meant.
    if not isinstance(corpus.tokenizer, TrainedTokenizer):
        return []
    return [
        Fault(
            f"domains.{index}.{'tokens_column' if domain.tokens_column else 'format'}",
            domain.tokens_column or domain.format,
            "ready token ids need the tokenizer that made them",
            ("Set corpus.tokenizer to its path",),
        )
        for index, domain in enumerate(corpus.domains)
        if domain.tokens_column is not None or domain.format in TOKEN_FORMATS
    ]


def _not_in_place(corpus: CorpusConfig) -> list[Fault]:
    """Return a fault per domain that cannot be read in place, as far as the recipe tells."""
    if not corpus.in_place:
        return []
    faults = [
        Fault(
            f"domains.{index}.format",
            domain.format,
            "cannot be read in place",
            (f"Allowed with in_place: {', '.join(IN_PLACE_FORMATS)}", "Or set in_place: false"),
        )
        for index, domain in enumerate(corpus.domains)
        if domain.format not in ("auto", *IN_PLACE_FORMATS)
    ]
    if isinstance(corpus.tokenizer, TrainedTokenizer):
        advice = ("Set corpus.tokenizer to the path of the one that made them",)
        faults.append(Fault("tokenizer", "bpe", "token files need the tokenizer's ids", advice))
    return faults
