"""Gradient statistics of groups of sequences from one backward pass, at little extra cost.

Read in this order: `statistics` (the estimators), `layout` (rows and pieces), `gram` (inner
products), `functions`, `handlers` and `capture` (how the pieces are intercepted), `replay`,
`survey` and `locality` (parameters for which a module runs again), `probe` (the interface).

    probe = GradientProbe(loss_module, n_groups=K)
    with probe.recording(piece_B, scale=scale) as recording:   # a training batch
        loss, _ = loss_module(tokens_BL, positions_BL, labels_BL)
        (loss * scale).backward()
    stats = statistics(recording.pieces)

    stats = statistics(probe.measure(tokens_BL, positions_BL, labels_BL, piece_B))  # its own batch

`loss_module` is a module that returns the summed loss and the loss per token, or any causal LM that
returns logits (`CausalLoss`).

Over ranks: all-reduce `gradient_sums(pieces)`, then call `statistics(sums)`.
"""

from raymix.signals.causal_loss import CausalLoss
from raymix.signals.layout import assign_pieces, order_by_piece
from raymix.signals.precondition import adam_preconditioner
from raymix.signals.probe import GradientProbe, Mode, Preconditioner, Recording
from raymix.signals.statistics import (
    GradientStats,
    GradientSums,
    PieceGram,
    gradient_sums,
    statistics,
)

__all__ = [
    "CausalLoss",
    "GradientProbe",
    "GradientStats",
    "GradientSums",
    "Mode",
    "PieceGram",
    "Preconditioner",
    "Recording",
    "adam_preconditioner",
    "assign_pieces",
    "gradient_sums",
    "order_by_piece",
    "statistics",
]
