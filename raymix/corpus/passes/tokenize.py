"""The first pass: one part in, its clean documents out as tokens, hashes and counts.

A part's result is some files in the work directory, written as the part is read, so that the
memory a part needs is that of a batch:

- `NAME.tokens`: the ids of all documents, end-of-text after each, little-endian;
- `NAME.documents`: one `DOCUMENT` record each: hash, tokens, bytes, spans in the loss;
- `NAME.edges`: of conversations, the edges of the spans in the loss, counted in tokens from the
  beginning of each document, uint32;
- `NAME.json`: the counts, written last: their presence, under the right key, means done.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from raymix._utils.json import parse_json
from raymix.corpus.chats.messages import Conversation, with_texts
from raymix.corpus.chats.saved import saved_template
from raymix.corpus.chats.template import ChatOptions, TemplateRefused
from raymix.corpus.read.parts import Part
from raymix.corpus.read.readers import read_slice
from raymix.corpus.read.records import (
    NULL,
    TOO_LONG,
    Reject,
    Value,
    excerpt,
    without_surrogates,
)
from raymix.corpus.read.token_records import LabeledTokens, TokenIds, loss_edges
from raymix.corpus.tokenizers.encoders import Ints, TokenArray, saved_encoder
from raymix.recipe import DomainConfig
from raymix.store import TokenizerInfo, atomic_write_text, token_dtype
from raymix.store.remote import files

DOCUMENT = np.dtype([("hash", "<u8", (2,)), ("tokens", "<u4"), ("bytes", "<u4"), ("spans", "<u4")])
"""A document of a part: BLAKE2b-128 of its content, tokens (end-of-text included), UTF-8 bytes,
and spans in the loss: none where all of it is."""

REJECTS_KEPT = 100
"""Bad records of a domain that are shown in `rejects.jsonl`."""

NO_ANSWER = "no answer to learn"
"""Reason of leaving out a record without a token in the loss: nothing is wrong with it."""

# Small batches stay in the cache: a tenth faster than batches of megabytes.
_BATCH_BYTES = 1 << 16
_BATCH_TEXTS = 4096


@dataclass(frozen=True)
class PartJob:
    """Input of the task that tokenizes one part."""

    part: Part
    domain: DomainConfig
    tokenizer: TokenizerInfo
    corpus: str
    work: str
    min_characters: int
    max_characters: int
    template: str = ""
    """Name of the chat template; see `raymix.corpus.chats.saved`."""
    chat_options: ChatOptions = field(default_factory=ChatOptions)
    bos_id: int | None = None
    """Id that documents of text begin with, if one."""
    special_in_text: bool = False
    """Whether special tokens written out in a text are tokens."""
    masked: bool = False
    """Whether the domain has a loss mask."""

    @property
    def base(self) -> str:
        """Return the path of the part's files, without their endings."""
        return part_base(self.work, self.part.domain, self.part.number)

    def key(self) -> str:
        """Return the hash of everything the result depends on."""
        # Not the globs: the files themselves are in the part's key, under any pattern.
        columns = self.domain.model_dump(
            include={
                "text_column",
                "tokens_column",
                "labels_column",
                "messages_column",
                "text_unit",
                "format",
                "token_dtype",
                "eos_at",
            }
        )
        limits: list[object] = [self.min_characters, self.max_characters]
        if self.domain.messages_column:
            limits += [self.template, self.domain.tools_column, self.domain.system_column]
            limits += [self.special_in_text]
        elif self.tokenizer.kind == "pretrained" or self.special_in_text:
            limits += [self.bos_id, self.special_in_text]
        return self.part.key(columns, self.tokenizer.fingerprint, self.tokenizer.eos_id, limits)


def part_base(work: str, domain: str, number: int) -> str:
    """Return the path of a part's files, without their endings."""
    return files.join(work, domain, f"part-{number:06d}")


@dataclass
class PartCounts:
    """Counts of a part; `lines` counts per slice.

    `examples` are bad records. They stay in the part's file, `base`.json, and the driver reads
    those of as many parts as it needs.
    """

    key: str
    base: str
    records: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    too_short: int = 0
    too_long: int = 0
    repaired: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def reject(self, bad: Reject, slice_number: int, line: int) -> None:
        """Count a bad record and keep it as an example while there is room for its reason."""
        self.rejected[bad.reason] = self.rejected.get(bad.reason, 0) + 1
        if self.rejected[bad.reason] <= REJECTS_KEPT:
            example = {"slice": slice_number, "line": line, **asdict(bad)}
            self.examples.append(example)


