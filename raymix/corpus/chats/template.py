"""Rendering: conversations as the text that a model sees, with the spans that are in the loss.

Templates are Jinja, rendered by transformers as it does for inference. The loss covers the
answers of the assistant up to the end of its turn, found in one of two ways: where the template
marks them (`{% generation %}`), or as the text that a turn adds to the prompt before it. A template
that writes a turn differently once there are later ones (most drop its reasoning) gives several
texts: to learn an answer behind another prompt than inference gives would teach something else.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from raymix._utils.json import parse_json
from raymix.corpus.chats.messages import (
    ANSWERS,
    ROLES,
    BadConversation,
    Conversation,
    Message,
    content_of,
    folded,
    written_forms,
)
from raymix.corpus.chats.special_tokens import Span, SpecialTokens, without_guard
from raymix.recipe.corpus import CLOCK_DATE

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

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
# transformers compiles a template once per process, and what notes its marks is part of that.
_RENDERING = threading.Lock()
# Variables by which templates are told, in the prompt, that the answer has no reasoning.
_REASONING_SWITCHES = ("enable_thinking", "thinking")
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_OPENED = re.compile(r"<think>\s*$")
_DIRECTIVES = "aAbBcdDeFfGgHhIjklmMnpPrRsSTtuUVwWxXyYzZ"
# So many characters of a content are looked for in the text; templates may change its end.
_COMPARED_CHARACTERS = 16


class TemplateRefused(ValueError):
    """A template does not take a conversation; says why."""


class _Unrendered(TemplateRefused):
    """A template stopped at an error of its own."""


@dataclass(frozen=True, slots=True)
class Example:
    """A text to learn from: `spans` are the ranges of its characters in the loss.

    Special tokens that a content spelled out have the character `guard` in them, see
    `raymix.corpus.chats.special_tokens`; it is empty where there are none.
    """

    text: str
    spans: tuple[Span, ...]
    guard: str = ""

    @property
    def plain(self) -> str:
        """Return the text as it reads."""
        return without_guard(self.text, self.guard)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Settings of a recipe that decide how conversations are written out."""

    fold_system: bool = False
    date: datetime.date | None = None
    drop_reasoning: bool = False
    variables: str = "{}"
    """Further variables of the template, as JSON: options are keys of a cache."""


