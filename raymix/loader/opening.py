"""Recipe, corpus and stream of a loader; rank 0 prepares the corpus if need be."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from raymix.errors import ClusterError, CorpusError
from raymix.loader.collectives import Collectives
from raymix.mixers import Mixer, MixerContext
from raymix.recipe import CorpusConfig, Recipe, load_recipe
from raymix.store import Corpus
from raymix.store.manifest import MANIFEST
from raymix.store.remote import files
from raymix.streaming.batches.stream import MixtureStream, row_tokens
from raymix.streaming.blocks.sources import LocalSource
from raymix.streaming.controller.build import build_mixture_state
from raymix.streaming.controller.local import LocalController
from raymix.training.plan.mixer_context import count_steps

# Between looks for a corpus that rank 0 prepares, and how long without one is too long.
_LOOK_S, _PREPARE_S = 2.0, 6 * 3600.0


def packed_recipe(
    path: str,
    *,
    steps: int,
    mixer: str | Mapping[str, Any],
    sequence_length: int,
    rows_per_step: int,
    seed: int,
) -> Recipe:
    """Return the recipe of packed rows of a prepared corpus.

    Raises:
        RecipeError: If a value is wrong.
    """
    return load_recipe(
        {
            "name": "loader",
            "seed": seed,
            "corpus": {"path": path},
            "mixer": {"kind": mixer} if isinstance(mixer, str) else mixer,
            "data": {"sequence_length": sequence_length, "rows_per_step": rows_per_step},
            "train": {"steps": steps},
        }
    )


def open_corpus(config: CorpusConfig, ranks: Collectives) -> Corpus:
    """Return the prepared corpus; where there is none, rank 0 prepares it and the others wait.

    Raises:
        CorpusError: If it cannot be prepared, or is of another configuration.
        ClusterError: If rank 0 does not prepare it.
    """
    manifest = files.join(config.path, MANIFEST)
    if not files.exists(manifest):
        if not config.domains:
            raise CorpusError.at(
                "corpus.path",
                config.path,
                "there is no prepared corpus",
                fix="Run `raymix prepare`, or give a recipe that has its sources",
            )
        if ranks.rank:
            _wait_for(manifest)
        else:
            # Imported here: it loads Ray Data and tokenizers, which a prepared corpus needs not.
            from raymix.corpus.open_or_prepare import open_or_prepare

            return open_or_prepare(config, lambda: None)
    return Corpus.open(config.path)


def _wait_for(manifest: str) -> None:
    begun = time.monotonic()
    while not files.exists(manifest):
        if time.monotonic() - begun > _PREPARE_S:
            raise ClusterError.at(
                "corpus.path", manifest, f"rank 0 has not prepared it in {_PREPARE_S:g} s"
            )
        time.sleep(_LOOK_S)


def open_stream(
    recipe: Recipe,
    corpus: Corpus,
    context: MixerContext,
    ranks: Collectives,
    *,
    mixer: Mixer | None,
    run_dir: str | os.PathLike[str] | None,
    state: Mapping[str, Any] | None,
) -> tuple[LocalController, MixtureStream]:
    """Return a rank's controller and stream.

    Args:
        recipe: The run.
        corpus: Its corpus.
        context: The run as its mixer sees it.
        ranks: The data-parallel ranks.
        mixer: A mixer in place of the recipe's.
        run_dir: Directory for the mixture log, which rank 0 writes.
        state: From `MixtureLoader.state_dict`, to go on.

    Raises:
        RaymixError: If mixer, corpus and state do not go together.
    """
    own_dir = run_dir if ranks.rank == 0 else None
    if own_dir is not None:
        os.makedirs(own_dir, exist_ok=True)
    mixture = build_mixture_state(
        mixer or recipe.mixer,
        context,
        run_dir=None if own_dir is None else os.fspath(own_dir),
        snapshot=state["controller"] if state else None,
        probe_interval=recipe.train.probe_interval,
    )
    # Leases of one step: the ranks have then decided equally far, and new weights hold from the
    # next step that is read.
    controller = LocalController(
        mixture, lease_s=0.0, world_size=ranks.world_size, gather=ranks.gather
    )
    stream = MixtureStream(
        corpus,
        recipe.data,
        seed=recipe.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        controller=controller,
        source=LocalSource(corpus, row_tokens=row_tokens(recipe.data)),
        state=state["sampler"] if state else None,
        limit=count_steps(recipe),
        keep_past=True,
    )
    return controller, stream
