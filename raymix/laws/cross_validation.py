"""How far a law can be trusted: what it predicts of rows it has not seen, beside models of less.

Folds are whole runs. `ahead` is another question: the later steps of all runs, from the earlier
ones. Three null models answer the same questions: the mean of the losses, a curve in steps that is
blind to the shares, and each target's own share alone. Shapes: R rows, V targets, F subsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from raymix.laws.base import Score, mean_score
from raymix.laws.table import Floats, MixtureTable

FOLDS = 5
AHEAD = 0.6
"""Part of the range of steps that later ones are predicted from."""
NEARLY = 0.9
"""Part of a null model's error that a law must get below to say more than it."""


def score(predicted_R: Floats, measured_R: Floats) -> Score:
    """Return the agreement on rows where both are known; of fewer than three: NaN."""
    known_R = np.isfinite(predicted_R) & np.isfinite(measured_R)
    p, m = predicted_R[known_R], measured_R[known_R]
    if len(m) < 3:
        return Score(spearman=np.nan, r2=np.nan, mre=np.nan)
    ranks = np.stack([rankdata(p), rankdata(m)])
    flat = (np.ptp(ranks, axis=1) == 0).any()
    spread = float(np.square(m - m.mean()).sum())
    return Score(
        spearman=np.nan if flat else float(np.corrcoef(ranks)[0, 1]),
        r2=1 - float(np.square(p - m).sum()) / spread if np.ptp(m) > 0 else np.nan,
        mre=float(np.mean(np.abs(p - m) / m)),
    )


def scores(table: MixtureTable, predicted_RV: Floats) -> dict[str, Score]:
    """Return the agreement of predictions, NaN where there are none, by target."""
    pairs = zip(table.targets, predicted_RV.T, table.loss_RV.T, strict=True)
    return {target: score(predicted, measured) for target, predicted, measured in pairs}


def folds(table: MixtureTable, *, seed: int = 0) -> np.ndarray:
    """Return which rows to learn from in each fold, whole runs, shape (F, R)."""
    names = sorted(set(table.runs))
    count = len(names) if len(names) <= 2 * FOLDS else FOLDS
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[run]: position % count for position, run in enumerate(order)}
    fold_R = np.array([fold_of[run] for run in table.runs])
    return fold_R != np.arange(count)[:, None]


def early(table: MixtureTable) -> np.ndarray | None:
    """Return which rows are early, shape (R,); None where there are no later ones to predict."""
    if table.step_R is None or not table.has_steps:
        return None
    steps = np.unique(table.step_R)
    early_R = table.step_R <= steps[0] + AHEAD * (steps[-1] - steps[0])
    enough = np.unique(table.step_R[early_R]).size >= 2 and early_R.sum() < len(table)
    return early_R if enough else None


def left_out(use_FR: np.ndarray, predicted_FRV: Floats) -> Floats:
    """Return, for each row, what the fold without it predicts, shape (R, V)."""
    fold_R = np.argmin(use_FR, axis=0)
    return predicted_FRV[fold_R, np.arange(use_FR.shape[1])]


def verdict(
    table: MixtureTable,
    targets: Mapping[str, Score],
    ahead: Mapping[str, Score],
    nulls: Mapping[str, Score],
    notes: Sequence[str] = (),
) -> str:
    """Return in plain words what the fit is good for."""
    runs, domains, found = table.run_count, len(table.domains), mean_score(targets)
    error = f"{100 * found.mre:.2g} % off on runs left out"
    said = []
    if runs < 2 * domains:
        said.append(f"{runs} runs are too few for {domains} domains: rank only ({error})")
    elif found.spearman >= 0.95 and found.r2 >= 0.9:
        said.append(f"Ranks and losses can be trusted ({error})")
    elif found.spearman >= 0.8:
        said.append(f"Ranks can be trusted, differences below {200 * found.mre:.2g} % cannot")
    else:
        said.append(f"Weak: rank correlation {found.spearman:.2f} on runs left out ({error})")
    blind = [nulls[name].mre for name in ("mean", "steps") if name in nulls]
    if not found.mre < NEARLY * min(blind, default=np.inf):
        said.append("No better than a model that ignores the mixture: choose nothing by it")
    if ahead:
        said.append(f"Later steps from earlier ones: {100 * mean_score(ahead).mre:.2g} % off")
    return ". ".join([*said, *notes]) + "."
