"""Conversations in files, and a corpus of them beside one of plain text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from raymix.corpus import prepare
from raymix.recipe import CorpusConfig
from raymix.store import Corpus

Chat = list[dict[str, Any]]

UNMARKED = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] "
    "{{ message['content'] | trim }}{{ ' ;' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""A template as most are: it says nothing of what is to be learned."""


def sums(count: int, seed: int = 0) -> list[Chat]:
    """Return conversations of one to three turns, some with a system message, some not ASCII."""
    drawn = random.Random(seed)
    chats = []
    for number in range(count):
        chat: Chat = [{"role": "system", "content": "Add."}] if number % 3 == 0 else []
        for _ in range(drawn.randrange(1, 4)):
            a, b = drawn.randrange(100), drawn.randrange(100)
            chat += [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": f"{a} + {b} = {a + b} ✓ {number}"},
            ]
        chats.append(chat)
    return chats


def write_chats(path: Path, chats: list[Any], key: str = "messages") -> str:
    path.write_text("".join(json.dumps({key: chat}) + "\n" for chat in chats))
    return str(path)


def chat_config(root: Path, chats: list[Any], **changes: Any) -> CorpusConfig:
    """Return the section of a corpus of conversations and of plain text, files and all."""
    lines = [f"plain text, line {number}, and nothing to answer" for number in range(200)]
    (root / "lines.txt").write_text("\n".join(lines))
    document = {
        "path": str(root / "corpus"),
        "chat_template": "chatml",
        "domains": [
            {
                "name": "chat",
                "train": write_chats(root / "chats.jsonl", chats),
                "messages_column": "messages",
            },
            {"name": "text", "train": str(root / "lines.txt"), "text_unit": "line"},
        ],
        "max_rejected": 0.5,
    }
    return CorpusConfig.model_validate(document | changes)


def chat_corpus(root: Path, chats: list[Any] | None = None, **changes: Any) -> Corpus:
    """Return that corpus, prepared."""
    config = chat_config(root, sums(120) if chats is None else chats, **changes)
    prepare(config, parallelism=0)
    return Corpus.open(config.path)
