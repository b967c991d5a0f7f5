"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from raymix.recipe.training import TrainConfig


def learning_rate(step: int, *, steps: int, config: TrainConfig) -> float:
    """Return the learning rate of step `step` (0-based) of `steps`; the last step has the lowest.

    Linear warm-up over W = ceil(warmup_ratio * steps) steps, reaching the peak at step W - 1.
    Then `cosine` falls to `min_lr_ratio` of the peak along half a cosine (Loshchilov and Hutter
    2017, eq. 5), `wsd` stays at the peak and falls linearly over the last `decay_ratio` of the
    steps (Hu et al. 2024), `constant` stays at the peak.
    """
    # "step + 1" throughout: a rate of 0 would waste the first step.
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    low = config.min_lr_ratio
    if config.schedule == "cosine":
        done = (step + 1 - warmup) / max(1, steps - warmup)
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
    if config.schedule == "wsd":
        decay = decay_steps(steps, config)
        done = max(0.0, (step + 1 - (steps - decay)) / decay)
        return config.lr * (1 - (1 - low) * done)
    return config.lr


def decay_steps(steps: int, config: TrainConfig) -> int:
    """Return the steps of `wsd` in which the learning rate falls, at the end of `steps`."""
    warmup = math.ceil(config.warmup_ratio * steps)
    return min(steps - warmup, max(1, math.ceil(config.decay_ratio * steps)))
