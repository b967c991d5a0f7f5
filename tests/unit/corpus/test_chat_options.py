"""Chats: system columns, named templates, variables of templates, reasoning that is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from raymix.corpus.chats.messages import BadConversation, conversation
from raymix.corpus.chats.saved import chat_options, save_template, saved_template
from raymix.corpus.chats.template import ChatOptions, ChatTemplate, TemplateRefused
from raymix.corpus.read.chat_columns import chat_columns, chat_rows
from raymix.corpus.tokenizers.tokenizer import byte_tokenizer, load_pretrained
from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig, DomainConfig, PretrainedTokenizer

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
DEFAULT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if shout %}!{% endif %}"
)
TOOL_USE = "{% for t in tools %}[{{ t.function.name }}]{% endfor %}" + DEFAULT
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def domain(**changes: Any) -> DomainConfig:
    return DomainConfig(name="d", train=("x",), messages_column="conversations", **changes)


@pytest.mark.parametrize("system", ["Be brief.", " Be brief.\n"])
def test_a_system_column_begins_the_conversation(system: str) -> None:
    chat = conversation(TURNS, None, system)
    assert chat.messages[0] == {"role": "system", "content": system}
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    # Said twice it is said once.
    twice = conversation([{"from": "system", "value": "Be brief."}, *TURNS], None, system)
    assert len(twice.messages) == 3


@pytest.mark.parametrize("nothing", [None, "", "  \n"])
def test_no_system_turn_is_none(nothing: object) -> None:
    assert len(conversation(TURNS, None, nothing).messages) == 2


def test_a_weight_still_belongs_to_its_turn_behind_a_system_turn() -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]
    assert conversation(turns, None, "Be brief.").unlearned == {2}


@pytest.mark.parametrize(
    ("system", "turns", "wrong"),
    [
        ("x", [{"role": "system", "content": "y"}, *TURNS], "a system turn in the messages, and"),
        (7, TURNS, "system is not a text"),
        (["x"], TURNS, "system is not a text"),
    ],
)
def test_other_system_columns_are_refused(system: object, turns: list[Any], wrong: str) -> None:
    with pytest.raises(BadConversation, match=wrong):
        conversation(turns, None, system)


def test_columns_beside_the_messages() -> None:
    names = ["conversations", "tools", "system"]
    assert chat_columns(domain(), names) == ("tools", "system")
    assert chat_columns(domain(), names[:1]) == (None, None)
    assert chat_columns(domain(tools_column=False, system_column=False), names) == (None, None)
    assert chat_columns(domain(system_column="prompt"), names) == ("tools", "prompt")
    plain = DomainConfig(name="d", train=("x",))
    assert chat_columns(plain, names) == (None, None)
    rows = list(chat_rows(pa.array([TURNS, TURNS]), None, pa.array(["one", None])))
    assert rows == [(TURNS, None, "one"), (TURNS, None, None)]


def tokenizer(directory: Path, *, files: bool) -> str:
    """Write a tokenizer with two templates, as transformers does it, or in the older form."""
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<|endoftext|>")
    fast.chat_template = {"default": DEFAULT, "tool_use": TOOL_USE}
    fast.save_pretrained(directory, save_jinja_files=files)
    return str(directory)


@pytest.mark.parametrize("files", [True, False])
def test_the_template_for_tools_is_chosen_as_transformers_chooses_it(
    tmp_path: Path, *, files: bool
) -> None:
    path = tokenizer(tmp_path / "tok", files=files)
    load_pretrained(PretrainedTokenizer(path=path)).save(str(tmp_path / "corpus"))
    config = CorpusConfig(path=str(tmp_path / "corpus"), domains=(domain(),))
    name = save_template(config)
    templates = saved_template(config.path, name, chat_options(config))
    reference = PreTrainedTokenizerFast.from_pretrained(path)
    again = PreTrainedTokenizerFast.from_pretrained(f"{config.path}/tokenizer")
    for tools in (None, TOOLS):
        chat = conversation(TURNS, tools)
        (example,) = templates.examples(chat)
        messages = list(chat.messages)
        expected = reference.apply_chat_template(messages, tools=tools, tokenize=False)
        assert example.text == expected
        assert again.apply_chat_template(messages, tools=tools, tokenize=False) == expected
    assert "[clock]" in expected


def corpus(tmp_path: Path, **changes: Any) -> CorpusConfig:
    (tmp_path / "t.jinja").write_text(DEFAULT)
    document = {"path": str(tmp_path), "chat_template": str(tmp_path / "t.jinja"), **changes}
    return CorpusConfig.model_validate(document | {"domains": (domain(),)})


def test_variables_reach_the_template_and_are_part_of_its_name(tmp_path: Path) -> None:
    names = set()
    for kwargs, end in (({}, "<assistant>a"), ({"shout": True}, "a!"), ({"shout": False}, "a")):
        config = corpus(tmp_path, chat_template_kwargs=kwargs)
        name = save_template(config)
        names.add(name)
        template = saved_template(config.path, name, chat_options(config))
        # A mark behind every text is behind the prompt, too.
        assert template.examples(conversation(TURNS[:1]))[0].text.endswith(end[-1] if kwargs.get(
            "shout") else "q")  # fmt: skip
    assert len(names) == 3


@pytest.mark.parametrize(
    ("kwargs", "wrong"),
    [
        (
            {"shot": 1},
            r"chat_template_kwargs\.shot = 1: the chat template has no variable.*'shout'",
        ),
        ({"enable_thinking": False}, r"enable_thinking = False: the chat template has no variable"),
    ],
)
def test_a_variable_that_would_change_nothing_is_refused(
    tmp_path: Path, kwargs: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(CorpusError, match=wrong):
        save_template(corpus(tmp_path, chat_template_kwargs=kwargs))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "set for each conversation"),
        (
            {"chat_template_kwargs": {"date_string": "x"}, "chat_date": "2024-07-26"},
            "chat_date is given as well",
        ),
    ],
)
def test_variables_that_something_else_sets_are_refused(
    tmp_path: Path, changes: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(ValidationError, match=wrong):
        corpus(tmp_path, **changes)


SWITCH = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<none>{% endif %}{% endif %}"
)


def test_a_switch_of_the_recipe_is_the_same_in_every_prompt() -> None:
    chat = conversation(TURNS)
    for variables, learned in (("{}", "a;"), ('{"enable_thinking": true}', "a;")):
        (example,) = ChatTemplate(SWITCH, {}, ChatOptions(variables=variables)).examples(chat)
        assert [example.text[first:last] for first, last in example.spans] == [learned]
    # Where inference closes the reasoning in the prompt, an answer does not stand behind it.
    with pytest.raises(TemplateRefused, match="its own prompt"):
        ChatTemplate(SWITCH, {}, ChatOptions(variables='{"enable_thinking": false}')).examples(chat)


THOUGHT = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "reasoning_content": "because"},
]
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [DEFAULT, MARKED])
def test_reasoning_that_would_not_be_learned_is_refused_unless_dropped(source: str) -> None:
    with pytest.raises(TemplateRefused, match=r"not be learned.*corpus\.reasoning: drop"):
        ChatTemplate(source, {}).examples(conversation(THOUGHT))
    (example,) = ChatTemplate(source, {}, ChatOptions(drop_reasoning=True)).examples(
        conversation(THOUGHT)
    )
    assert [example.text[first:last] for first, last in example.spans] == ["a"]
    # What is not learned in any case may be left out.
    unlearned = [THOUGHT[0], THOUGHT[1] | {"weight": 0}]
    assert ChatTemplate(source, {}).examples(conversation(unlearned))[0].spans == ()


def test_options_are_part_of_what_a_corpus_is(tmp_path: Path) -> None:
    plain = save_template(corpus(tmp_path))
    assert save_template(corpus(tmp_path, reasoning="drop")) != plain
    assert json.loads(chat_options(corpus(tmp_path)).variables) == {}