def finished_counts(job: PartJob) -> PartCounts | None:
    """Return the counts of a part that was tokenized before, or None if it must be done."""
    try:
        counts = read_counts(job.base)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return replace(counts, examples=[]) if counts.key == job.key() else None


def read_counts(base: str) -> PartCounts:
    """Return the counts of a part with its examples.

    Raises:
        FileNotFoundError: If the part has not been tokenized.
    """
    return PartCounts(**parse_json(files.read_bytes(base + ".json")))


def tokenize_part(job: PartJob) -> PartCounts:
    """Return the counts of a part less its examples, having tokenized it.

    Raises:
        CorpusError: If a file of the part is damaged, or the disk is full.
    """
    counts = PartCounts(job.key(), job.base)
    with _Writer(job, counts) as writer:
        for number, file_slice in enumerate(job.part.slices):
            line = 0
            records = read_slice(
                file_slice,
                job.domain,
                max_characters=job.max_characters,
                tokenizer=job.tokenizer,
            )
            for line, value in records:
                if value is None:
                    continue
                counts.records += 1
                bad = writer.add(value)
                if bad:
                    counts.reject(bad, number, line)
            counts.lines.append(line)
    atomic_write_text(job.base + ".json", json.dumps(asdict(counts)))
    return replace(counts, examples=[])


