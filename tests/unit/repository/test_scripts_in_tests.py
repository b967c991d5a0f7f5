"""Programs that tests run as text import names that exist: no linter looks into a string."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator

import pytest

from raymix.errors import TrainingError
from tests.support.paths import ROOT

_IMPORT = re.compile(r"from (raymix[\w.]*) import ([\w, ]+)")


def imports_in_strings() -> Iterator[tuple[str, str, str]]:
    """Yield (file, module, name) of every import in a string of a test."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for module, names in _IMPORT.findall(node.value):
                    for name in names.split(","):
                        yield str(path.relative_to(ROOT)), module, name.split(" as ")[0].strip()


@pytest.mark.parametrize(("file", "module", "name"), sorted(set(imports_in_strings())))
def test_an_import_in_a_program_names_what_exists(file: str, module: str, name: str) -> None:
    try:
        exists = hasattr(importlib.import_module(module), name)
    except TrainingError as error:  # of an integration whose framework is not installed
        pytest.skip(str(error))
    except ModuleNotFoundError:
        exists = False
    assert exists or importlib.util.find_spec(f"{module}.{name}"), f"{file}: {module}.{name}"
