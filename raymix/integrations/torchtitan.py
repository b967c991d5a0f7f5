"""torchtitan: a data loader for its config, on a raymix recipe.

`config.dataloader = MixtureDataLoader.Config(recipe="my.yaml")` in a config registry. torchtitan's
data-parallel ranks may differ from run to run; it saves the loader's state with its checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from raymix.integrations._versions import require

require("torchtitan", ">=0.3,<0.4", "torchtitan==0.3.0")

from torchtitan.components.dataloader import BaseDataLoader

from raymix.errors import TrainingError
from raymix.loader import MixtureLoader
from raymix.training.model.loss import IGNORED

# One value, as text: torch.distributed.checkpoint wants a state of the same keys on loading.
_KEY = "raymix"


class MixtureDataLoader(BaseDataLoader):
    """Batches of a mixture as torchtitan takes them: labels shifted, positions by document.

    Attributes:
        mixture: The loader; `feedback` and `step` of adaptive mixers are for the trainer to call.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """The recipe whose mixture is read."""

        recipe: str = ""
        """Path of the recipe."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **kwargs: Any,
    ) -> None:
        """Open the recipe's corpus.

        Args:
            config: The recipe.
            dp_world_size: Data-parallel ranks.
            dp_rank: This one.
            seq_len: Tokens per row; the recipe's.
            local_batch_size: Rows of a forward pass.
            kwargs: What torchtitan gives to loaders of text, such as the tokenizer; unused.

        Raises:
            RaymixError: If recipe and corpus cannot be used.
            TrainingError: If the sizes are not the recipe's.
        """
        loader = MixtureLoader(config.recipe, rank=dp_rank, world_size=dp_world_size)
        data = loader.recipe.data
        if seq_len != data.sequence_length:
            raise TrainingError.at(
                "training.seq_len", seq_len, f"the recipe's rows have {data.sequence_length} tokens"
            )
        parts, left = divmod(data.step_rows, dp_world_size * local_batch_size)
        if left or not parts:
            raise TrainingError.at(
                "training.local_batch_size",
                local_batch_size,
                f"{dp_world_size} ranks of it do not divide the {data.step_rows} rows of a step",
                fix="Set training.global_batch_size to the recipe's data.rows_per_step",
            )
        self.mixture = MixtureLoader(
            loader.recipe, rank=dp_rank, world_size=dp_world_size, micro_batches=parts
        )

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield inputs with positions, and labels: the next token, or -100."""
        for part in self.mixture:
            labels = torch.full_like(part["labels"], IGNORED)
            labels[:, :-1] = part["labels"][:, 1:]
            yield {"input": part["input_ids"], "positions": part["position_ids"]}, labels

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state as one text, the same on all ranks."""
        return {_KEY: json.dumps(self.mixture.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; an empty one is that of the first step."""
        if state_dict:
            self.mixture.load_state_dict(json.loads(state_dict[_KEY]))