class _Writer:
    """Cleans the records of a part and writes its documents batch by batch."""

    def __init__(self, job: PartJob, counts: PartCounts) -> None:
        self._job = job
        self._counts = counts
        self._encoder = saved_encoder(
            job.corpus,
            job.tokenizer,
            bos_id=job.bos_id,
            special_in_text=job.special_in_text,
        )
        self._dtype = token_dtype(job.tokenizer.vocab_size)
        self._texts: list[str] = []
        self._edges: list[Ints] = []
        self._ids: list[TokenArray] = []
        self._hashes: list[bytes] = []
        self._sizes: list[int] = []
        self._pending = 0
        self._tokens = files.AtomicFile(job.base + ".tokens")
        self._documents = files.AtomicFile(job.base + ".documents")
        self._loss_mask = files.AtomicFile(job.base + ".edges") if job.masked else None

    def add(self, value: Value) -> Reject | None:
        """Take one record; return why it is bad, if it is."""
        if value is TOO_LONG:
            self._counts.too_long += 1
        elif value is NULL:
            self._counts.too_short += 1
        elif isinstance(value, Reject):
            return value
        elif isinstance(value, str):
            self._add_text(value)
        elif isinstance(value, Conversation):
            return self._add_chat(value)
        elif isinstance(value, LabeledTokens):
            return self._add_ids(value.ids, value.in_loss)
        else:
            return self._add_ids(value)
        return None

    def _add_text(self, text: str) -> None:
        if self._fits(text):
            try:
                raw = text.encode()
            except UnicodeEncodeError:
                text = without_surrogates(text)
                raw = text.encode()
                self._counts.repaired += 1
            self._texts.append(text)
            self._take(raw, len(raw), len(raw))

    def _fits(self, text: str) -> bool:
        """Return whether a text is of a length that is wanted, having counted it if it is not."""
        if len(text.strip()) < self._job.min_characters:
            self._counts.too_short += 1
        elif len(text) > self._job.max_characters:
            self._counts.too_long += 1
        else:
            return True
        return False

    def _add_chat(self, chat: Conversation) -> Reject | None:
        job = self._job
        special_tokens = None if job.special_in_text else self._encoder.special_tokens
        try:
            template = saved_template(job.corpus, job.template, job.chat_options)
            examples = template.examples(chat, special_tokens)
            # All before the first is taken: a conversation is in the corpus whole or not at all.
            raw = [example.text.encode() for example in examples]
            encoded = [self._encoder.encode_chat(example) for example in examples]
        except TemplateRefused as error:
            return Reject(f"chat template: {error}", excerpt(chat.messages[0]))
        except UnicodeEncodeError:
            self._counts.repaired += 1
            return self._add_chat(with_texts(chat, without_surrogates))
        if not any(len(edges) for _, edges in encoded):
            # It would cost compute and teach nothing: no token of it is in the loss.
            return Reject(NO_ANSWER, excerpt(examples[0].plain))
        if chat.unlearned:
            # Turns that are not learned make another document of one text.
            raw = [text + edges.tobytes() for text, (_, edges) in zip(raw, encoded, strict=True)]
        for content, example, (tokens, edges) in zip(raw, examples, encoded, strict=True):
            if len(edges) and self._fits(example.plain):
                self._ids.append(tokens.astype(self._dtype))
                self._edges.append(edges)
                self._take(content, len(example.plain.encode()), len(content), first=raw[0])
        return None

    def _add_ids(
        self, ids: TokenIds, in_loss: npt.NDArray[np.bool_] | None = None
    ) -> Reject | None:
        vocabulary, eos = self._job.tokenizer.vocab_size, self._job.tokenizer.eos_id
        if not len(ids):
            self._counts.too_short += 1
            return None
        if ids.dtype.kind not in "iu":
            return Reject("not a list of token ids", excerpt(ids.tolist()[:20]))
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            worst = low if low < 0 else high
            reason = f"token id outside 0..{vocabulary - 1}"
            return Reject(reason, f"id {worst} in {excerpt(ids[:20].tolist())}")
        # Token ids brought along may or may not end in end-of-text; a document ends in one.
        ended = ids if ids[-1] == eos else np.append(ids, eos)
        tokens = ended.astype(self._dtype)
        if self._loss_mask is not None:
            edges = loss_edges(in_loss, len(ids), len(tokens))
            if not len(edges):
                return Reject(NO_ANSWER, excerpt(ids[:20].tolist()))
            self._edges.append(edges)
        self._ids.append(tokens)
        # Hashed in one width and byte order, so that the same ids are duplicates on any machine.
        self._take(tokens.astype("<u4").tobytes(), 0, tokens.nbytes)
        return None

    def _take(self, content: bytes, size: int, weight: int, *, first: bytes | None = None) -> None:
        # 128 bits: at 10 billion documents a collision has a chance below 1e-18.
        document_hash = hashlib.blake2b(content, digest_size=16).digest()
        if first is not None and first is not content:
            # The first half decides the split: all texts of a conversation go into one.
            document_hash = hashlib.blake2b(first, digest_size=16).digest()[:8] + document_hash[8:]
        self._hashes.append(document_hash)
        self._sizes.append(size)
        self._pending += weight
        if self._pending >= _BATCH_BYTES or len(self._hashes) >= _BATCH_TEXTS:
            self._flush()

    def _flush(self) -> None:
        if not self._hashes:
            return
        if self._ids:
            tokens = np.concatenate(self._ids)
            lengths = np.fromiter(map(len, self._ids), np.int64, len(self._ids))
        else:
            tokens, lengths = self._encoder.encode(self._texts)
        self._tokens.write(tokens.astype(self._dtype, copy=False).data)
        documents = np.empty(len(self._hashes), dtype=DOCUMENT)
        documents["hash"] = np.frombuffer(b"".join(self._hashes), "<u8").reshape(-1, 2)
        documents["tokens"] = lengths
        documents["bytes"] = self._sizes
        documents["spans"] = [len(edges) // 2 for edges in self._edges] or 0
        self._documents.write(documents.tobytes())
        if self._loss_mask is not None:
            self._loss_mask.write(np.concatenate(self._edges).astype("<u4").tobytes())
        self._counts.documents += len(documents)
        self._counts.tokens += len(tokens)
        self._counts.bytes += sum(self._sizes)
        for pending in (self._texts, self._ids, self._edges, self._hashes, self._sizes):
            pending.clear()
        self._pending = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # After an error nothing is committed, and the part is done again as a whole.
            if kind is None:
                self._flush()
                for file in self._files():
                    file.commit()
        finally:
            for file in self._files():
                file.abort()

    def _files(self) -> list[files.AtomicFile]:
        every = (self._tokens, self._documents, self._loss_mask)
        return [file for file in every if file is not None]
