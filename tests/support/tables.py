"""Mixture tables made by known laws."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raymix.laws import MixtureTable

Floats = NDArray[np.float64]
STEPS = (2000.0, 4000.0, 8000.0, 16000.0)


def draw_shares(runs: int, domains: int, *, seed: int = 0, zeros: float = 0.0) -> Floats:
    """Return shares of runs, some of them absent, shape (runs, domains)."""
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(domains, 1.0), runs)
    share = np.where(random.random(share.shape) < zeros, 0.0, share)
    share[share.sum(axis=1) == 0] = 1.0
    return share / share.sum(axis=1, keepdims=True)


def as_table(share: Floats, loss: Floats, step: Floats | None = None) -> MixtureTable:
    """Return a table of rows; with steps, rows of equal shares are one run."""
    names = {tuple(row): f"run{at}" for at, row in enumerate(np.unique(share, axis=0))}
    return MixtureTable(
        domains=tuple(f"d{i}" for i in range(share.shape[1])),
        targets=tuple(f"d{i}" for i in range(loss.shape[1])),
        runs=tuple(names[tuple(row)] for row in share),
        share_RD=share,
        loss_RV=loss,
        step_R=step,
    )


class BiMixTruth:
    """L_i = (B_i s^-b_i + C_i) / (r_i + eps)^alpha_i."""

    def __init__(self, domains: int, *, eps: float = 0.0, seed: int = 5) -> None:
        random = np.random.default_rng(seed)
        self.alpha = random.uniform(0.03, 0.3, domains)
        self.b = random.uniform(0.2, 0.5, domains)
        self.B = random.uniform(1.0, 3.0, domains) * 5000**self.b
        self.C = random.uniform(1.5, 3.0, domains)
        self.eps = eps

    def __call__(self, share: Floats, step: Floats) -> Floats:
        return (self.B * step[:, None] ** -self.b + self.C) * (share + self.eps) ** -self.alpha

    def table(self, runs: int, *, noise: float = 0.0, zeros: float = 0.0) -> MixtureTable:
        share = np.repeat(draw_shares(runs, len(self.alpha), zeros=zeros), len(STEPS), axis=0)
        step = np.tile(np.array(STEPS), runs)
        random = np.random.default_rng(1)
        loss = self(share, step) * np.exp(noise * random.normal(size=(len(share), len(self.alpha))))
        return as_table(share, loss, step)


class AdditiveTruth:
    """L_v = E_v + (sum_j C_vj r_j^g_vj)^-1: domains help each other's targets."""

    def __init__(self, domains: int, *, seed: int = 3) -> None:
        random = np.random.default_rng(seed)
        self.floor = random.uniform(1.5, 2.5, domains)
        self.scale = random.uniform(0.02, 0.2, (domains, domains)) + 0.6 * np.eye(domains)
        self.power = random.uniform(0.3, 0.8, (domains, domains))

    def __call__(self, share: Floats) -> Floats:
        terms = self.scale * share[:, None, :] ** self.power
        return self.floor + 1 / terms.sum(axis=2)

    def table(self, runs: int, *, noise: float = 0.0, seed: int = 0) -> MixtureTable:
        share = draw_shares(runs, len(self.floor), seed=seed)
        random = np.random.default_rng(1)
        loss = self(share)
        return as_table(share, loss * np.exp(noise * random.normal(size=loss.shape)))
