"""Messages in their common forms, brought to the one that chat templates take.

Read are OpenAI's form ({role, content, tool_calls}), ShareGPT's ({from, value}, with function_call
and observation), messages and arguments as JSON text, and contents in text parts. What has no
meaning here is refused by name: a dropped image or role would be a silent fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]

ANSWERS = "assistant"
"""The role whose turns are learned."""

ROLES = ("system", "developer", "user", ANSWERS, "tool")
"""Roles that every template may be given; others only where a template names them."""

# Names of the roles in ShareGPT and its kin: LLaMA-Factory, axolotl, OpenAssistant, LangChain.
_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": ANSWERS,
    "chatgpt": ANSWERS,
    "model": ANSWERS,
    "bot": ANSWERS,
    "ai": ANSWERS,
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_WEIGHTS = ("weight", "loss_mask", "train")
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record of messages, each with a role and its content, and the tools that are offered."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    unlearned: frozenset[int] = frozenset()
    """Numbers of the assistant's messages that are not to be learned."""


class BadConversation(ValueError):
    """A record that is no conversation; says why in a few words that are counted."""


def conversation(
    value: object, tools: object = None, system: object = None, *, typed: bool = False
) -> Conversation:
    """Return a conversation.

    Args:
        value: A list of messages, or its JSON.
        tools: A list of JSON schemas, or its JSON; None where the record has none.
        system: The system turn that stands beside the messages; None or an empty text for none.
        typed: Whether the record is of a columnar file, which gives every struct every key: keys
            without a value are left out at any depth there. Elsewhere a null in the arguments of a
            call was written by somebody, and stays.

    Raises:
        BadConversation: If it is none.
    """
    messages = _json_list(value, "not a list of messages")
    if not messages:
        raise BadConversation("not a list of messages")
    # JSON text in a column has no keys but its own.
    if typed and not isinstance(value, str | bytes):
        messages = _without_null(messages)
    read = [*_system(system), *(_message(item) for item in messages)]
    if len(read) > len(messages) and read[1]["role"] in _SYSTEM:
        if content_of(read[0]).strip() != content_of(read[1]).strip():
            raise BadConversation("a system turn in the messages, and another one beside them")
        read = read[1:]
    unlearned = [
        number
        for number, message in enumerate(read)
        if not _learned(message) and message["role"] == ANSWERS
    ]
    for message in read:
        for name in _WEIGHTS:
            message.pop(name, None)
    schemas = _tools(_without_null(tools) if typed else tools)
    return Conversation(tuple(read), schemas, frozenset(unlearned))


def _json_list(value: object, problem: str) -> list[Any]:
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadConversation(problem) from error
    if not isinstance(value, list):
        raise BadConversation(problem)
    return value


def _without_null(value: Any) -> Any:
    """Return a value of a columnar file less the keys that only other rows have."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _system(value: object) -> list[Message]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, str):
        raise BadConversation("system is not a text (system_column: false leaves it out)")
    return [{"role": "system", "content": value}]


def _tools(value: object) -> tuple[dict[str, Any], ...]:
    problem = "tools are not a list of schemas (tools_column: false leaves them out)"
    if value is None or (isinstance(value, str) and value.strip() in ("", "null")):
        return ()
    schemas: list[dict[str, Any]] = []
    for item in _json_list(value, problem):
        schema = _json_object(item) if isinstance(item, str) else item
        if not isinstance(schema, dict):
            raise BadConversation(problem)
        schemas.append(schema)
    return tuple(schemas)


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _message(item: object) -> Message:
    problem = "not a list of messages"
    if not isinstance(item, dict):
        raise BadConversation(problem)
    message = {str(key): value for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
        message["content"] = message.pop("value", None)
    role = message.get("role")
    if not isinstance(role, str):
        raise BadConversation(problem)
    if role in _CALLS:
        calls = _sharegpt_calls(message.pop("content", None))
        return {**message, "role": ANSWERS, "tool_calls": calls}
    message["role"] = _ALIASES.get(role, role)
    if isinstance(message.get("content"), list):
        message["content"] = _joined_parts(message["content"])
    if message.get("function_call"):
        # OpenAI's form before there were several calls.
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"])
    else:
        message.pop("tool_calls", None)
    # A turn that only calls a tool, or only thinks, has no content.
    if "content" not in message and "tool_calls" in message:
        return message
    if not isinstance(message.get("content"), str):
        raise BadConversation(problem)
    return message


def _joined_parts(parts: list[Any]) -> str:
    texts: list[str] = []
    for part in parts:
        text, kind = part, "text"
        if isinstance(part, dict):
            text = part.get("text")
            # Some name no type: then another key says what it is.
            others = [key for key, value in part.items() if key != "text" and value is not None]
            kind = part.get("type") or next(iter(others), "text")
        if kind != "text" or not isinstance(text, str):
            raise BadConversation(
                f"a content part of type {str(kind)[:40]!r}, and only text is read"
            )
        texts.append(text)
    return "".join(texts)


def _sharegpt_calls(content: object) -> list[dict[str, Any]]:
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        calls = None
    return _calls(calls if isinstance(calls, list) else [calls])


def _calls(calls: object) -> list[dict[str, Any]]:
    """Return calls as transformers' templates take them: arguments as a mapping."""
    problem = "a tool call is not of {name, arguments}"
    read: list[dict[str, Any]] = []
    for call in _json_list(calls, problem):
        call = _json_object(call) if isinstance(call, str) else call
        if not isinstance(call, dict):
            raise BadConversation(problem)
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadConversation(problem)
        arguments: Any = function.get("arguments")
        if isinstance(arguments, str):
            # JSON text would be quoted a second time by `| tojson`.
            parsed = _json_object(arguments)
            arguments = arguments if parsed is None and arguments.strip() else parsed
        if arguments is None:
            arguments = dict[str, Any]()
        function = {**function, "arguments": arguments}
        others = call if "function" in call else {}
        read.append({"type": "function", **others, "function": function})
    return read


