"""Tokenizers: building, training, loading and saving; see `encoders` for turning texts into ids.

Every tokenizer ends up as Hugging Face files under `CORPUS/tokenizer`, which
`AutoTokenizer.from_pretrained` loads, the byte tokenizer among them: a byte-level BPE without
merges whose 256 symbols have the ids of their bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from raymix._utils.json import parse_json
from raymix.errors import CorpusError, did_you_mean
from raymix.recipe import PretrainedTokenizer
from raymix.store import TokenizerInfo, atomic_write_text
from raymix.store.remote import files
from raymix.store.remote.hub import HubRepo, fetch_file, model_repo

END_OF_TEXT = "<|endoftext|>"
"""The token that ends a document in the tokenizers made here."""

DIRECTORY = "tokenizer"
"""Directory of a corpus that holds its tokenizer."""

_COPIED = ("special_tokens_map.json", "chat_template.jinja", "generation_config.json")


# Of several templates this one is chosen by itself, for conversations that offer tools.
_TOOL_USE = "additional_chat_templates/tool_use.jinja"


@contextlib.contextmanager
def rust_threads(enabled: bool) -> Iterator[None]:
    """Let the `tokenizers` library use threads of its own, or not, for a while.

    Its threads spin while they wait for work: over the small batches of encoding that costs a
    quarter more CPU time than as many threads (or processes) of ours with one batch each.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true" if enabled else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def byte_tokenizer() -> Tokenizer:
    """Return the byte tokenizer as the `tokenizers` library has it: ids 0..255 are the bytes."""
    # GPT-2's mapping of bytes to printable characters, which the ByteLevel pre-tokenizer uses.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(256 + number): byte for number, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of at most `vocab_size` tokens trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes, so that no text is ever unknown, whatever the sample held.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # One call over the whole sample: here the library's own threads have work.
    with rust_threads(True):
        tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def fingerprint(serialized: str) -> str:
    """Return the hash of the canonical form of a tokenizer's JSON."""
    # Two writers of one tokenizer may order or indent its keys differently.
    canonical = json.dumps(parse_json(serialized), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


class LoadedTokenizer:
    """A tokenizer with its end-of-text token and the configuration that goes beside it."""

    def __init__(self, tokenizer: Tokenizer, kind: str, eos: str, beside: dict[str, str]) -> None:
        """Hold `tokenizer` with padding and truncation off; `beside` are its other files."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A tokenizer saved for a model often cuts or pads to its context: documents would too.
        self._json = tokenizer.to_str()
        self._eos = eos
        self._beside = beside
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.info = TokenizerInfo(
            kind=kind,
            fingerprint=fingerprint(self._json),
            # Not len(vocabulary): some published tokenizers leave ids out.
            vocab_size=max(vocabulary.values()) + 1,
            eos_id=vocabulary[eos],
        )
        self._bos = _beginning(tokenizer, vocabulary[eos])
        self._named_bos = _named_token("bos_token", beside)
        self._vocabulary = vocabulary

    def bos_token(self, mode: Literal["auto", "always", "never"]) -> tuple[str, int] | None:
        """Return the token that documents are to begin with, and its id; None where they are not.

        Raises:
            CorpusError: If they must, and the tokenizer has none.
        """
        token = self._bos
        if mode == "always":
            token = self._named_bos or self._bos
            if token not in self._vocabulary:
                raise CorpusError.at(
                    "corpus.bos",
                    mode,
                    "the tokenizer has no beginning-of-sequence token",
                    fix="Name one as bos_token in its tokenizer_config.json, or leave this out",
                )
        return None if mode == "never" or token is None else (token, self._vocabulary[token])

    @classmethod
    def made(cls, tokenizer: Tokenizer, kind: str) -> Self:
        """Return a tokenizer made here, whose end-of-text token is `<|endoftext|>`."""
        return cls(tokenizer, kind, END_OF_TEXT, {})

    def save(self, corpus: str) -> None:
        """Write the Hugging Face files under `CORPUS/tokenizer`, `tokenizer.json` last."""
        configuration: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **parse_json(self._beside.get("tokenizer_config.json", "{}")),
            "eos_token": self._eos,
        }
        texts = {**self._beside, "tokenizer_config.json": json.dumps(configuration, indent=2)}
        for name, text in texts.items():
            atomic_write_text(files.join(corpus, DIRECTORY, name), text)
        # Last, so that its presence means the directory is complete.
        target = files.join(corpus, DIRECTORY, "tokenizer.json")
        atomic_write_text(target, self._json)


def load_pretrained(config: PretrainedTokenizer) -> LoadedTokenizer:
    """Return the tokenizer a recipe names: a file, or one of a directory or of the Hub.

    Raises:
        CorpusError: If it is missing, damaged, or its end-of-text token is not known.
        StorageError: If it is on the Hub and cannot be downloaded.
    """
    path = config.path
    repo = model_repo(path, config.revision, "corpus.tokenizer")
    if repo is not None:
        directory, name = str(download_tokenizer(repo)), "tokenizer.json"
    elif path.endswith(".json"):
        directory, _, name = path.rpartition("/")
        directory = directory or "."
    else:
        directory, name = path, "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_buffer(files.read_bytes(files.join(directory, name)))
    except FileNotFoundError as error:
        raise _no_tokenizer(path, directory) from error
    except Exception as error:  # the library raises plain Exception for any damage
        raise CorpusError.at(
            "corpus.tokenizer.path", path, f"not a Hugging Face tokenizer: {error}"
        ) from error
    beside = {
        name: text
        for name in ("tokenizer_config.json", *_COPIED)
        if (text := _text(directory, name))
    }
    _join_templates(directory, beside)
    eos = _end_of_text(config, tokenizer, beside)
    return LoadedTokenizer(tokenizer, "pretrained", eos, beside)


def _join_templates(directory: str, beside: dict[str, str]) -> None:
    """Put a second chat template, for tools, into the settings beside the first one."""
    tool_use = _text(directory, _TOOL_USE)
    if tool_use is None:
        return
    # By name in the settings, where transformers looks as well: copies of a tokenizer have no
    # directories in them.
    settings = parse_json(beside.get("tokenizer_config.json", "{}"))
    templates = [{"name": "tool_use", "template": tool_use}]
    default = beside.pop("chat_template.jinja", None)
    if default is not None:
        templates.insert(0, {"name": "default", "template": default})
    beside["tokenizer_config.json"] = json.dumps({**settings, "chat_template": templates}, indent=2)


def download_tokenizer(repo: HubRepo) -> Path:
    """Return a local directory with the tokenizer of the Hub's repository; its name is the commit.

    Raises:
        CorpusError: If the repository has no tokenizer.json.
        StorageError: If it cannot be downloaded.
    """
    path = fetch_file(repo, "tokenizer.json")
    if path is None:
        raise CorpusError.at(
            "corpus.tokenizer",
            repo.name,
            "this repository of the Hub has no tokenizer.json",
            fix=_conversion(repo.name),
        )
    # All of the commit that the first file is of, though a branch may move meanwhile.
    at = dataclasses.replace(repo, revision=path.parent.name)
    for name in ("tokenizer_config.json", *_COPIED, _TOOL_USE):
        fetch_file(at, name, optional=True)
    return path.parent


def _text(directory: str, name: str) -> str | None:
    try:
        return files.read_bytes(files.join(directory, name)).decode()
    except (OSError, UnicodeDecodeError):
        return None


def _no_tokenizer(path: str, directory: str) -> CorpusError:
    names = files.list_directory(directory) if files.exists(directory) else []
    return CorpusError.at(
        "corpus.tokenizer.path",
        path,
        "no such tokenizer",
        allowed=f"{directory} holds {', '.join(names)}"
        if names
        else f"{directory} does not exist or is empty",
        fix=f"a tokenizer.json is needed. {_conversion(directory, names)}",
    )


def _conversion(path: str, names: Collection[str] | None = None) -> str:
    """Return how a tokenizer without a tokenizer.json becomes one that has it.

    Args:
        path: Its directory, or its name on the Hub.
        names: The files in it; None if they are not known.
    """
    name = path.rstrip("/").rpartition("/")[2] or "tokenizer"
    code = (
        "from transformers import AutoTokenizer as T; "
        f"T.from_pretrained({path!r}).save_pretrained({name + '-fast'!r})"
    )
    command = f'python -c "{code}"'
    # The library that reads the file, of SentencePiece or of tiktoken; it is not one of ours.
    if names is None or any(file.endswith(".model") for file in names):
        command = f"pip install sentencepiece protobuf tiktoken && {command}"
    write = f"Write one by: {command}, and name {name}-fast as corpus.tokenizer"
    vocabulary = {"vocab.json", "vocab.txt"} & set(names or ())
    if vocabulary and not {"tokenizer_config.json", "config.json"} & set(names or ()):
        # The same vocabulary gives other ids under another class, which splits texts otherwise.
        return (
            f"{min(vocabulary)} does not say how texts are split: get the tokenizer_config.json "
            f"that belongs to it first. {write}"
        )
    return write


def _end_of_text(config: PretrainedTokenizer, tokenizer: Tokenizer, beside: dict[str, str]) -> str:
    """Return the token that ends a document: the recipe's, else the directory's."""
    named = config.eos_token or _named_token("eos_token", beside)
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    if named is None:
        raise CorpusError.at(
            "corpus.tokenizer.eos_token",
            None,
            f"{config.path} does not name the token that ends a document",
            allowed=f"its special tokens are: {', '.join(special) or 'none'}",
            fix="set corpus.tokenizer.eos_token",
        )
    if tokenizer.token_to_id(named) is None:
        raise CorpusError.at(
            "corpus.tokenizer.eos_token",
            named,
            "the tokenizer has no such token",
            fix=did_you_mean(named, special),
        )
    return named


def _named_token(key: str, beside: dict[str, str]) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            document = parse_json(beside.get(name, "{}"))
        except ValueError:
            continue
        token = document.get(key) if isinstance(document, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _beginning(tokenizer: Tokenizer, eos_id: int) -> str | None:
    """Return the token that the post-processor puts before a text, if it does."""
    alone, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    # One token before the text, and nothing behind it but the end of text, which documents get from
    # us: nothing is known of longer beginnings, and [CLS] comes with [SEP].
    framed = [[*whole.ids[:1], *alone.ids, *end] for end in (list[int](), [eos_id])]
    return whole.tokens[0] if whole.ids in framed and whole.ids[:1] != alone.ids[:1] else None
