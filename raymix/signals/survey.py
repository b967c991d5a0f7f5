"""Survey of a model: which modules must run again, found in forward passes before the first one.

A pass of its own shows each use of a parameter that cannot be split. Whether the others are split
as the shapes say is tested by another pass in which one row has other tokens: the inputs of a
parameter may differ only in the vectors of that row. A model that sorts or mixes the tokens of all
rows is found so.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raymix._utils.sharded import is_fsdp_module
from raymix.signals.capture import Capture, unsupported_error
from raymix.signals.layout import Split
from raymix.signals.locality import LocalityTest, with_first_row_changed
from raymix.signals.parameters import ParameterNames, is_parameter, reached_parameters
from raymix.signals.replay import can_replay, take_tensors

Plan = Mapping[str, frozenset[str]]
"""Names of the parameters measured by running a module again, by the module's name."""

# Each round finds what the one before hid; real models need two.
_MAX_ROUNDS = 12
_LOG = logging.getLogger("raymix.signals")


@dataclass(slots=True)
class _ModuleCall:
    """A module that is running."""

    name: str
    module: nn.Module
    arguments: Any
    replayed: frozenset[str]
    """Parameters for which it runs again, by the rounds before."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """Reasons, by the name of the parameter."""


class Survey:
    """Finds the innermost module to run again, for each use of a parameter that cannot be split."""

    def __init__(
        self,
        model: nn.Module,
        names: ParameterNames,
        new_capture: Callable[[], Capture],
        arguments: inspect.BoundArguments,
    ) -> None:
        """Survey `model`, called with `arguments`; `new_capture` returns a capture that has begun.

        The first argument has the tokens.
        """
        self._model, self._names = model, names
        self._arguments = arguments
        self._new_capture = new_capture
        self._capture = new_capture()
        self._plan: dict[str, frozenset[str]] = {}
        self._reasons: dict[str, str] = {}
        self._bypassed: dict[str, str] = {}
        self._running: list[_ModuleCall] = []

    def run(self) -> Plan:
        """Return the plan.

        Raises:
            TrainingError: If no module can run again for some parameter.
        """
        tokens_key, tokens_BL = next(iter(self._arguments.arguments.items()))
        devices = [tokens_BL.device] if tokens_BL.is_cuda else []
        for _ in range(_MAX_ROUNDS):
            before = dict(self._plan)
            locality = LocalityTest()
            # The model's own pass must draw the same dropout as without a survey.
            with torch.random.fork_rng(devices), torch.enable_grad():
                self._round(locality.record)
            if self._plan != before or self._bypassed:
                continue
            locality.start_comparison()
            self._arguments.arguments[tokens_key] = with_first_row_changed(tokens_BL)
            slot = self._capture.gram.layout.slot_of_row(0)
            with torch.random.fork_rng(devices), torch.enable_grad():
                self._round(partial(locality.unchanged_elsewhere, slot=slot))
            self._arguments.arguments[tokens_key] = tokens_BL
            if self._plan == before:
                self._notify()
                return self._plan
        raise unsupported_error(sorted(self._reasons), "no module can run again for it")

    def _round(self, inspect_inputs: Callable[[str, Tensor, Split], bool]) -> None:
        """Run the model and take what it shows into the plan."""
        args, kwargs = self._arguments.args, self._arguments.kwargs
        hidden = {name for names in self._plan.values() for name in names}
        self._capture = self._new_capture()
        self._capture.refuse = self._note
        self._capture.inspect = inspect_inputs
        with self._hooks(), self._capture:
            self._enter("", self._model, args, kwargs)
            result = self._model.forward(*args, **kwargs)
            self._capture.close_forward()
            self._leave(result)
        outs: list[Tensor] = []
        take_tensors(result, outs)
        reached = reached_parameters(outs)
        bypassing = [self._names.name(parameter) for parameter in reached]
        self._names.check_known(reached)
        # Of what no module runs again for yet: first the owner, then the modules around it.
        planned = {name for names in self._plan.values() for name in names} - hidden
        self._bypassed = {
            name: self._bypassed.get(name, name).rpartition(".")[0]
            for name in bypassing
            if name is not None and name not in planned
        }

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name, module in self._model.named_modules():
                if name:
                    before, after = self._module_hooks(name)
                    handles += [
                        module.register_forward_pre_hook(before, with_kwargs=True),
                        module.register_forward_hook(after),
                    ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _module_hooks(self, name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._enter(name, module, args, kwargs)

        def after(module: nn.Module, args: Any, result: Any) -> None:
            self._leave(result)

        return before, after

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        replayed = self._capture.begin_replayed(self._plan.get(name, frozenset()))
        self._set_requires_grad(replayed, requires_grad=False)
        self._running.append(_ModuleCall(name, module, (args, kwargs), replayed))

    def _leave(self, result: Any) -> None:
        call = self._running.pop()
        self._capture.end_replayed(call.replayed)
        self._set_requires_grad(call.replayed, requires_grad=True)
        for name, owner in self._bypassed.items():
            if owner == call.name:
                call.unsupported[name] = "an operation uses it that no mode of torch intercepts"
        if not call.unsupported:
            return
        # FSDP2's hooks of an inner module would gather and free parameters out of turn.
        sharded = any(is_fsdp_module(module) for module in call.module.modules())
        if not sharded and can_replay(self._capture.gram.layout, call.arguments, result):
            names = self._plan.get(call.name, frozenset())
            self._plan[call.name] = names | frozenset(call.unsupported)
            self._reasons.update(call.unsupported)
        elif self._running:
            self._running[-1].unsupported.update(call.unsupported)
        else:
            name, reason = next(iter(call.unsupported.items()))
            problem = "only a module sharded by FSDP2" if sharded else "no module that sees rows"
            raise unsupported_error([name], f"{reason}, and {problem} could run again for it")

    def _set_requires_grad(self, names: frozenset[str], *, requires_grad: bool) -> None:
        """Hide or show parameters: what is left in the graph then was not intercepted."""
        # The capture would change a detached copy.
        with self._capture.paused():
            for name in names:
                parameter = self._model.get_parameter(name)
                if is_parameter(parameter):
                    parameter.requires_grad_(requires_grad)

    def _note(self, names: Sequence[str], reason: str) -> None:
        self._running[-1].unsupported.update(dict.fromkeys(names, reason))

    def _notify(self) -> None:
        if not self._reasons:
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            _LOG.warning("%s", notice(self._reasons))


def notice(names: Sequence[str] | Mapping[str, str]) -> str:
    """Return the line that says which parameters are measured by backward passes of their own."""
    counts: dict[str, int] = {}
    for name in names:
        # One entry for all layers.
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    listed = ", ".join(f"{pattern} ({count})" for pattern, count in sorted(counts.items()))
    return f"gradient probe: one backward pass of their module per piece for {listed}"