def _learned(message: Mapping[str, Any]) -> bool:
    """Return whether the turn is learned by its own word: `weight`, `loss_mask` or `train`."""
    for name in _WEIGHTS:
        value = message.get(name, 1)
        # Fractions are known elsewhere; here a token is in the loss or not.
        if value not in (0, 1):
            raise BadConversation(f"{name} = {str(value)[:20]} of a turn is neither 0 nor 1")
        if not value:
            return False
    return True


def with_texts(chat: Conversation, function: Callable[[str], str]) -> Conversation:
    """Return a conversation with `function` applied to every text in it, keys among them."""
    messages = tuple(mapped(message, function) for message in chat.messages)
    return replace(chat, messages=messages, tools=tuple(mapped(t, function) for t in chat.tools))


def mapped(value: Any, function: Callable[[str], str]) -> Any:
    """Return a value of JSON with `function` applied to every text in it, keys among them."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {function(key): mapped(item, function) for key, item in value.items()}
    return [mapped(item, function) for item in value] if isinstance(value, list) else value


def folded(chat: Conversation) -> Conversation:
    """Return a conversation whose system turns begin the user turn that follows.

    Raises:
        BadConversation: If no user turn follows.
    """
    messages: list[Message] = []
    unlearned: set[int] = set()
    waiting: list[str] = []
    for number, message in enumerate(chat.messages):
        if message["role"] in _SYSTEM:
            waiting.append(message.get("content", ""))
            continue
        if waiting and message["role"] == "user":
            message = {**message, "content": "\n\n".join([*waiting, message["content"]])}
            waiting = []
        elif waiting:
            raise BadConversation("a system turn is not followed by one of the user")
        if number in chat.unlearned:
            unlearned.add(len(messages))
        messages.append(message)
    if waiting:
        raise BadConversation("a system turn is not followed by one of the user")
    return replace(chat, messages=tuple(messages), unlearned=frozenset(unlearned))


def written_forms(chat: Conversation) -> list[Conversation]:
    """Return a conversation in the forms that templates want it in, the usual first.

    Arguments of calls are a mapping or JSON text; a turn without content lacks it, or has None or
    no text; and contents are texts, or lists of one text part as models of images take them.
    """
    contents: list[Message] = [{}, {"content": None}, {"content": ""}]
    forms = [
        replace(chat, messages=tuple(_form(message, as_text, empty) for message in chat.messages))
        for as_text in (False, True)
        for empty in contents
    ]
    if not any("tool_calls" in message for message in chat.messages):
        forms = [chat]
    return [*forms, replace(chat, messages=tuple(map(_in_parts, chat.messages)))]


def content_of(message: Message) -> str:
    """Return the text of a message in any of its forms; empty where it has none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _in_parts(message: Message) -> Message:
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _form(message: Message, as_text: bool, empty: dict[str, Any]) -> Message:
    if "tool_calls" not in message:
        return message
    if not message.get("content"):
        message = {key: value for key, value in message.items() if key != "content"} | empty
    if not as_text:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
