"""Merging models of one architecture, parameter by parameter.

Read in this order: `recipe` (the merge file), `registry` (methods, task vectors), `methods/` (the
mathematics; no files, no Ray), `checkpoints/` (reading and writing weights), `run/` (plan, jobs on
threads or as Ray tasks, resume; `run.engine.merge` is `raymix.merge`), `search_space` (the points
that a search of a merge's options tries). A method is a function `(base, deltas, options) -> delta`
registered by `@merge_method`; other packages add theirs by the entry-point group
`raymix.merge_methods`.

Choice of method. D_k = W_k - W_0 is task k's delta, an m x n matrix; K tasks. "Reads" are passes
over all memory-mapped inputs; "select" finds an order statistic without sorting.

| method | merges | base | cost per matrix beyond one read | LoRA out | when |
|---|---|---|---|---|---|
| linear | weighted mean of the models | no | none | yes | runs of one recipe; checkpoints |
| slerp | arc between two models | first | one read | no | two models, similar norms |
| multislerp | mean on the sphere | optional | one read | no | several of different scale |
| task_arithmetic | W_0 + lambda sum D_k | yes | none | yes | the baseline; tune lambda |
| ties | trimmed, sign elected, mean of agreeing tasks | yes | K selects | no | conflicting tasks |
| dare_ties, dare_linear | random drops, rescaled | yes | K draws, 2 reads | no | redundant deltas |
| della, della_linear | the same, drops by rank in the row | yes | K row sorts | no | as DARE |
| breadcrumbs, breadcrumbs_ties | both ends cut | yes | K selects | no | outliers in the deltas |
| model_stock | mean, scaled by how far tasks agree | yes | one read | no | few runs of one task |
| drm | TIES in a shared basis, rows renormalized | yes | K m^2 n, 9 m^3 | yes | conflicting tasks |
| knots | TIES in a shared basis | yes | as drm | yes | LoRA adapters |
| tsv | top 1/K directions of each, orthogonal | yes | 9 K min(m, n)^3 | yes | many tasks |
| iso_c | the sum with a flat spectrum | yes | 9 min(m, n)^3 | yes | many tasks, cheap |
| iso_cts | the same, and each task's own | yes | 9 (K + 1) min(m, n)^3 | yes | many tasks |

The last column repeats the papers; the quality of merged models was not measured here. DRM-H takes
m = outputs, DRM-V m = inputs, `auto` the smaller side of each matrix. H and V are different
methods, so `auto` changes the result: it is an option, not an optimization. Parameters that are no
weight matrices (biases, norms, embeddings, the head) are merged entry by entry under all spectral
methods. Where LoRA adapters are merged into an adapter, no m x n matrix is formed and the result is
exact.

Numerics. Arithmetic is fp32 (`precision: float64` for fp64), the output's dtype that of the base.
DRM's Gram matrix is summed and solved in fp64 with both. Relative error of DRM-H's merged delta
against fp64 throughout, drop 0.8, K = 3, deltas with dense noise of nearly full rank (`python -m
tests.benchmarks.merge --sizes accuracy`; in brackets CPU seconds per matrix on a busy core):

| decomposition | 768 x 768 | 768 x 2048 | 2048 x 768 |
|---|---|---|---|
| `gram` (the default) | 4e-7 (0.25) | 4e-7 (0.43) | 4e-4 (2.7) |
| `svd`, fp64, the reference | 4e-7 (1.6) | 4e-7 (5.2) | 4e-4 (10.6) |
| `gram_fp32` | 2.8 % (0.18) | 5.6 % (0.35) | 9.8 % (2.0) |
| `svd_fp32`, as published | 0.5 % (0.90) | 0.8 % (3.6) | 0.7 % (5.7) |
| `gram` with `precision: float64` | 7e-13 | 6e-13 | 1e-12 |

The first two agree with each other: the remaining error is fp32 rounding of entries at the
threshold or of sums near 0, whose sign is undecided (up to 1e-3 with other seeds). The singular
values of the bulk are nearly equal, so fp32 rotates their vectors, while masks and signs act entry
by entry. `randomized` is accurate for low rank only and is never a default.

Ties: bf16 deltas take few values, so many entries equal a threshold. All of them survive, and the
report has the resulting density; mergekit takes the first k of an order that its sort leaves open.
"""

from __future__ import annotations

from raymix.merging.methods import drm, entrywise, spectral, spherical
from raymix.merging.recipe import MergeFile, ModelEntry, ParameterRule, load_merge
from raymix.merging.registry import (
    Deltas,
    Factors,
    Merged,
    MergeMethod,
    Options,
    PerModel,
    get_method,
    known_methods,
    merge_method,
)
from raymix.merging.run.engine import merge

__all__ = [
    "Deltas",
    "Factors",
    "MergeFile",
    "MergeMethod",
    "Merged",
    "ModelEntry",
    "Options",
    "ParameterRule",
    "PerModel",
    "drm",
    "entrywise",
    "get_method",
    "known_methods",
    "load_merge",
    "merge",
    "merge_method",
    "spectral",
    "spherical",
]