class ChatTemplate:
    """Renders conversations, and says which characters are answers."""

    def __init__(
        self, source: str, special: dict[str, str], options: ChatOptions | None = None
    ) -> None:
        """Use the Jinja text `source`; `special` are the tokens that it may name."""
        self._options = options or ChatOptions()
        self._names = {
            name for name in re.findall(r"\w+", source) if name in (*_REASONING_SWITCHES, "tools")
        }
        self._source = source
        self._variables: dict[str, Any] = dict(special)
        self._marked = bool(_MARKED.search(source))
        date = self._options.date
        if date is not None:
            self._variables["date_string"] = date.strftime("%d %b %Y")
        given: dict[str, Any] = parse_json(self._options.variables)
        self._variables |= given
        # A switch that the recipe sets is the same in every prompt.
        self._names -= given.keys()
        if "strftime_now" in source:
            self._source = _clock(date or CLOCK_DATE) + source

    def examples(
        self, chat: Conversation, special_tokens: SpecialTokens | None = None
    ) -> list[Example]:
        """Return the texts of a conversation, each with its answers, rising and apart.

        It is one text, in which all answers are learned, unless the template rewrites earlier
        turns; then each answer that is not in the text of the next has one of its own, which ends
        with it. Without any answer to learn there is one text without spans.

        Args:
            chat: The conversation.
            special_tokens: Tokens that are guarded where a content spells them out; None where
                they are to be read as tokens.

        Raises:
            TemplateRefused: If the template does not take the conversation or leaves out part of
                it, or its answers cannot be told from the rest.
        """
        guard = ""
        try:
            chat = _without_reasoning(chat) if self._options.drop_reasoning else chat
            chat = folded(chat) if self._options.fold_system else chat
        except BadConversation as error:
            raise TemplateRefused(str(error)) from error
        self._check_roles(chat)
        if special_tokens is not None:
            chat, guard = special_tokens.guarded(chat)
        problems: list[TemplateRefused] = []
        for form in written_forms(chat):
            try:
                return [Example(text, tuple(spans), guard) for text, spans in self._examples(form)]
            except TemplateRefused as error:
                problems.append(error)
        # A form that could be rendered says more than the error of one that could not.
        raise next((each for each in problems if not isinstance(each, _Unrendered)), problems[0])

    def _check_roles(self, chat: Conversation) -> None:
        for message in chat.messages:
            role = message["role"]
            if role not in ROLES and not re.search(f"(['\"]){re.escape(role)}\\1", self._source):
                raise TemplateRefused(
                    f"it knows no role {role[:40]!r} (known are {', '.join(ROLES)}, the names of "
                    f"ShareGPT, and those that it names itself)"
                )

    def _examples(self, chat: Conversation) -> list[tuple[str, list[Span]]]:
        messages = list(chat.messages)
        answers = [n for n, message in enumerate(messages) if message["role"] == ANSWERS]
        if self._marked:
            # Marks are exact and cost one rendering; without them each answer costs two.
            text, spans = self._jinja(messages, chat, marks=True)
            _check_complete(chat, text, len(messages))
            if answers and answers[-1] not in chat.unlearned:
                # Earlier reasoning may well be left out, and what is not learned may be.
                _check_reasoning(messages[answers[-1]], text)
            if chat.unlearned and len(spans) != len(answers):
                raise TemplateRefused("it does not mark each answer once, so none can be left out")
            chosen = [s for n, s in zip(answers, spans, strict=False) if n not in chat.unlearned]
            return [(text, joined(chosen if chat.unlearned else spans))]
        examples: list[tuple[str, list[Span]]] = []
        ends: list[int] = []
        for number in answers:
            if number in chat.unlearned:
                continue
            answered, span = self._answer(messages, number, chat)
            if examples and answered.startswith(examples[-1][0]):
                examples[-1], ends[-1] = (answered, [*examples[-1][1], span]), number + 1
            else:
                examples.append((answered, [span]))
                ends.append(number + 1)
        text = self._jinja(messages, chat)[0]
        if examples and text.startswith(examples[-1][0]):
            examples[-1], ends[-1] = (text, examples[-1][1]), len(messages)
        for (example, _), end in zip(examples, ends, strict=True):
            _check_complete(chat, example, end)
        return [(text, joined(spans)) for text, spans in examples or [(text, [])]]

    def _answer(self, messages: list[Message], number: int, chat: Conversation) -> tuple[str, Span]:
        """Return the text up to an answer, and the answer without what its prompt supplies."""
        answered = self._jinja(messages[: number + 1], chat)[0]
        prompt = self._jinja(messages[:number], chat, prompt=True)[0]
        prompts = [prompt]
        # An answer without reasoning may stand behind a prompt that closes it: the longest that
        # fits is what inference supplies.
        for switch in _REASONING_SWITCHES:
            if switch in self._names:
                off = {switch: False}
                prompts.append(self._jinja(messages[:number], chat, prompt=True, **off)[0])
        fitting = [len(each) for each in prompts if answered.startswith(each)]
        if fitting:
            _check_reasoning(messages[number], answered)
            return answered, (max(fitting), len(answered))
        return _reasoned(prompt, answered, messages[number]) or _behind(
            prompt, answered, messages[max(number - 1, 0) : number + 1]
        )

    def _jinja(
        self,
        messages: list[Message],
        chat: Conversation,
        *,
        prompt: bool = False,
        marks: bool = False,
        **switches: bool,
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            options: dict[str, Any] = {
                "chat_template": self._source,
                "add_generation_prompt": prompt,
                "return_assistant_tokens_mask": marks,
                "tools": list(chat.tools) or None,
                **self._variables,
                **switches,
            }
            with _RENDERING:
                rendered: Any = render_jinja_template(conversations=[messages], **options)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise _Unrendered(_advised(error, messages)) from error
        (text,), marked = rendered
        return text, [(int(first), int(last)) for first, last in marked[0]] if marks else []


def _clock(date: datetime.date) -> str:
    """Return Jinja that puts a fixed date in place of today's: the same bytes every day."""
    at = datetime.datetime.combine(date, datetime.time())
    directives = [sign + letter for sign in ("%-", "%") for letter in _DIRECTIVES]
    replaced = "".join(f"|replace('{name}', {at.strftime(name)!r})" for name in directives)
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro -%}"


