"""Writing of checkpoints; `raymix.training.run.checkpoint` describes and reads them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from raymix.errors import TrainingError
from raymix.store.remote import files
from raymix.training.model.finite import non_finite, some
from raymix.training.model.lora import has_adapters, save_adapter
from raymix.training.model.parallel import Replica, full_tensors
from raymix.training.run.checkpoint import (
    FORMAT,
    STATE_FILE,
    TrainingState,
    checkpoint_name,
    disk_full,
    whole_checkpoints,
)
from raymix.training.run.optimizer_state import (
    OPTIMIZER_FILE,
    optimizer_metadata,
    optimizer_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_checkpoint(
    directory: Path,
    replica: Replica,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    *,
    tokenizer_path: str,
    keep: int,
) -> Path:
    """Return the path of a new checkpoint in `directory`; all ranks call it, rank 0 writes.

    Raises:
        RecipeError: If the disk is full; no partial checkpoint is left.
        TrainingError: On all ranks, if weights or optimizer states are not finite; nothing is
            written.
    """
    final = directory / checkpoint_name(state.step)
    model = replica.model.model
    saved, states = _saved_weights(model), optimizer_tensors(replica, optimizer)
    _check_finite({**saved, **states}, replica, final)
    # Collectives under FSDP2: every rank takes part before all but the writer return.
    weights = full_tensors(saved, replica.world)
    moments = full_tensors(states, replica.world)
    if not replica.world.is_writer:
        return final
    # In the same directory, because a rename is atomic only within one file system.
    temporary = directory / f".{final.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        if has_adapters(model):
            save_adapter(model, weights, temporary)
        else:
            model.save_pretrained(temporary, state_dict=weights)
        metadata = optimizer_metadata(replica, optimizer)
        save_file(moments, temporary / OPTIMIZER_FILE, metadata=metadata)
        _copy_tokenizer(tokenizer_path, temporary)
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        # Nothing is fsynced: after a power failure the rename may be on disk and the data not. The
        # sizes show that, and the next older checkpoint serves.
        document = {"format": FORMAT, **_fields(state), "files": sizes}
        (temporary / STATE_FILE).write_text(json.dumps(document))
        # rename(2) replaces no directory that has files in it.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_full(error, directory) from error
    _remove_old(directory, keep)
    return final


def _check_finite(tensors: dict[str, torch.Tensor], replica: Replica, path: Path) -> None:
    bad = non_finite(tensors, replica.world)
    if bad:
        raise TrainingError.at(
            "checkpoint",
            str(path),
            f"not written: {some(bad, len(tensors))}, hold numbers that are not finite",
            fix="Lower train.lr, warm up longer, or clip harder. `raymix train RECIPE --from-step "
            "N` goes on from an earlier checkpoint",
        )


def _saved_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights that a checkpoint holds: of a model with adapters only these."""
    state = model.state_dict()
    if not has_adapters(model):
        return state
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trained}


def _fields(state: TrainingState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in TrainingState.__slots__}


def _remove_old(directory: Path, keep: int) -> None:
    """Remove all whole checkpoints but the newest `keep`, and what killed writers left."""
    # Damaged ones count for nothing and are left to people: counted, they would have the whole ones
    # removed.
    for path, _ in list(whole_checkpoints(directory))[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _copy_tokenizer(source: str, target: Path) -> None:
    # The corpus may be at a URL, and its tokenizer with it.
    for name in files.list_directory(source):
        (target / name).write_bytes(files.read_bytes(files.join(source, name)))
