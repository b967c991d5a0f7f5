"""Descriptions of a model, and errors about it; imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from raymix.errors import RecipeError

Isolation = Literal["positions", "masks", "rows"]
"""How documents are kept apart: by positions that restart, by positions and explicit masks (one
per type of layer), or in rows of their own."""


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """The model's inputs from the corpus and the recipe's batch."""

    vocab_size: int
    """Tokens in the tokenizer's vocabulary."""
    eos_id: int
    """The token that ends a document."""
    sequence_length: int
    """Tokens per row."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters and arithmetic of a model."""

    parameters: int
    """All parameters; tied ones count once."""
    trained_elements: Mapping[str, int]
    """Parameters that are trained, by role in `raymix.training.model.optimizer_class`."""
    flops_per_token: float
    """Floating-point operations of forward and backward per token, with causal attention."""

    @property
    def trainable(self) -> int:
        """Return the parameters that are trained: of the adapters where there are any, else all."""
        return sum(self.trained_elements.values())


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One part of the memory of a training worker."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """Properties of a model, tested by `raymix.training.model.traits.probe_model`."""

    isolation: Isolation
    """How documents of one row are kept apart."""
    causal: bool
    """Whether no token sees a later one."""
    linear_head: bool
    """Whether the logits are the output embedding of the last hidden state and nothing else."""

    @property
    def isolates_documents(self) -> bool:
        """Return whether documents packed into a row do not see each other."""
        return self.isolation != "rows"


def isolation_error(model_type: str) -> RecipeError:
    """Return the error of a model in which packed documents see each other."""
    return RecipeError.at(
        "model.type",
        model_type,
        f"documents packed into one row would see each other in {model_type}",
        fix=(
            "Set data.mode: documents, where each is a row of its own, or take a type with rotary "
            "or learned positions and plain attention, such as llama, qwen3 or gpt2"
        ),
    )


def causality_error(model_type: str) -> RecipeError:
    """Return the error of a model whose tokens see the tokens that they are to predict."""
    return RecipeError.at(
        "model.type",
        model_type,
        f"tokens see those after them in {model_type}, so there is nothing to predict",
        fix="Set is_decoder: true in model.config if it has that field, or take a causal model",
    )
