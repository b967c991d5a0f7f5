"""Ray Train with a train function of one's own: a worker's loader, and its state in checkpoints.

def train_function():
loader = get_mixture_shard("my.yaml")
...
with tempfile.TemporaryDirectory() as directory:
...  # the model
save_mixture(loader, directory)
ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ray.train

from raymix.errors import TrainingError
from raymix.loader import MixtureLoader
from raymix.recipe import RecipeSource

_FILE = "mixture.json"


def get_mixture_shard(source: RecipeSource, **options: Any) -> MixtureLoader:
    """Return the loader of this worker, which goes on from the checkpoint that the run resumes.

    Args:
        source: A recipe, or the path of one, which every worker must be able to read.
        options: Those of `MixtureLoader`; rank and number of workers are Ray Train's.

    Raises:
        RaymixError: As `MixtureLoader`.
        TrainingError: If the checkpoint was saved without `save_mixture`.
    """
    loader = MixtureLoader(source, **options)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return loader
    with checkpoint.as_directory() as directory:
        try:
            state = json.loads((Path(directory) / _FILE).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError.at(
                "checkpoint",
                checkpoint.path,
                f"it has no state of the mixture: {error}",
                fix="Save it with save_mixture(loader, directory)",
            ) from error
    loader.load_state_dict(state)
    return loader


def save_mixture(loader: MixtureLoader, directory: str | os.PathLike[str]) -> None:
    """Write the state after the step trained last into the directory of a checkpoint.

    It is the same on all workers: one of them is enough.
    """
    (Path(directory) / _FILE).write_text(json.dumps(loader.state_dict()), "utf-8")
