"""Whether a line that a user is told to type is one: `raymix` as it is parsed, without running."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from raymix.cli.main import app
from tests.support.paths import ROOT


def group() -> Any:
    """Return the command line as it is parsed."""
    from typer.main import get_command

    return get_command(app)


def raymix_lines(text: str) -> Iterator[str]:
    """Yield the lines of `text` that type a `raymix` command, joined where they go on."""
    for line in text.replace("\\\n", " ").splitlines():
        typed = re.sub(r"^[#\s$]*", "", line)
        typed = re.sub(r"^(\w+=\S+\s+)*", "", typed)
        if re.match(r"raymix \S", typed):
            yield typed


def parse(line: str) -> dict[str, Any]:
    """Return the parameters that a line gives to its command.

    Raises:
        click.UsageError: If there is no such command or option, or an argument is missing.
    """
    words = shlex.split(line, comments=True)
    if words[-1] == "&":
        words.pop()
    every = group()
    if len(words) == 2 and words[1] in ("--help", "--version"):
        return {}
    name, command, arguments = every.resolve_command(every.make_context("raymix", []), words[1:])
    return command.make_context(name, arguments).params


def make_targets() -> set[str]:
    """Return the targets of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z%-]*):", text, flags=re.MULTILINE))
