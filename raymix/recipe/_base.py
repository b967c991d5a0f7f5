"""The base of every recipe model: frozen, strict about keys, documented field by field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A frozen recipe node; unknown keys are errors and docstrings become schema text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )
