"""Mixers built from recipe fields, and windows of statistics made from a few arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from raymix.mixers import Adaptive, DomainStats, MixerContext, build_mixer
from raymix.recipe.mixer import MixerConfig

CONFIG: TypeAdapter[Any] = TypeAdapter(MixerConfig)
RAW = {"paper_exact": True}


def context(
    n_domains: int, *, batch: int = 10, tokens: Sequence[int] | None = None
) -> MixerContext:
    """Return a run over domains d0, d1, ... of equal size."""
    names = tuple(f"d{at}" for at in range(n_domains))
    tokens_D = np.array(tokens or [1000] * n_domains)
    return MixerContext(names, tokens_D, 10**6, 1000, rows_per_step=batch)


def adaptive(kind: str, about: MixerContext, **fields: Any) -> Adaptive:
    """Return the mixer that a recipe's section describes."""
    built = build_mixer(CONFIG.validate_python({"kind": kind, **fields}), about)
    assert isinstance(built, Adaptive)
    return built


def window(n_domains: int, *, step: int = 0, **arrays: Any) -> DomainStats:
    """Return the statistics of ten steps; what is left out is even."""
    tokens = np.array(arrays.pop("tokens", [100] * n_domains))
    loss = np.array(arrays.pop("loss", [2.0] * n_domains), dtype=np.float64)
    names = {"norm2": "grad_norm2_D", "noise": "grad_noise_D", "gram": "gram_DD"}
    names |= {"alignment": "alignment_D", "valid": "valid_loss_D"}
    names |= {"group_alignment": "group_alignment_N", "group_gram": "group_gram_NN"}
    given = {names[name]: np.array(value, np.float64) for name, value in arrays.items()}
    return DomainStats(step=step, window=10, tokens_D=tokens, loss_D=loss, **given)


def whole(n_domains: int, seed: int, *, step: int = 0, groups: int = 0) -> DomainStats:
    """Return a window in which everything is measured, made from random gradients."""
    rng = np.random.default_rng(seed)
    grad_DP = rng.normal(size=(n_domains, 5)) + 0.3
    group_NP = rng.normal(size=(groups, 5))
    gram_DD = grad_DP @ grad_DP.T
    return window(
        n_domains,
        step=step,
        tokens=rng.integers(1, 1000, n_domains),
        loss=1 + rng.random(n_domains),
        valid=1 + rng.random(n_domains),
        norm2=np.diag(gram_DD),
        noise=10 * rng.random(n_domains),
        gram=gram_DD,
        alignment=gram_DD[:, -1],
        group_alignment=group_NP @ grad_DP[-1],
        group_gram=group_NP @ group_NP.T,
    )


def continued(mixer: Adaptive, again: Adaptive) -> Adaptive:
    """Return `again` with the state of `mixer`, which went through JSON."""
    again.load_state_dict(json.loads(json.dumps(mixer.state_dict(), allow_nan=False)))
    return again
