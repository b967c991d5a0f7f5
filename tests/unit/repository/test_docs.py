"""The documentation says what is: its commands parse, its recipes validate, its names exist."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from raymix.jobs.submission import COMMANDS as JOB_COMMANDS
from raymix.merging.registry import get_method, known_methods
from raymix.mixers import known_mixers
from raymix.recipe import Recipe, load_recipe
from raymix.schedule.base import known_planners
from tests.support.commands import make_targets, parse, raymix_lines
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if path.name != "recipes.md"
         and "_build" not in path.parts]  # fmt: skip
NAMES = [str(path.relative_to(DOCS)) for path in PAGES]
# Lines that are typed into other programs, by their first word.
OTHERS = {
    "docker",
    "kubectl",
    "ray",
    "sbatch",
    "cluster/local.sh",
    "export",
    "make",
    "pip",
}


def blocks(path: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def typed() -> Iterator[tuple[str, str]]:
    """Yield every line of the pages that is typed into a shell, and its page."""
    for path, name in zip(PAGES, NAMES, strict=True):
        for block in blocks(path, "bash"):
            for line in block.splitlines():
                if line.strip():
                    yield name, line


@pytest.mark.parametrize(("page", "line"), list(typed()))
def test_what_is_typed_is_a_command(page: str, line: str) -> None:
    commands = list(raymix_lines(line))
    if commands:
        parameters = parse(commands[0])
        if commands[0].startswith("raymix submit"):
            assert parameters["name"] in JOB_COMMANDS
        return
    assert line.split()[0] in OTHERS, f"{page}: {line}"
    if line.startswith("make "):
        assert line.split()[1] in make_targets()
    for named in re.findall(r"cluster/[\w./-]+\w", line):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_recipes_validate_and_take_the_overrides_shown(page: Path, tmp_path: Path) -> None:
    if page.name == "extending.md":  # its mixer is installed and trained with in tests/e2e
        return
    for block in blocks(page, "yaml"):
        if "merge_method" in block:  # not a recipe of a run: see the test of its options
            continue
        (tmp_path / "my.yaml").write_text(block)
        assert load_recipe(tmp_path / "my.yaml").name == "my"
    if page.name == "quickstart.md":
        for line in raymix_lines("\n".join(blocks(page, "bash"))):
            changes = [word for word in line.split() if re.match(r"[\w.]+=", word)]
            if "my.yaml" in line:
                load_recipe(tmp_path / "my.yaml", changes)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for named in re.findall(r"`((?:raymix|cluster|docs|pipelines|tests)/[\w./-]+)`", text):
        assert (ROOT / named).exists(), named
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        linked = (page.parent / link).resolve()
        # docs/recipes.md is made by docs/conf.py: a fresh clone has none.
        assert linked.exists() or linked == DOCS / "recipes.md", link
    for name in re.findall(r"make (bench-\w+)", text):
        assert importlib.util.find_spec(f"tests.benchmarks.{name.removeprefix('bench-')}")


def names_in_table(page: str, section: str) -> set[str]:
    """Return the names in the first column of the table of a section."""
    text = (DOCS / "systems" / page).read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", text, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_planners_methods_and_mixers_that_are_named_exist() -> None:
    assert names_in_table("schedule.md", "Planners") == set(known_planners())
    assert names_in_table("mixers.md", "Peers") < set(known_mixers())
    methods = set(known_methods()) - {"dare"}
    assert names_in_table("merge.md", "Peers") | {"drm"} == methods
    assert names_in_table("merge.md", "Options") == methods


def test_options_of_merge_methods_have_the_documented_defaults() -> None:
    text = (DOCS / "systems" / "merge.md").read_text()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (`\w+` .*) \|$", text, flags=re.MULTILINE)
    assert rows
    for names, options in rows:
        for method in re.findall(r"`(\w+)`", names):
            fields = get_method(method).options.model_fields
            defaults = {field.alias or name: field.default for name, field in fields.items()}
            for option, documented in re.findall(r"`(\w+)` `?([\w.-]+)`?(?:, |$)", options):
                default = defaults[option]
                default = default[0] if isinstance(default, tuple) else default
                assert default == yaml.safe_load(documented.replace("1e-5", "0.00001"))


def test_the_field_reference_has_every_field() -> None:
    spec = importlib.util.spec_from_file_location("recipe_reference", DOCS / "recipe_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.reference()

    def models(of: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield of
        for field in of.model_fields.values():
            for inner in re.findall(r"raymix\.recipe\.[\w.]+", str(field.annotation)):
                home, _, name = inner.rpartition(".")
                candidate = getattr(sys.modules.get(home), name, None)
                if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                    yield from models(candidate)

    every = list(dict.fromkeys(models(Recipe)))
    assert len(every) > 25
    for model in every:
        for name, field in model.model_fields.items():
            assert f"| `{name}` |" in text
            assert (field.description or "").split("\n")[0].replace("|", "\\|")[:60] in text
