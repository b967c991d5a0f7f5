"""Muon for the matrices of hidden layers, AdamW for all other parameters, as one optimizer.

Muon orthogonalizes the momentum of a matrix (Jordan et al. 2024). It is meant for matrices that map
hidden states to hidden states: tables that are looked up, the output head, norms, biases and
stacked experts go to AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from raymix.errors import RecipeError


class MuonWithAdamW(Optimizer):
    """Two optimizers over disjoint parameters, with one list of groups and one state.

    Groups and state are those of the two optimizers themselves, so setting a learning rate or a
    parameter's state reaches them. `load_state_dict` would replace both and is refused.
    """

    def __init__(self, muon: Optimizer | None, adamw: Optimizer | None) -> None:
        """Join the two; either may be absent where a model has no parameter for it."""
        self._parts = [part for part in (muon, adamw) if part is not None]
        # torch keeps the given dictionaries of groups and fills in missing defaults only.
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self.state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        for part in self._parts:
            part.state = self.state

    # The signature of torch's overloads; the loop passes no closure.
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # as torch's Muon
        """Update all parameters that have a gradient."""
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse: the two optimizers would keep their own groups and state.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("set `state[parameter]` of each parameter instead")


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable matrices of `model` that are neither looked up nor the output head."""
    outer: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            outer.add(id(module.weight))
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if getter is not None else None
        outer |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    return [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.ndim == 2 and id(parameter) not in outer
    ]


def muon_class() -> type[Optimizer]:
    """Return torch's Muon.

    Raises:
        RecipeError: If the installed torch has none.
    """
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise RecipeError.at(
            "train.optimizer",
            "muon",
            f"torch {torch.__version__} has no Muon",
            fix="Install torch 2.9 or newer, or take adamw",
        )
    return muon
