"""Builds the state of a controller from a recipe's mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymix.mixers import Mixer, MixerContext, build_mixer
from raymix.streaming.controller.journal import Journal
from raymix.streaming.controller.state import MixtureState


def build_mixture_state(
    mixer: Any,
    context: MixerContext,
    *,
    run_dir: str | None = None,
    snapshot: Mapping[str, Any] | None = None,
    probe_interval: int = 100,
    session: str | None = None,
) -> MixtureState:
    """Return the state of a run's controller.

    Args:
        mixer: The recipe's `mixer` section, or a mixer already built.
        context: The run as mixers see it.
        run_dir: Directory of log and state; without it a restarted controller has lost both.
        snapshot: From `MixtureState.snapshot` in a checkpoint, to resume a run.
        probe_interval: Steps per window.
        session: Id of this start of the run. It distinguishes a restart of the controller under
            running workers from a new start in the same directory.

    Raises:
        RecipeError: If the mixer is unknown or does not fit the run.
    """
    built = mixer if isinstance(mixer, Mixer) else build_mixer(mixer, context)
    return MixtureState(
        built,
        context,
        kind=getattr(mixer, "kind", type(built).__name__),
        interval=probe_interval,
        journal=Journal(run_dir) if run_dir else None,
        snapshot=snapshot,
        session=session,
    )
