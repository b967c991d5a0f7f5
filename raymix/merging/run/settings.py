"""The options of one parameter: filters, gradients over layers and rules resolved to values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from raymix.errors import MergeError, did_you_mean, format_problem
from raymix.merging.recipe import KEEP_BASE, MergeFile, ParameterRule
from raymix.merging.registry import MergeMethod, Options, get_method
from raymix.recipe.translate import translate

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")

# What is a table of vectors rather than a map from inputs to outputs.
_TABLES = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|\bshared\b|rotary|position")

Scope = Mapping[str, Any]


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a parameter belongs to, or None."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter is a weight matrix, or a stack of them (experts)."""
    if len(shape) == 2:
        return min(shape) > 1 and not _TABLES.search(name)
    return len(shape) == 3 and "experts" in name


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """How one parameter is merged; no method means the base's bytes."""

    method: MergeMethod | None
    options: Options | None = None


class Settings:
    """Answers, per parameter, which method and which options a merge file gives it."""

    def __init__(
        self,
        file: MergeFile,
        members: Callable[[MergeMethod], Sequence[Scope]],
        n_layers: int,
    ) -> None:
        """Check the names of all parameters in the file.

        Args:
            file: The merge file.
            members: Gives the `parameters` of each model that a method merges, in order.
            n_layers: Layers of the model, for gradients.

        Raises:
            MergeError: For a method or an option that does not exist.
        """
        self._file, self._members, self._n_layers = file, members, n_layers
        self._main = get_method(file.merge_method)
        named = {
            index: rule.merge_method
            for index, rule in enumerate(file.rules)
            if rule.merge_method not in (None, KEEP_BASE)
        }
        methods = {
            index: get_method(str(name), f"rules.{index}.merge_method")
            for index, name in named.items()
        }
        self._methods = methods
        self.methods = (self._main, *methods.values())
        self._check_names(self.methods)

    def choice(self, name: str) -> MethodChoice:
        """Return how the parameter called `name` is merged.

        Raises:
            MergeError: If a value does not fit the option.
        """
        layer = layer_of(name)
        rules = [(i, rule) for i, rule in enumerate(self._file.rules) if rule.applies(name, layer)]
        method = self._method(rules)
        if method is None:
            return MethodChoice(None)
        scopes = [*(rule.parameters for _, rule in rules), self._file.parameters]
        values: dict[str, Any] = {}
        per_model, members = method.options.per_model(), self._members(method)
        for option in method.options.names():
            if option in per_model:
                each = [self._value(option, name, layer, [own, *scopes]) for own in members]
                values[option] = _with_default(method.options, option, each)
            else:
                values[option] = self._value(option, name, layer, scopes)
        given = {key: value for key, value in values.items() if value is not None}
        try:
            return MethodChoice(method, method.options.model_validate(given))
        except ValidationError as error:
            messages = translate(error.errors(include_url=False), method.options)
            raise MergeError(*(f"parameters.{m} It is {name}'s." for m in messages)) from None

    def _method(self, rules: Sequence[tuple[int, ParameterRule]]) -> MergeMethod | None:
        for index, rule in rules:
            if rule.merge_method == KEEP_BASE:
                return None
            if rule.merge_method is not None:
                return self._methods[index]
        return self._main

    def _value(self, option: str, name: str, layer: int | None, scopes: Iterable[Scope]) -> Any:
        for scope in scopes:
            if option in scope:
                found = _evaluated(scope[option], name, self._position(layer), option)
                if found is not None:
                    return found
        return None

    def _position(self, layer: int | None) -> float:
        """Return where a layer lies, 0 to 1; what belongs to none lies at 0, as in mergekit."""
        if layer is None:
            return 0.0
        return layer / (self._n_layers - 1) if self._n_layers > 1 else 1.0

    def _check_names(self, methods: Sequence[MergeMethod]) -> None:
        shared = {name for method in methods for name in method.options.names()}
        places: list[tuple[str, Scope]] = [("parameters", self._file.parameters)]
        places += [(f"rules.{i}.parameters", r.parameters) for i, r in enumerate(self._file.rules)]
        places += [
            (f"models.{i}.parameters", e.parameters) for i, e in enumerate(self._file.models)
        ]
        problems = []
        for path, scope in places:
            for key, value in scope.items():
                if key not in shared:
                    names = ", ".join(sorted(shared))
                    wrong = f"no option of {', '.join(sorted({m.name for m in methods}))}"
                    near = did_you_mean(key, shared)
                    problems.append(
                        format_problem(
                            f"{path}.{key}", value, wrong, allowed=f"Known: {names}", fix=near
                        )
                    )
        if problems:
            raise MergeError(*problems)


def check_options(file: MergeFile) -> None:
    """Check the methods and options of a merge file whose models are not there yet.

    Raises:
        MergeError: With one message per fault.
    """
    settings = Settings(file, lambda method: [entry.parameters for entry in file.models], 1)
    settings.choice("model.layers.0.weight")
    for method in settings.methods:
        count = len(file.models)
        if count < method.least or (method.most is not None and count > method.most):
            raise MergeError.at(
                "models", count, f"{method.name} does not merge as many models as there are"
            )


def _with_default(options: type[Options], option: str, values: list[Any]) -> list[Any] | None:
    """Return one value per model, the default where none is given; None if none is given at all."""
    if all(value is None for value in values):
        return None
    fields = options.model_fields.items()
    default = next(f.default for name, f in fields if option in (name, f.alias))[0]
    return [default if value is None else value for value in values]


def _evaluated(setting: Any, name: str, t: float, option: str) -> Any:
    """Return what a setting says about a parameter at position `t`, or None if nothing."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if all(isinstance(item, Mapping) for item in setting):
        for item in setting:
            unknown = set(item) - {"filter", "value"}
            if unknown or "value" not in item:
                raise MergeError.at(
                    f"parameters.{option}", dict(item), "not of the form {filter: TEXT, value: ...}"
                )
            pattern = item.get("filter")
            if pattern in (None, "*") or pattern in name:
                return _evaluated(item["value"], name, t, option)
        return None
    return _interpolated(setting, t, option)


def _interpolated(values: list[Any], t: float, option: str) -> Any:
    """Return the value of a gradient at `t`: between numbers by lines, else the one before."""
    place = t * (len(values) - 1)
    low = int(place)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers:
        if any(isinstance(value, (list, dict)) for value in values):
            raise MergeError.at(
                f"parameters.{option}", values, "a list over the layers holds plain values"
            )
        return values[low]
    high = min(len(values) - 1, low + 1)
    share = place - low
    return (1 - share) * values[low] + share * values[high]
