"""Megatron-LM: batches for `--dataloader-type external`.

    def train_valid_test_datasets_provider(train_val_test_num_samples):
        train = external_iterator(
            "my.yaml",
            rank=mpu.get_data_parallel_rank(),
            world_size=mpu.get_data_parallel_world_size(),
            micro_batch_size=args.micro_batch_size,
            consumed_samples=args.consumed_train_samples,
        )
        return train, None, None

    train_valid_test_datasets_provider.is_distributed = True

Megatron passes an external loader through and calls `next` for every micro-batch. It stores a
count of samples, not a loader's state, so the mixture must be a fixed one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from raymix.errors import TrainingError
from raymix.loader import MixtureLoader
from raymix.recipe import RecipeSource
from raymix.training.model.loss import IGNORED


def external_iterator(
    source: RecipeSource,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    consumed_samples: int = 0,
    attention_mask: bool = True,
) -> Iterator[dict[str, torch.Tensor]]:
    """Return the micro-batches of a data-parallel rank, from a count of samples on.

    Each is a dict of (B, L) tensors: `tokens`, `labels` (the next token), `position_ids` (from 0 in
    every document), int64, and `loss_mask`, float32, 0 where nothing is predicted; and
    `attention_mask`, bool, (B, 1, L, L), True where a token does not see another.

    Args:
        source: A recipe in packed mode, or the path of one.
        rank: Data-parallel rank.
        world_size: Data-parallel ranks.
        micro_batch_size: Rows of a micro-batch.
        consumed_samples: Rows trained on before, over all ranks: `args.consumed_train_samples`.
        attention_mask: Whether batches have a mask. Without one, which
            `--no-create-attention-mask-in-dataloader` asks for, documents in a row see each other.

    Raises:
        RaymixError: As `MixtureLoader`.
        TrainingError: If the sizes are not the recipe's, or the mixture is not a fixed one.
    """
    loader = MixtureLoader(source, rank=rank, world_size=world_size)
    if loader.recipe.data.mode != "packed":
        raise TrainingError.at(
            "data.mode",
            loader.recipe.data.mode,
            "Megatron takes rows of one length",
            fix="Set it to packed",
        )
    rows = loader.recipe.data.step_rows
    parts, left = divmod(rows, world_size * micro_batch_size)
    if left or not parts:
        raise TrainingError.at(
            "micro_batch_size",
            micro_batch_size,
            f"{world_size} ranks of it do not divide the {rows} rows of a step",
            fix="Set --global-batch-size to the recipe's data.rows_per_step, without ramp-up",
        )
    step, left = divmod(consumed_samples, rows)
    if left:
        raise TrainingError.at(
            "consumed_samples", consumed_samples, f"no multiple of the {rows} rows of a step"
        )
    loader = MixtureLoader(loader.recipe, rank=rank, world_size=world_size, micro_batches=parts)
    if loader.adaptive:
        raise TrainingError.at(
            "mixer.kind",
            loader.recipe.mixer.kind,
            "Megatron gives no losses by domain back to a loader, and stores no state of it",
            fix="Take a fixed mixture",
        )
    loader.seek(step)
    return _megatron_batches(loader, attention_mask=attention_mask)


def _megatron_batches(
    loader: MixtureLoader, *, attention_mask: bool
) -> Iterator[dict[str, torch.Tensor]]:
    for part in loader:
        labels = torch.full_like(part["labels"], IGNORED)
        labels[:, :-1] = part["labels"][:, 1:]
        learned = labels != IGNORED
        batch = {
            "tokens": part["input_ids"],
            # Megatron looks every label up, also where the mask leaves it out.
            "labels": labels.masked_fill(~learned, 0),
            "loss_mask": learned.to(torch.float32),
            "position_ids": part["position_ids"],
        }
        if attention_mask:
            document = (part["position_ids"] == 0).cumsum(1)
            sees = (document[:, :, None] == document[:, None, :]).tril()
            batch["attention_mask"] = ~sees[:, None]
        yield batch
