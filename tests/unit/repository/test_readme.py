"""The README is what a new user runs: its commands exist, its recipe validates, it stays short."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from raymix.cli.main import COMMANDS
from raymix.mixers import known_mixers
from raymix.recipe import load_recipe
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
NAMES = [name for section in COMMANDS.values() for name in section]


def shell_lines() -> list[str]:
    return [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z%-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_it_is_short_and_shows_code_at_once() -> None:
    lines = README.splitlines()
    assert len(lines) < 200
    assert next(number for number, line in enumerate(lines) if line.startswith("```")) < 35


def test_its_recipe_validates(tmp_path: Path) -> None:
    text = next(text for kind, text in BLOCKS if kind == "yaml")
    (tmp_path / "my.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "my.yaml"))
    assert recipe.name == "my"
    assert [domain.name for domain in recipe.corpus.domains] == ["books", "code"]


def test_its_commands_exist() -> None:
    typed = [line for line in shell_lines() if line.startswith("raymix ")]
    used = {shlex.split(line, comments=True)[1] for line in typed}
    used |= set(re.findall(r"`raymix ([a-z]+)", README))
    assert used <= set(NAMES)
    assert set(NAMES) <= used, "a command that the README does not name"


def test_its_overrides_are_fields(tmp_path: Path) -> None:
    text = next(text for kind, text in BLOCKS if kind == "yaml")
    (tmp_path / "my.yaml").write_text(text)
    for line in shell_lines():
        changes = [word for word in shlex.split(line, comments=True) if "=" in word]
        if line.startswith("raymix ") and changes:
            document = yaml.safe_load(text)
            # The example sets weights that only its own mixer has.
            document.pop("mixer")
            (tmp_path / "my.yaml").write_text(yaml.safe_dump(document))
            load_recipe(str(tmp_path / "my.yaml"), changes)


def test_its_make_targets_exist() -> None:
    used = set(re.findall(r"\bmake ([a-z-]+)", README))
    targets = make_targets()
    for target in used:
        assert target in targets or (target.startswith("bench-") and "bench-%" in targets), target


def test_its_benchmarks_exist() -> None:
    for name in re.findall(r"make bench-([a-z]+)", README):
        assert importlib.util.find_spec(f"tests.benchmarks.{name}") is not None, name


def test_its_mixers_are_all_there_are() -> None:
    table = README.split("## Which mixer", 1)[1].split("##", 1)[0]
    named = re.findall(r"^\| `([a-z]+)`", table, flags=re.MULTILINE)
    assert sorted(named) == sorted(known_mixers())


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_its_links_lead_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