def _advised(error: Exception, messages: list[Message]) -> str:
    """Return a template's reason, and the way out of the commonest ones."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    roles = [message["role"] for message in messages]
    if not messages:
        return "it does not take a conversation that begins with an answer"
    if "system" in reason.lower() and "system" in roles:
        return f"{reason} (corpus.system: fold puts it before the user's turn)"
    if any(first == second for first, second in pairwise(roles)):
        return f"{reason} (two turns of one role in a row: join them in the source)"
    return reason


def _check_complete(chat: Conversation, text: str, end: int) -> None:
    """Check that a text has all that the model must see of the first `end` messages.

    Templates pass over what they do not know.
    """
    for tool in chat.tools:
        name = tool.get("function", tool)
        name = name.get("name") if isinstance(name, dict) else None
        if isinstance(name, str) and name not in text:
            raise TemplateRefused(
                "it does not write out the tools (take a template that does, or set tools_column: "
                "false)"
            )
    for message in chat.messages[:end]:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if function["name"] not in text:
                raise TemplateRefused("it does not write out calls of tools")
            # Python's form of a mapping is no JSON.
            arguments = function["arguments"]
            if arguments and not isinstance(arguments, str) and str(arguments) in text:
                raise TemplateRefused("it writes the arguments of calls in Python's form, not JSON")
        if message["role"] != ANSWERS and not _contains(text, content_of(message)):
            raise TemplateRefused(f"it leaves out a turn of role {message['role']!r}")


def _check_reasoning(answer: Message, text: str) -> None:
    """Check that a text has the reasoning that is given beside the content of its last answer."""
    for name in _REASONING_FIELDS:
        reasoning = answer.get(name)
        if isinstance(reasoning, str) and not _contains(text, reasoning):
            raise TemplateRefused(
                f"it leaves out the {name} of an answer, which would not be learned (take a "
                f"template that writes it, or set corpus.reasoning: drop)"
            )


def _without_reasoning(chat: Conversation) -> Conversation:
    messages = tuple(
        {key: value for key, value in message.items() if key not in _REASONING_FIELDS}
        for message in chat.messages
    )
    return replace(chat, messages=messages)


def _contains(text: str, content: str) -> bool:
    # Some templates write the results of tools as JSON.
    beginning = content.strip()[:_COMPARED_CHARACTERS].strip()
    return beginning in text or any(
        json.dumps(beginning, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)
    )


def _reasoned(prompt: str, answered: str, message: Message) -> tuple[str, Span] | None:
    """Return the text of an answer whose reasoning the prompt opens and the template leaves out.

    None where the prompt opens none.
    """
    opened = _OPENED.search(prompt)
    if opened is None or not answered.startswith(prompt[: opened.start()]):
        return None
    content = content_of(message)
    reasoning = next((message[key] for key in _REASONING_FIELDS if message.get(key)), None)
    if reasoning is None and "</think>" in content:
        reasoning, _, content = content.partition("</think>")
        reasoning = reasoning.removeprefix("<think>")
    end = answered[opened.start() :]
    if not isinstance(reasoning, str) or "</think>" in end or not _contains(end, content):
        raise TemplateRefused(
            "its prompt opens the reasoning, and the answer has none (give reasoning_content, "
            "or <think>...</think> in content, or take a template whose prompt does not)"
        )
    text = f"{prompt}{reasoning.strip()}\n</think>\n\n{end.lstrip()}"
    return text, (len(prompt), len(text))


def _behind(prompt: str, answered: str, turns: list[Message]) -> tuple[str, Span]:
    """Return the text of an answer behind its prompt, where the template writes that otherwise.

    Some put the system's turn or the tools into the last turn, and only while it is the user's.
    """
    question, answer = content_of(turns[0]), content_of(turns[-1])
    # From the last turn on both must be equal, or the answer could not be told from the rest.
    tail = prompt[prompt.rfind(question.strip()) :]
    at = answered.rfind(tail) if question.strip() in prompt and question.strip() else -1
    added = answered[at + len(tail) :]
    if at < 0 or not added or not _contains(added, answer):
        raise TemplateRefused("it writes answers otherwise than behind its own prompt")
    _check_reasoning(turns[-1], added)
    return prompt + added, (len(prompt), len(prompt) + len(added))


def joined(spans: Iterable[Span]) -> list[Span]:
    """Return the spans less empty ones, those that touch joined."""
    merged: list[Span] = []
    for first, last in spans:
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        elif first < last:
            merged.append((first, last))
    return merged


def needs_date(source: str) -> bool:
    """Return whether what a template writes depends on the date."""
    return "strftime_now" in source or "date_string" in source


def options_key(options: ChatOptions, source: str) -> Sequence[object]:
    """Return what the texts depend on beside the templates (joined) and the conversations."""
    date = str(options.date or CLOCK_DATE) if needs_date(source) else None
    return [options.fold_system, date, options.drop_reasoning, options.variables]
