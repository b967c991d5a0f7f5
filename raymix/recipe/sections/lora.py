"""Recipe model of low-rank adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raymix.recipe.base import Integer, Number, RecipeModel

ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z_0-9]+(\.[A-Za-z_0-9]+)*$")]


class LoraConfig(RecipeModel):
    """Low-rank adapters (Hu et al. 2022): the model's own weights stay as they are."""

    rank: Integer = Field(default=16, ge=1, le=65_536)
    """Rank of the update of each matrix."""
    alpha: Integer = Field(default=32, ge=1)
    """The update is multiplied by alpha / rank."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapters' inputs."""
    targets: Literal["all-linear"] | Annotated[tuple[ModuleName, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """Modules to adapt, by the last parts of their names, such as [q_proj, v_proj]; `all-linear`:
    all linear layers but the output head."""
    export: Literal["merged", "adapter"] = "merged"
    """What `raymix export` writes: a whole model with the update added, or the adapter alone."""
