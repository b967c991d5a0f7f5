"""Encoders: texts and conversations into token ids, in bulk."""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from raymix.corpus.chats.special_tokens import Span, SpecialTokens, mark
from raymix.corpus.chats.template import Example, TemplateRefused
from raymix.corpus.tokenizers.tokenizer import DIRECTORY, END_OF_TEXT, byte_tokenizer
from raymix.store import TokenizerInfo
from raymix.store.remote import files

_BYTE_EOS = 256
# No UTF-8 text holds this byte, so it can stand for the end of a document for a moment.
_SEPARATOR = b"\xff"

TokenArray = npt.NDArray[np.unsignedinteger]
Ints = npt.NDArray[np.int64]


class Encoder(Protocol):
    """Turns texts into one array of ids."""

    special_tokens: SpecialTokens

    def encode(self, texts: Sequence[str]) -> tuple[TokenArray, Ints]:
        """Return the ids of all texts, end-of-text after each, and the ids per text (N,)."""
        ...

    def encode_chat(self, example: Example) -> tuple[TokenArray, Ints]:
        """Return the ids of a conversation, end-of-text last, and the edges of what is in the loss.

        Special tokens that the template wrote are tokens; those with a guard in them are text.

        Returns:
            The ids, and the first id and the one behind the last of each span, shape (E,). An id
            is of the span in which its first character lies. Where nothing but space follows the
            last span, end-of-text is part of it, or a span of its own.

        Raises:
            TemplateRefused: If the tokenizer has no way to write a special token as text.
        """
        ...


class ByteEncoder:
    """One id per UTF-8 byte."""

    special_tokens = SpecialTokens([END_OF_TEXT])

    def encode(self, texts: Sequence[str]) -> tuple[TokenArray, Ints]:
        """Return the ids of all texts, end-of-text after each, and the ids per text (N,)."""
        raw = [text.encode() for text in texts]
        joined = np.frombuffer(_SEPARATOR.join([*raw, b""]), dtype=np.uint8)
        tokens = joined.astype(np.uint16)
        tokens[joined == _SEPARATOR[0]] = _BYTE_EOS
        return tokens, np.fromiter((len(item) + 1 for item in raw), np.int64, len(raw))

    def encode_chat(self, example: Example) -> tuple[TokenArray, Ints]:
        """See `Encoder`."""
        text, spans = example.text, example.spans
        if example.guard or END_OF_TEXT in text:
            return self._library.encode_chat(example)
        tokens, _ = self.encode([text])
        sizes = np.fromiter((len(character.encode()) for character in text), np.int64, len(text))
        first_C = np.concatenate([[0], np.cumsum(sizes)])
        edges = [int(first_C[place]) for span in spans for place in span]
        return tokens, _with_end(edges, text, spans, len(tokens))

    @functools.cached_property
    def _library(self) -> HuggingFaceEncoder:
        return HuggingFaceEncoder(byte_tokenizer().to_str(), _BYTE_EOS)


