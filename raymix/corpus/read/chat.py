"""Conversations: rendered by a chat template, with the spans that are in the loss.

Templates are Jinja, rendered by transformers as it does for inference. The loss covers the
answers of the assistant up to the end of its turn, found in one of two ways: where the template
marks them (`{% generation %}`), or as the text that a turn adds to the prompt before it.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raymix._utils.json import parse_json
from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig
from raymix.store.remote import files

Message = dict[str, Any]
Span = tuple[int, int]
"""Range of characters [first, last) of a rendered conversation."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The ChatML form, with its answers marked."""

TEMPLATE = "tokenizer/chat_template.jinja"
"""Path of the template in a prepared corpus, where transformers looks for it."""

_ADVICE = "Name a Jinja file, or `chatml`"
_ANSWERS = "assistant"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
# ShareGPT's names for the roles.
_SPEAKERS = {"human": "user", "gpt": "assistant"}
# transformers compiles a template once per process, and what notes its marks is part of that.
_RENDERING = threading.Lock()
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record of messages, each with a role and its content."""

    messages: tuple[Message, ...]


class TemplateRefused(ValueError):
    """A template does not take a conversation; says why."""


def conversation(value: object) -> Conversation | None:
    """Return a list of {role, content} (or {from, value}) as a conversation, None if it is none.

    Keys without a value are left out, as columnar files give every message every key.
    """
    if not isinstance(value, list) or not value:
        return None
    messages = [_message(item) for item in value]
    valid = tuple(message for message in messages if message is not None)
    # One bad message spoils the conversation: without it the turns would not fit.
    return Conversation(valid) if len(valid) == len(messages) else None


def _message(item: object) -> Message | None:
    if not isinstance(item, dict):
        return None
    message = {str(key): value for key, value in item.items() if value is not None}
    if "role" not in message and isinstance(message.get("from"), str):
        speaker = message.pop("from")
        message |= {"role": _SPEAKERS.get(speaker, speaker), "content": message.pop("value", None)}
    # A turn that only calls a tool has no content.
    has_content = isinstance(message.get("content"), str) or bool(message.get("tool_calls"))
    return message if has_content and isinstance(message.get("role"), str) else None


class ChatTemplate:
    """Renders conversations, and says which characters are answers."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        """Use the Jinja text `source`; `special` are the tokens that it may name."""
        self._source = source
        self._special = special
        self._marked = bool(_MARKED.search(source))

    def render(self, chat: Conversation) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the spans of its answers, rising and apart.

        Raises:
            TemplateRefused: If the template does not take it, or rewrites answers once there are
                later turns, so that they cannot be told from the rest.
        """
        messages = list(chat.messages)
        if self._marked:
            # Marks are exact and cost one rendering; without them each answer costs two.
            text, spans = self._jinja(messages, marks=True)
        else:
            text = self._jinja(messages)[0]
            spans = [
                self._answer(messages, number, text)
                for number, message in enumerate(messages)
                if message["role"] == _ANSWERS
            ]
        return text, _joined(spans)

    def _answer(self, messages: list[Message], number: int, text: str) -> Span:
        prompt = self._jinja(messages[:number], prompt=True)[0]
        prompt_and_answer = self._jinja(messages[: number + 1])[0]
        # Some templates drop the reasoning of earlier turns once a later one is rendered.
        if not prompt_and_answer.startswith(prompt) or not text.startswith(prompt_and_answer):
            raise TemplateRefused("it rewrites earlier turns and does not mark its answers")
        return len(prompt), len(prompt_and_answer)

    def _jinja(
        self, messages: list[Message], *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            options: dict[str, Any] = {
                "chat_template": self._source,
                "add_generation_prompt": prompt,
                "return_assistant_tokens_mask": marks,
                **self._special,
            }
            with _RENDERING:
                rendered: Any = render_jinja_template(conversations=[messages], **options)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise TemplateRefused(reason) from error
        (text,), marked = rendered
        return text, [(int(first), int(last)) for first, last in marked[0]] if marks else []


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Return the spans less empty ones, those that touch joined."""
    joined: list[Span] = []
    for first, last in spans:
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        elif first < last:
            joined.append((first, last))
    return joined


def save_template(config: CorpusConfig) -> str:
    """Return the name of a corpus' chat template, having put the recipe's there if it has one.

    The name is the hash of its text; it is empty where no domain holds conversations.

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
    return hashlib.blake2b(source.encode(), digest_size=16).hexdigest()


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
def saved_template(corpus: str, name: str) -> ChatTemplate:
    """Return the chat template of a corpus, loaded once per process.

    Args:
        corpus: The directory.
        name: What `save_template` returned.

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
    return ChatTemplate(source, special)
