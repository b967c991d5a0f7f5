"""Messages of other tools' forms, and what is no conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raymix.corpus.chats.messages import BadConversation, conversation, folded

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }


def arguments_of(value: Any, **options: Any) -> Any:
    message = conversation([USER, value], **options).messages[1]
    return message["tool_calls"][0]["function"]["arguments"]


def test_keys_of_other_rows_are_left_out_of_typed_columns_only() -> None:
    given = {"city": None, "when": {"day": 3, "hour": None}, "list": [{"a": 1, "b": None}]}
    assert arguments_of(call(given), typed=True) == {"when": {"day": 3}, "list": [{"a": 1}]}
    assert arguments_of(call(given)) == given
    # JSON text in a column is somebody's own: a null there was meant.
    assert arguments_of(call(json.dumps(given)), typed=True) == given
    assert conversation(json.dumps([USER, call(given)]), typed=True).messages[1]["tool_calls"][0][
        "function"
    ]["arguments"] == given  # fmt: skip
    assert arguments_of(call({"city": None}), typed=True) == {}


@pytest.mark.parametrize(("given", "wanted"), [
    ('{"city": "Paris"}', {"city": "Paris"}), ("", {}), (None, {}), ("{}", {}), ("Paris", "Paris"),
])  # fmt: skip
def test_arguments_as_json_text_are_a_mapping(given: Any, wanted: Any) -> None:
    assert arguments_of(call(given)) == wanted


def test_sharegpt_turns_have_the_usual_roles() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a"},
    ]
    chat = conversation(turns)
    assert [m["role"] for m in chat.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert chat.messages[2] == {"role": "assistant", "tool_calls": calls}


def test_several_calls_and_openais_older_form() -> None:
    two = {"from": "function_call",
           "value": json.dumps([{"name": "f", "arguments": "{}"}, {"name": "g"}])}  # fmt: skip
    calls = conversation([USER, two]).messages[1]["tool_calls"]
    assert [c["function"]["name"] for c in calls] == ["f", "g"]
    older = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": "{}"},
    }
    assert conversation([USER, older]).messages[1]["tool_calls"][0]["function"] == {
        "name": "f", "arguments": {},
    }  # fmt: skip


def test_json_text_and_text_parts_are_read() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}]
    chat = conversation(json.dumps([{"role": "user", "content": parts}, ANSWER]))
    assert chat.messages == ({"role": "user", "content": "a b"}, ANSWER)


@pytest.mark.parametrize(("given", "wanted"), [
    (None, 0), ("", 0), ("null", 0), ([], 0), ("[]", 0), ([{"name": "f"}], 1),
    ('[{"name": "f"}]', 1), (['{"name": "f"}'], 1),
])  # fmt: skip
def test_tools_in_all_forms(given: Any, wanted: int) -> None:
    assert conversation([USER, ANSWER], given).tools == ({"name": "f"},) * wanted


@pytest.mark.parametrize("name", ["weight", "loss_mask", "train"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_turns_of_no_weight(name: str, value: Any) -> None:
    chat = conversation([USER, {**ANSWER, name: value}, USER, {**ANSWER, name: 1}])
    assert chat.unlearned == {1}
    assert chat.messages == (USER, ANSWER, USER, ANSWER)


@pytest.mark.parametrize(("messages", "words"), [
    ("[", "not a list of messages"),
    ([], "not a list of messages"),
    ([{"role": "user"}], "not a list of messages"),
    ([{"role": 1, "content": "x"}], "not a list of messages"),
    ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "of type 'image'"),
    ([{"role": "user", "content": [{"type": "audio", "audio": {}}]}], "of type 'audio'"),
    ([{"role": "user", "content": [{"text": "see", "image": "x.png"}]}], "of type 'image'"),
    ([USER, {"from": "function_call", "value": "f(x)"}], "a tool call is not of"),
    ([USER, {"role": "assistant", "tool_calls": [{"id": 1}]}], "a tool call is not of"),
    ([USER, {**ANSWER, "weight": 0.5}], "weight = 0.5 of a turn is neither 0 nor 1"),
])  # fmt: skip
def test_what_is_no_conversation_is_named(messages: Any, words: str) -> None:
    with pytest.raises(BadConversation, match=words):
        conversation(messages)


@pytest.mark.parametrize("tools", ["{", [1], "f", {"name": "f"}])
def test_what_is_no_list_of_tools_is_named(tools: Any) -> None:
    with pytest.raises(BadConversation, match="tools are not a list of schemas"):
        conversation([USER, ANSWER], tools)


def test_folding_keeps_the_weights_of_turns() -> None:
    system = {"role": "system", "content": "s"}
    chat = folded(conversation([system, USER, {**ANSWER, "weight": 0}, USER, ANSWER]))
    assert [m["content"] for m in chat.messages] == ["s\n\nq", "a", "q", "a"]
    assert chat.unlearned == {1}
    with pytest.raises(BadConversation, match="not followed by one of the user"):
        folded(conversation([system, ANSWER]))
