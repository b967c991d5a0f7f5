"""YAML 1.2 as recipes use it: strict, small, and every fault with its line.

PyYAML reads YAML 1.1, in which `no` is False, `1e-4` is text, `010` is 8 and the second of two
equal keys wins. Recipes are read by the core schema of YAML 1.2 instead, equal keys are faults,
and keys are always text, so a domain may be called `no` or `2024`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from raymix.errors import RecipeError, format_problem

MAX_BYTES = 16_000_000
MAX_DEPTH = 40
MAX_NODES = 300_000

_TAG = "tag:yaml.org,2002:"
_PLAIN_SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
            r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    ),
)


if TYPE_CHECKING:
    _Base = yaml.SafeLoader
else:
    _Base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast


class _Loader(_Base):
    """Composes nodes whose tags follow the core schema of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or 1.2 would take for something else than text."""


_Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]
_Loader.yaml_implicit_resolvers = _Resolvers()
for _name, _pattern, _first in _PLAIN_SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


def parse_yaml(text: str, *, name: str, value: object) -> Any:
    """Return the plain data of one YAML document: dicts with text keys, lists, scalars.

    Args:
        text: The document.
        name: What the messages call it: `recipe`, or the path of an override.
        value: What the messages show as its value: the file's path, or the override's text.

    Raises:
        RecipeError: With line and column of every fault.
    """
    try:
        _check_depth(text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = _at(mark) if mark else ""
        said = "; ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError.at(name, value, f"not valid YAML{where}: {said}") from None
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise RecipeError.at(name, value, f"not valid YAML: {said}") from None
    except _TooDeep as error:
        raise RecipeError.at(name, value, str(error)) from None
    if node is None:
        return None
    build = _Build()
    data = build.build(node, "")
    if build.faults:
        raise RecipeError(*(format_problem(name, value, fault) for fault in build.faults))
    return data


def dump_yaml(data: Any) -> str:
    """Return `data` as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _TooDeep(Exception):
    pass


def _at(mark: Any) -> str:
    return f" at line {mark.line + 1}, column {mark.column + 1}"


def _check_depth(text: str) -> None:
    """Raise _TooDeep before the composer, which recurses, meets a document nested too deeply."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _TooDeep(f"nested more than {MAX_DEPTH} levels deep{_at(event.start_mark)}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


@dataclass(slots=True)
class _Build:
    """Turns nodes into plain data, noting faults; aliases may not make it endless or huge."""

    faults: list[str] = field(default_factory=list)
    nodes: int = 0
    open: set[int] = field(default_factory=set)

    def build(self, node: yaml.Node, path: str) -> Any:
        """Return the data of `node`, which stands at the dotted `path`."""
        self.nodes += 1
        if id(node) in self.open or self.nodes > MAX_NODES:
            if not self.faults:
                self.faults.append(f"aliases repeat without end{_at(node.start_mark)}")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, f"{path}{i}.") for i, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: yaml.Node, path: str) -> dict[str, Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(f"a key must be plain text{_at(key_node.start_mark)}")
                continue
            key = key_node.value
            line = key_node.start_mark.line + 1
            if key in data:
                self.faults.append(
                    f"key {path + key!r} is given twice, at lines {lines[key]} and {line}"
                )
            lines[key] = line
            data[key] = self.build(value_node, f"{path}{key}.")
        return data

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        text = node.value
        match node.tag.removeprefix(_TAG):
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int" if len(text) <= 400:
                return int(text)
            case "int" | "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        self.faults.append(f"{path[:-1]} has the tag {node.tag!r}, which recipes do not use")
        return None
