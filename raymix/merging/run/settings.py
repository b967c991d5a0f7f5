"""Method and options of each parameter: filters, gradients over layers and rules, resolved.

A "gradient" is mergekit's word for a list of values interpolated over the layers.
"""

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

# The names of layer lists in Llama, GPT-2 (h), MPT (blocks), OLMo (block) and BERT (layer).
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")

# Tables of vectors rather than maps from inputs to outputs: their singular vectors mean nothing.
_TABLES = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|\bshared\b|rotary|position")

Scope = Mapping[str, Any]
"""One `parameters` section of a merge file."""


def layer_of(name: str) -> int | None:
    """Return the index of the layer that a parameter belongs to, or None."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter is a weight matrix, or a stack of them (experts)."""
    # A matrix with a side of 1 is a vector: it has one direction, and no rows to renormalize.
    if len(shape) == 2:
        return min(shape) > 1 and not _TABLES.search(name)
    return len(shape) == 3 and "experts" in name


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """Method and options of one parameter; method None: the base's bytes."""

    method: MergeMethod | None
    options: Options | None = None


class OptionResolver:
    """Resolves a merge file to the method and the options of each parameter."""

    def __init__(
        self,
        file: MergeFile,
        members: Callable[[MergeMethod], Sequence[Scope]],
        n_layers: int,
    ) -> None:
        """Check the names of all parameters in the file.

        Args:
            file: The merge file.
            members: Returns the `parameters` of each model that a method merges, in order.
            n_layers: Number of layers of the model, for gradients.

        Raises:
            MergeError: For a method or an option that does not exist.
        """
        self._file, self._members, self._n_layers = file, members, n_layers
        self._default_method = get_method(file.merge_method)
        self._rule_methods = {
            index: get_method(str(rule.merge_method), f"rules.{index}.merge_method")
            for index, rule in enumerate(file.rules)
            if rule.merge_method not in (None, KEEP_BASE)
        }
        self.methods = (self._default_method, *self._rule_methods.values())
        self._check_names(self.methods)

    def resolve(self, name: str) -> MethodChoice:
        """Return the method and the options of the parameter `name`.

        Raises:
            MergeError: If a value does not fit the option.
        """
        layer = layer_of(name)
        rules = [(i, rule) for i, rule in enumerate(self._file.rules) if rule.applies(name, layer)]
        method = self._method(rules)
        if method is None:
            return MethodChoice(None)
        # In order of precedence; for options per model, the model's own section comes before them.
        scopes = [*(rule.parameters for _, rule in rules), self._file.parameters]
        values: dict[str, Any] = {}
        per_model, members = method.options.per_model(), self._members(method)
        for option in method.options.names():
            if option in per_model:
                per_task = [self._value(option, name, layer, [own, *scopes]) for own in members]
                values[option] = _fill_default(method.options, option, per_task)
            else:
                values[option] = self._value(option, name, layer, scopes)
        set_values = {key: value for key, value in values.items() if value is not None}
        try:
            return MethodChoice(method, method.options.model_validate(set_values))
        except ValidationError as error:
            messages = translate(error.errors(include_url=False), method.options)
            raise MergeError(
                *(f"parameters.{m} This is its value for {name}." for m in messages)
            ) from None

    def _method(self, rules: Sequence[tuple[int, ParameterRule]]) -> MergeMethod | None:
        """Return the method of the first rule that sets one; None: the base's bytes."""
        for index, rule in rules:
            if rule.merge_method == KEEP_BASE:
                return None
            if rule.merge_method is not None:
                return self._rule_methods[index]
        return self._default_method

    def _value(self, option: str, name: str, layer: int | None, scopes: Iterable[Scope]) -> Any:
        """Return an option's value from the first scope that sets it for this parameter."""
        for scope in scopes:
            if option in scope:
                value = _evaluate(scope[option], name, self._position(layer), option)
                # A list of filters, none of which matches, leaves the option to the next scope.
                if value is not None:
                    return value
        return None

    def _position(self, layer: int | None) -> float:
        """Return the relative depth of a layer, 0 to 1; 0 outside layers, as in mergekit."""
        if layer is None:
            return 0.0
        return layer / (self._n_layers - 1) if self._n_layers > 1 else 1.0

    def _check_names(self, methods: Sequence[MergeMethod]) -> None:
        """Raise MergeError for keys that are an option of none of the methods."""
        # Known to any method of the file: a rule's method may have options that others lack.
        known = {name for method in methods for name in method.options.names()}
        file = self._file
        scopes: list[tuple[str, Scope]] = [("parameters", file.parameters)]
        scopes += [(f"rules.{i}.parameters", rule.parameters) for i, rule in enumerate(file.rules)]
        scopes += [(f"models.{i}.parameters", e.parameters) for i, e in enumerate(file.models)]
        method_names = ", ".join(sorted({method.name for method in methods}))
        problems = [
            format_problem(
                f"{path}.{key}",
                value,
                f"no option of {method_names}",
                allowed=f"Known: {', '.join(sorted(known))}",
                fix=did_you_mean(key, known),
            )
            for path, scope in scopes
            for key, value in scope.items()
            if key not in known
        ]
        if problems:
            raise MergeError(*problems)


def check_options(file: MergeFile) -> None:
    """Check the methods and options of a merge file whose models do not exist yet.

    Raises:
        MergeError: With one message per fault.
    """
    resolver = OptionResolver(file, lambda method: [entry.parameters for entry in file.models], 1)
    # Any parameter's name does: it validates the values that do not depend on one.
    resolver.resolve("model.layers.0.weight")
    for method in resolver.methods:
        count = len(file.models)
        if count < method.min_models or (
            method.max_models is not None and count > method.max_models
        ):
            raise MergeError.at("models", count, f"{method.name} does not merge so many models")


def _fill_default(options: type[Options], option: str, values: list[Any]) -> list[Any] | None:
    """Return one value per model, the default where it is None; None if all are None."""
    if all(value is None for value in values):
        return None
    # Options are stored under Python names (`lambda_`), the file has their aliases (`lambda`).
    fields = options.model_fields.items()
    default = next(f.default for name, f in fields if option in (name, f.alias))[0]
    return [default if value is None else value for value in values]


def _evaluate(setting: Any, name: str, t: float, option: str) -> Any:
    """Return the value of a setting for a parameter at relative depth `t`; None: not set."""
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
                return _evaluate(item["value"], name, t, option)
        return None
    return _interpolate(setting, t, option)


def _interpolate(values: list[Any], t: float, option: str) -> Any:
    """Return the value of a gradient at `t`: linear between numbers, else the value before `t`."""
    position = t * (len(values) - 1)
    low = int(position)
    # bool is a subclass of int; flags are not interpolated.
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers:
        if any(isinstance(value, (list, dict)) for value in values):
            raise MergeError.at(
                f"parameters.{option}", values, "a list over the layers must hold plain values"
            )
        return values[low]
    high = min(len(values) - 1, low + 1)
    fraction = position - low
    return (1 - fraction) * values[low] + fraction * values[high]
