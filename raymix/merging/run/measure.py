"""Statistics of one parameter's task vectors for the merge report, in one pass over chunks.

Shapes: K tasks, E entries of a chunk of R rows and C columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymix._utils.json import rounded
from raymix.merging.registry import Deltas, Factors


@dataclass(frozen=True, slots=True)
class Measures:
    """Inner products and sign agreement of the tasks."""

    gram_KK: Tensor
    """Inner products, shape (K, K), fp64."""
    sign_agreement: float | None
    """Mean over entries of |sum of the tasks' signs| / K: 1 if all tasks agree at all entries; None
    if not measured."""

    @property
    def norms(self) -> list[float]:
        """Return the Frobenius norms of the tasks, K of them."""
        # The diagonal of factored deltas can be below 0 by rounding.
        return [math.sqrt(value) for value in self.gram_KK.diagonal().clamp_min(0).tolist()]

    def document(self) -> dict[str, Any]:
        """Return the report's figures; `alignment` is the mean cosine over pairs of tasks."""
        norms = self.norms
        cosines = [
            float(self.gram_KK[i, j]) / (norms[i] * norms[j])
            for i in range(len(norms))
            for j in range(i + 1, len(norms))
            if norms[i] and norms[j]  # a frozen task has no direction
        ]
        return {
            "task_norms": [rounded(norm) for norm in norms],
            "sign_agreement": rounded(self.sign_agreement),
            "cosines": [rounded(cosine) for cosine in cosines],
            "alignment": rounded(sum(cosines) / len(cosines)) if cosines else None,
        }


def measure(deltas: Deltas) -> Measures:
    """Return the statistics of a parameter's task vectors, on the CPU."""
    k_tasks = len(deltas)
    gram_KK = torch.zeros(k_tasks, k_tasks, dtype=torch.float64)
    agreeing = 0.0
    for rows in deltas.chunks():
        shape = (k_tasks, rows.stop - rows.start, deltas.matrix_shape[1])
        chunk_KRC = torch.empty(shape, dtype=deltas.dtype, device=deltas.device)
        for k in range(k_tasks):
            deltas.chunk(k, rows, out=chunk_KRC[k])
        flat_KE = chunk_KRC.view(k_tasks, -1)
        # Products in the deltas' dtype, fast on chunks; sums over chunks in fp64.
        gram_KK += (flat_KE @ flat_KE.T).to("cpu", torch.float64)
        # In place, as the chunk is not used again; hence after the Gram matrix.
        agreeing += float(flat_KE.sign_().sum(dim=0).abs_().sum())
    return Measures(gram_KK, agreeing / (k_tasks * max(1, deltas.shape.numel())))


def measure_factors(factors_K: Sequence[Factors]) -> Measures:
    """Return the statistics of low-rank deltas without forming them; signs are not measured."""
    # <L_a R_a, L_b R_b> = sum of (L_a^T L_b) * (R_a R_b^T): (r, r) matrices only.
    products = [
        [float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum()) for b in factors_K]
        for a in factors_K
    ]
    return Measures(torch.tensor(products, dtype=torch.float64), None)
