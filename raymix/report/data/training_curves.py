"""Training curves that the page draws beyond those of the JSON twin.

The twin's keys are fixed for its readers, so gradient norms and the training loss per domain are
data of the page alone; `metrics.jsonl` has them in full. Shapes: S recorded steps, D domains.
"""

from __future__ import annotations

import numpy as np

from raymix.report.data.losses import recent_domain_losses, recent_losses
from raymix.report.data.read import RunRecord
from raymix.report.data.steps import Document, Floats
from raymix.report.data.summary import MAX_SERIES, plain, smoothed, thinned, training_window


def training_curves(run: RunRecord, summary: Document) -> Document:
    """Return the page's further curves of a run and its recent losses, in JSON types.

    Args:
        run: The run.
        summary: Its summary; the domains with the most tokens are drawn.
    """
    recent = recent_losses(run.steps)
    document = {
        "loss_mean": recent.mean(),
        "loss_mean_steps": len(recent),
        "domain_loss_mean": recent_domain_losses(run.steps, summary["domains"]),
        "domain_loss": _domain_loss(run, summary),
        "grad_norm": _grad_norm(run),
        "clip_norm": (run.recipe.get("train") or {}).get("clip_norm"),
    }
    plain_document: Document = plain(document)
    return plain_document


def _grad_norm(run: RunRecord) -> Document | None:
    norm_S = run.steps.grad_norm_S
    if not np.isfinite(norm_S).any():
        return None
    # Smoothed before it is thinned: thinning alone would alias the noise of single steps.
    points = thinned(len(run.steps))
    return {
        "step": run.steps.step_S[points],
        "tokens": run.steps.tokens_S[points],
        "grad_norm": norm_S[points],
        "grad_norm_smooth": smoothed(norm_S, training_window(run.steps))[points],
    }


def _domain_loss(run: RunRecord, summary: Document) -> Document | None:
    """Return smoothed training losses of the domains with the most tokens, None without any."""
    rows = summary["domains"]
    # The order of the rows is that of the colors, so it stays; only the choice is by tokens.
    largest = sorted(rows, key=lambda name: -(rows[name]["tokens"] or 0.0))[:MAX_SERIES]
    names = [name for name in rows if name in set(largest)]
    loss_DS = domain_loss_matrix(run, names)
    window, points = training_window(run.steps), thinned(len(run.steps))
    curves = {
        name: smoothed(loss_S, window)[points]
        for name, loss_S in zip(names, loss_DS, strict=True)
        if np.isfinite(loss_S).any()
    }
    if not curves:
        return None
    return {
        "step": run.steps.step_S[points],
        "tokens": run.steps.tokens_S[points],
        "loss": curves,
        "smoothing_steps": window,
        "left_out": len(rows) - len(curves),
    }


def domain_loss_matrix(run: RunRecord, names: list[str]) -> Floats:
    """Return training losses, nats per token, shape (D, S), NaN where a domain was not read."""
    # Only the drawn domains get rows: a matrix of all would take gigabytes for long runs.
    loss_DS = np.full((len(names), len(run.steps)), np.nan)
    row_of = {name: row for row, name in enumerate(names)}
    for at, losses in enumerate(run.steps.domain_loss):
        if losses is None:
            continue
        for name, loss in zip(losses.names, losses.values, strict=True):
            if (row := row_of.get(name)) is not None:
                loss_DS[row, at] = loss
    return loss_DS
