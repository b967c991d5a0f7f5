"""Cross-validation of laws: folds over runs, scores, and the verdict.

Folds are whole runs. `ahead` holds the scores of a second split: later steps of all runs predicted
from the earlier ones. Three null models are scored on the same folds: `mean`, the mean of the
losses; `steps`, a curve in steps that ignores the shares; `own`, each target's own share alone.

Shapes: R rows, V targets, F subsets (folds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from raymix.laws.base import Score, mean_score
from raymix.laws.table import Floats, MixtureTable

FOLDS = 5
EARLY_FRACTION = 0.6
"""Fraction of the range of steps that counts as early."""
MAX_NULL_ERROR_RATIO = 0.9
"""A law must have less than this fraction of a null model's error to be called better."""


def score(predicted_R: Floats, measured_R: Floats) -> Score:
    """Return the score over rows where both are finite; NaN with fewer than three rows."""
    valid_R = np.isfinite(predicted_R) & np.isfinite(measured_R)
    predicted, measured = predicted_R[valid_R], measured_R[valid_R]
    if len(measured) < 3:
        return Score(spearman=np.nan, r2=np.nan, mre=np.nan)
    # Spearman is Pearson of average ranks, which handles ties; it is 0 / 0 for constant ranks.
    ranks = np.stack([rankdata(predicted), rankdata(measured)])
    is_constant = (np.ptp(ranks, axis=1) == 0).any()
    total_squares = float(np.square(measured - measured.mean()).sum())
    return Score(
        spearman=np.nan if is_constant else float(np.corrcoef(ranks)[0, 1]),
        r2=1 - float(np.square(predicted - measured).sum()) / total_squares
        if np.ptp(measured) > 0
        else np.nan,
        mre=float(np.mean(np.abs(predicted - measured) / measured)),
    )


def scores(table: MixtureTable, predicted_RV: Floats) -> dict[str, Score]:
    """Return the scores of predictions, NaN for no prediction, by target."""
    pairs = zip(table.targets, predicted_RV.T, table.loss_RV.T, strict=True)
    return {target: score(predicted, measured) for target, predicted, measured in pairs}


def folds(table: MixtureTable, *, seed: int = 0) -> np.ndarray:
    """Return the training rows of each fold as a mask, shape (F, R); a run is never split."""
    # Checkpoints of one run share its noise: split, they would leak it into the training rows.
    # Sorted, because the iteration order of a set of strings changes with the hash seed.
    runs = sorted(set(table.runs))
    # With few runs each row counts: leave one run out up to ten, five folds beyond.
    fold_count = len(runs) if len(runs) <= 2 * FOLDS else FOLDS
    permutation = np.random.default_rng(seed).permutation(len(runs))
    fold_of = {runs[run]: position % fold_count for position, run in enumerate(permutation)}
    fold_R = np.array([fold_of[run] for run in table.runs])
    return fold_R != np.arange(fold_count)[:, None]


def early_rows(table: MixtureTable) -> np.ndarray | None:
    """Return a mask of the early rows, shape (R,); None where no later rows are left."""
    if table.step_R is None or not table.has_steps:
        return None
    steps = np.unique(table.step_R)
    early_R = table.step_R <= steps[0] + EARLY_FRACTION * (steps[-1] - steps[0])
    # One early step fixes no slope in steps.
    has_both = np.unique(table.step_R[early_R]).size >= 2 and early_R.sum() < len(table)
    return early_R if has_both else None


def out_of_fold(use_FR: np.ndarray, predicted_FRV: Floats) -> Floats:
    """Return the prediction of each row by the fold that left it out, shape (R, V)."""
    # argmin of booleans is the first False: the one fold that does not train on the row.
    fold_R = np.argmin(use_FR, axis=0)
    return predicted_FRV[fold_R, np.arange(use_FR.shape[1])]


def verdict(
    table: MixtureTable,
    targets: Mapping[str, Score],
    ahead: Mapping[str, Score],
    nulls: Mapping[str, Score],
    notes: Sequence[str] = (),
) -> str:
    """Return a summary of the scores: how far the law can be trusted."""
    runs, domains, mean = table.run_count, len(table.domains), mean_score(targets)
    error = f"{100 * mean.mre:.2g} % off on runs left out"
    sentences = []
    if runs < 2 * domains:
        sentences.append(f"{runs} runs are too few for {domains} domains: rank only ({error})")
    elif mean.spearman >= 0.95 and mean.r2 >= 0.9:
        sentences.append(f"Ranks and losses can be trusted ({error})")
    elif mean.spearman >= 0.8:
        sentences.append(f"Ranks can be trusted, differences below {200 * mean.mre:.2g} % cannot")
    else:
        sentences.append(f"Weak: rank correlation {mean.spearman:.2f} on runs left out ({error})")
    null_errors = [nulls[name].mre for name in ("mean", "steps") if name in nulls]
    # `not <` instead of `>=`: an error of NaN must not count as better than the null models.
    if not mean.mre < MAX_NULL_ERROR_RATIO * min(null_errors, default=np.inf):
        sentences.append("No better than a model that ignores the mixture: choose nothing by it")
    if ahead:
        sentences.append(f"Later steps from earlier ones: {100 * mean_score(ahead).mre:.2g} % off")
    return ". ".join([*sentences, *notes]) + "."
