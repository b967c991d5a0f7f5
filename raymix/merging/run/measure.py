"""What a merge report says about the tasks of one parameter, in one pass over chunks.

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
    """Inner products of the tasks and how far their signs agree."""

    gram_KK: Tensor
    """Inner products, shape (K, K), fp64."""
    sign_agreement: float | None
    """Mean over entries of |sum of the tasks' signs| / K: 1 if all tasks agree everywhere; None
    where it is not measured."""

    @property
    def norms(self) -> list[float]:
        """Return the Frobenius norms of the tasks."""
        return [math.sqrt(value) for value in self.gram_KK.diagonal().clamp_min(0).tolist()]

    def document(self) -> dict[str, Any]:
        """Return the figures for the report; `alignment` is the mean cosine of two tasks."""
        norms = self.norms
        cosines = [
            float(self.gram_KK[i, j]) / (norms[i] * norms[j])
            for i in range(len(norms))
            for j in range(i + 1, len(norms))
            if norms[i] and norms[j]
        ]
        return {
            "task_norms": [rounded(norm) for norm in norms],
            "sign_agreement": rounded(self.sign_agreement),
            "cosines": [rounded(cosine) for cosine in cosines],
            "alignment": rounded(sum(cosines) / len(cosines)) if cosines else None,
        }


def measure(deltas: Deltas) -> Measures:
    """Return the measures of a parameter's task vectors."""
    k_tasks = len(deltas)
    gram_KK = torch.zeros(k_tasks, k_tasks, dtype=torch.float64)
    agreeing = 0.0
    for rows in deltas.chunks():
        shape = (k_tasks, rows.stop - rows.start, deltas.matrix_shape[1])
        chunk_KRC = torch.empty(shape, dtype=deltas.dtype, device=deltas.device)
        for k in range(k_tasks):
            deltas.chunk(k, rows, out=chunk_KRC[k])
        flat_KE = chunk_KRC.view(k_tasks, -1)
        gram_KK += (flat_KE @ flat_KE.T).to("cpu", torch.float64)
        agreeing += float(flat_KE.sign_().sum(dim=0).abs_().sum())
    return Measures(gram_KK, agreeing / (k_tasks * max(1, deltas.shape.numel())))


def measure_factors(factors_K: Sequence[Factors]) -> Measures:
    """Return the same of low-rank deltas, without forming them; their signs are not measured."""
    products = [
        [float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum()) for b in factors_K]
        for a in factors_K
    ]
    return Measures(torch.tensor(products, dtype=torch.float64), None)