class HuggingFaceEncoder:
    """Ids from the `tokenizers` library."""

    def __init__(
        self,
        serialized: str,
        eos_id: int,
        *,
        bos_id: int | None = None,
        special_in_text: bool = False,
    ) -> None:
        """Encode with the tokenizer of the JSON `serialized`.

        Args:
            serialized: A `tokenizer.json`.
            eos_id: Id that ends each document.
            bos_id: Id that each text begins with, if one.
            special_in_text: Whether special tokens written out in a text are tokens; else they are
                characters, and no document can end another.
        """
        self._serialized = serialized
        self._eos = eos_id
        self._bos = bos_id
        self._special_in_text = special_in_text
        added = json.loads(serialized)["added_tokens"]
        self.special_tokens = SpecialTokens(each["content"] for each in added if each["special"])

    @functools.cached_property
    def _texts(self) -> Tokenizer:
        if self._special_in_text:
            return self._chats
        model = json.loads(self._serialized)["model"]
        # Merges make no such token; other models may find one among their pieces.
        if model["type"] != "BPE" or model.get("ignore_merges"):
            marked = self._marked
            if marked is not None:
                return marked
        tokenizer = Tokenizer.from_str(self._serialized)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _chats(self) -> Tokenizer:
        return Tokenizer.from_str(self._serialized)

    @functools.cached_property
    def _marked(self) -> Tokenizer | None:
        return marked_tokenizer(self._serialized, self.special_tokens)

    def encode(self, texts: Sequence[str]) -> tuple[TokenArray, Ints]:
        """Return the ids of all texts, end-of-text after each, and the ids per text (N,)."""
        # A flat array of C integers: a list would hold a Python object per token.
        ids = array("I")
        lengths = np.empty(len(texts), dtype=np.int64)
        # The fast variant skips offsets, which only conversations need.
        encodings = self._texts.encode_batch_fast(list(texts), add_special_tokens=False)
        for number, encoding in enumerate(encodings):
            before = len(ids)
            text_ids = encoding.ids
            # A text may spell the token out itself, where it is read as one.
            if self._bos is not None and text_ids[:1] != [self._bos]:
                ids.append(self._bos)
            ids.extend(text_ids)
            ids.append(self._eos)
            lengths[number] = len(ids) - before
        return np.frombuffer(ids, dtype=np.uint32), lengths

    def encode_chat(self, example: Example) -> tuple[TokenArray, Ints]:
        """See `Encoder`."""
        text, spans = example.text, example.spans
        if example.guard:
            if self._marked is None:
                raise TemplateRefused("the tokenizer cannot write a special token as text")
            text, spans = self.special_tokens.marked(text, spans, example.guard)
            encoding = self._marked.encode(text, add_special_tokens=False)
        else:
            encoding = self._chats.encode(text, add_special_tokens=False)
        ids = encoding.ids
        first_T = np.array([first for first, _ in encoding.offsets], dtype=np.int64)
        edges = np.searchsorted(first_T, [place for span in spans for place in span]).tolist()
        # Some templates end a conversation with the token that ends a document.
        ended = ids[-1:] == [self._eos]
        tokens = np.array(ids if ended else [*ids, self._eos], dtype=np.uint32)
        return tokens, _with_end(edges, text, spans, len(tokens))


def marked_tokenizer(serialized: str, special_tokens: SpecialTokens) -> Tokenizer | None:
    """Return a tokenizer that knows special tokens by their marked names only, with equal ids.

    To `encode_special_tokens` of the library, special tokens in a text are no added tokens; but
    vocabularies like those of sentencepiece have them among their pieces, and find them all the
    same. A text never has a marked name.

    Args:
        serialized: The `tokenizer.json`.
        special_tokens: Its special tokens.

    Returns:
        The tokenizer, or None where its model does not work under other names.
    """
    document = json.loads(serialized)
    # It names special tokens, and is not wanted here.
    document["post_processor"] = None
    names = set(special_tokens.tokens)
    model = document["model"]
    merges = (
        each if isinstance(each, list) else each.split(" ") for each in model.get("merges", ())
    )
    if any("".join(merge) in names for merge in merges):
        return None

    def renamed(name: str) -> str:
        return mark(name) if name in names else name

    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed(name): number for name, number in vocabulary.items()}
    else:
        model["vocab"] = [[renamed(name), score] for name, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = renamed(model["unk_token"])
    for token in document["added_tokens"]:
        token["content"] = renamed(token["content"])
    tokenizer = Tokenizer.from_str(json.dumps(document))
    same = (
        tokenizer.token_to_id(each["content"]) == each["id"] for each in document["added_tokens"]
    )
    return tokenizer if all(same) else None


def _with_end(edges: list[int], text: str, spans: Sequence[Span], size: int) -> Ints:
    """Return the edges, those of end-of-text among them where an answer comes last."""
    if spans and not text[spans[-1][1] :].strip():
        edges = [*edges, size - 1, size]
    merged: list[int] = []
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        # Nothing comes before the first token that it could be predicted from.
        first = max(first, 1)
        if merged and first <= merged[-1]:
            merged[-1] = max(last, merged[-1])
        elif first < last:
            merged += [first, last]
    return np.array(merged, dtype=np.int64)


@functools.lru_cache(maxsize=2)
def saved_encoder(
    corpus: str, info: TokenizerInfo, *, bos_id: int | None = None, special_in_text: bool = False
) -> Encoder:
    """Return the encoder of the tokenizer saved in a corpus, loaded once per process.

    Args:
        corpus: The directory.
        info: Describes the tokenizer.
        bos_id: See `HuggingFaceEncoder`.
        special_in_text: See `HuggingFaceEncoder`.
    """
    # Bytes are their own ids, so no call of the library is needed.
    if info.kind == "byte" and not special_in_text:
        return ByteEncoder()
    raw = files.read_bytes(files.join(corpus, DIRECTORY, "tokenizer.json"))
    return HuggingFaceEncoder(
        raw.decode(), info.eos_id, bos_id=bos_id, special_in_text=special_in_text
    )
