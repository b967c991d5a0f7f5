"""The budgets of the house style, module by module; over budget means: split it, or say it shorter.

A longer function that reads better is better, but then the budget is argued with here, not ignored.
"""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MODULES = sorted((ROOT / "raymix").rglob("*.py"))
NAMES = [str(module.relative_to(ROOT)) for module in MODULES]

MODULE_LINES = 400
FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 12
POSITIONAL = 6
RAISES_PER_ASSERT = 4
IGNORES_PER_1000_LINES = 1
TESTS_PER_SOURCE = 0.6

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text("utf-8"))


def functions(module: Path) -> list[Function]:
    return [
        n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def length(function: Function) -> int:
    """Return the lines of a function, its docstring and decorators left out."""
    first = function.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    doc = (first.end_lineno or 0) - first.lineno + 1 if text else 0
    return (function.end_lineno or 0) - function.lineno + 1 - doc


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield the public definitions of a module, methods of public classes among them."""
    for item in node.body:
        if isinstance(item, ast.ClassDef | Function):
            if item.name.startswith("_"):
                continue
            yield prefix + item.name, item
            if isinstance(item, ast.ClassDef):
                yield from public(item, f"{prefix}{item.name}.")


def count(pattern: str, folder: str = "raymix") -> int:
    files = (ROOT / folder).rglob("*.py")
    return sum(len(re.findall(pattern, file.read_text("utf-8"))) for file in files)


def lines(folder: str) -> int:
    return sum(len(file.read_text("utf-8").splitlines()) for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_module_fits_its_budgets(module: Path) -> None:
    assert len(module.read_text("utf-8").splitlines()) <= MODULE_LINES
    for function in functions(module):
        where = f"{function.name}, line {function.lineno}"
        assert length(function) <= FUNCTION_LINES, where
        arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
        assert len([a for a in arguments if a not in ("self", "cls")]) <= POSITIONAL, where


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_everything_public_is_documented(module: Path) -> None:
    assert ast.get_docstring(tree(module))
    bare = [
        name
        for name, node in public(tree(module))
        if isinstance(node, ast.ClassDef | Function) and not ast.get_docstring(node)
    ]
    assert not bare


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_everything_is_annotated(module: Path) -> None:
    for function in functions(module):
        given = function.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        bare = [a.arg for a in every if a and not a.annotation and a.arg not in ("self", "cls")]
        assert not bare, f"{function.name}, line {function.lineno}"
        assert function.returns is not None, f"{function.name}, line {function.lineno}"


def test_the_median_function_is_short() -> None:
    every = [length(function) for module in MODULES for function in functions(module)]
    assert statistics.median(every) <= MEDIAN_FUNCTION_LINES


def test_input_is_refused_by_errors_not_asserts() -> None:
    nodes = [node for module in MODULES for node in ast.walk(tree(module))]
    raises = sum(isinstance(node, ast.Raise) for node in nodes)
    asserts = sum(isinstance(node, ast.Assert) for node in nodes)
    assert raises >= RAISES_PER_ASSERT * asserts


def test_few_ignored_types_and_no_untagged_todos() -> None:
    ignores = count(r"#\s*(type|pyrefly|pyright):\s*ignore")
    assert ignores <= IGNORES_PER_1000_LINES * lines("raymix") / 1000
    assert not count(r"(?i)#\s*(todo|fixme|xxx)\b(?!\()")


def test_there_is_enough_test_code() -> None:
    assert lines("tests") >= TESTS_PER_SOURCE * lines("raymix")


def test_no_paths_of_anyones_machine() -> None:
    # Brackets keep the pattern from finding itself.
    pattern = r"/[r]oot/|/[h]ome/(?!me\b)\w|/[w]ork/|/[t]mp/c[o]ntracts"
    assert not count(pattern)
    assert not count(pattern, "tests")


def test_a_silenced_check_says_why() -> None:
    silenced = r"(?m)#\s*(noqa|type:\s*ignore|pyrefly:\s*ignore)(:?\s*[A-Z0-9, ]+|\[[\w, -]+\])?$"
    assert not count(silenced)
    assert not count(silenced, "tests")
