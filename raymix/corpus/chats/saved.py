"""The chat template of a corpus: saved beside its tokenizer, loaded once per process."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from typing import Any

from raymix._utils.json import parse_json
from raymix.corpus.chats.template import CHATML, ChatOptions, ChatTemplate, options_key
from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig
from raymix.store.remote import files

TEMPLATE = "tokenizer/chat_template.jinja"
"""Path of the template in a prepared corpus, where transformers looks for it."""

_ADVICE = "Name a Jinja file, or `chatml`"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Raised whenever one conversation becomes other tokens than before: finished parts are done again.
_VERSION = 2


def chat_options(config: CorpusConfig) -> ChatOptions:
    """Return the settings of a corpus that decide how conversations are written out."""
    return ChatOptions(
        config.system == "fold",
        datetime.date.fromisoformat(config.chat_date) if config.chat_date else None,
    )


def save_template(config: CorpusConfig) -> str:
    """Return the name of a corpus' chat template, having put the recipe's there if it has one.

    The name is the hash of its text and of all that the rendering depends on beside it; it is empty
    where no domain holds conversations.

    Raises:
        CorpusError: If conversations are to be prepared and there is no template for them.
    """
    if config.chat_template is not None:
        source = CHATML if config.chat_template == "chatml" else _read(config.chat_template)
        files.atomic_write_text(files.join(config.path, TEMPLATE), source)
    chats = [domain.name for domain in config.domains if domain.messages_column]
    if not chats:
        return ""
    source = _template(config.path)
    if source is None:
        raise CorpusError.at(
            "corpus.chat_template",
            None,
            f"the tokenizer has no chat template, and {chats[0]!r} holds conversations",
            fix=_ADVICE,
        )
    content = [_VERSION, source, *options_key(chat_options(config), source)]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _read(path: str) -> str:
    try:
        return files.read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError.at(
            "corpus.chat_template",
            path,
            f"cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}",
            fix=_ADVICE,
        ) from error


def _template(corpus: str) -> str | None:
    """Return the chat template beside the tokenizer of a corpus: a file, or in its settings."""
    try:
        return files.read_bytes(files.join(corpus, TEMPLATE)).decode()
    except (OSError, UnicodeDecodeError):
        template = _settings(corpus).get("chat_template")
        if isinstance(template, list):
            # Several by name, in older tokenizers: transformers takes this one.
            named = {each.get("name"): each for each in template if isinstance(each, dict)}
            template = named.get("default", {}).get("template")
        return template if isinstance(template, str) else None


def _settings(corpus: str) -> dict[str, Any]:
    try:
        settings = parse_json(
            files.read_bytes(files.join(corpus, "tokenizer/tokenizer_config.json"))
        )
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


@functools.lru_cache(maxsize=2)
def saved_template(corpus: str, name: str, options: ChatOptions) -> ChatTemplate:
    """Return the chat template of a corpus, loaded once per process.

    Args:
        corpus: The directory.
        name: What `save_template` returned.
        options: How conversations are written out.

    Raises:
        CorpusError: If it is not there any more.
    """
    source = _template(corpus)
    if source is None:
        raise CorpusError.at(
            "corpus.path", corpus, f"the chat template {name} is gone", fix="Prepare it again"
        )
    settings, special = _settings(corpus), dict[str, str]()
    for key in _SPECIAL:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[key] = token
    return ChatTemplate(source, special, options)
