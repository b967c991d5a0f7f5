"""The chat template of a corpus: saved beside its tokenizer, loaded once per process."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from raymix._utils.json import parse_json
from raymix.corpus.chats.messages import Conversation
from raymix.corpus.chats.special_tokens import SpecialTokens
from raymix.corpus.chats.template import (
    CHATML,
    ChatOptions,
    ChatTemplate,
    Example,
    TemplateRefused,
    options_key,
)
from raymix.errors import CorpusError, did_you_mean
from raymix.recipe import CorpusConfig
from raymix.store.remote import files

TEMPLATE = "tokenizer/chat_template.jinja"
"""Path of the template in a prepared corpus, where transformers looks for it."""

_ADVICE = "Name a Jinja file, or `chatml`"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Raised whenever one conversation becomes other tokens than before: finished parts are done again.
_VERSION = 3


def chat_options(config: CorpusConfig) -> ChatOptions:
    """Return the settings of a corpus that decide how conversations are written out."""
    return ChatOptions(
        config.system == "fold",
        datetime.date.fromisoformat(config.chat_date) if config.chat_date else None,
        drop_reasoning=config.reasoning == "drop",
        # As JSON has them, dates as texts.
        variables=json.dumps(
            config.model_dump(mode="json")["chat_template_kwargs"], sort_keys=True
        ),
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
    sources = _templates(config.path)
    if not sources:
        raise CorpusError.at(
            "corpus.chat_template",
            None,
            f"the tokenizer has no chat template, and {chats[0]!r} holds conversations",
            fix=_ADVICE,
        )
    _check_variables(config, sources)
    content = [_VERSION, sources, *options_key(chat_options(config), "\n".join(sources.values()))]
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


def _check_variables(config: CorpusConfig, sources: Mapping[str, str]) -> None:
    names = set(re.findall(r"\w+", "\n".join(sources.values())))
    for name, value in config.chat_template_kwargs.items():
        if name not in names:
            raise CorpusError.at(
                f"corpus.chat_template_kwargs.{name}",
                value,
                "the chat template has no variable of this name, so nothing would change",
                fix=did_you_mean(name, names) or "Leave it out, or take another chat template",
            )


def _templates(corpus: str) -> dict[str, str]:
    """Return the chat templates beside the tokenizer of a corpus, by name.

    They are `default`, and `tool_use` where the tokenizer has one of this name; none without a
    template.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return {"default": files.read_bytes(files.join(corpus, TEMPLATE)).decode()}
    template = _settings(corpus).get("chat_template")
    named: dict[str, object] = {"default": template}
    if isinstance(template, list):
        entries = [each for each in template if isinstance(each, dict)]
        named = {str(each.get("name")): each.get("template") for each in entries}
    sources = ((name, named.get(name)) for name in ("default", "tool_use"))
    return {name: source for name, source in sources if isinstance(source, str)}


def _settings(corpus: str) -> dict[str, Any]:
    try:
        settings = parse_json(
            files.read_bytes(files.join(corpus, "tokenizer/tokenizer_config.json"))
        )
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


class NamedTemplates:
    """Chat templates by name: `tool_use` is for conversations that offer tools, as in transformers.

    Args of the constructor:
        templates: `default`, `tool_use`, or both.
    """

    def __init__(self, templates: Mapping[str, ChatTemplate]) -> None:
        self._templates = templates

    def examples(
        self, chat: Conversation, special_tokens: SpecialTokens | None = None
    ) -> list[Example]:
        """Return the texts of a conversation; see `ChatTemplate.examples`.

        Raises:
            TemplateRefused: If there is no template for it, or that does not take it.
        """
        template = self._templates.get("tool_use") if chat.tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise TemplateRefused("the tokenizer has a template for tools alone (tool_use)")
        return template.examples(chat, special_tokens)


@functools.lru_cache(maxsize=2)
def saved_template(corpus: str, name: str, options: ChatOptions) -> NamedTemplates:
    """Return the chat templates of a corpus, loaded once per process.

    Args:
        corpus: The directory.
        name: What `save_template` returned.
        options: How conversations are written out.

    Raises:
        CorpusError: If it is not there any more.
    """
    sources = _templates(corpus)
    if not sources:
        raise CorpusError.at(
            "corpus.path", corpus, f"the chat template {name} is gone", fix="Prepare it again"
        )
    settings, special = _settings(corpus), dict[str, str]()
    for key in _SPECIAL:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[key] = token
    return NamedTemplates(
        {each: ChatTemplate(source, special, options) for each, source in sources.items()}
    )
