"""Mixing laws: predict a run's losses from its shares and length, after a few small runs.

`build_law(kind).fit(table)` fits a mixture table and reports held-out errors; `predict` evaluates
shares that were not run; `minimize` returns the best shares. Other packages register kinds with
`@law("kind")`. Reading order: `table`, `base`, `cross_validation`, `models/`, `search/`, then
`design` (mixtures of the small runs), `entropy` (shares without runs), `files`.

| kind | log loss | runs needed | optimum | when |
|---|---|---|---|---|
| bimix | own share and steps, as published | 3 or 4 | closed form | independent domains |
| exponential | exp of a linear form (Data Mixing Laws) | 2 D | convex | the published baseline |
| additive | inverse of a sum of powers | 1 to 2 D | convex | few runs; smooth |
| joint | additive, and step terms that depend on shares | 1 to 2 D | as additive | checkpoints |
| gp | additive or joint, plus a Gaussian process | 1 to 2 D | restarts | accuracy, deviations |
| regression | ridge on shares and their logs | 2 D | restarts | a check with few assumptions |
| lightgbm | boosted trees (RegMix) | 250 and more | search | hundreds of runs; the baseline |
| auto | the kind with the smallest held-out error | as that | as that | the default |

Every fit is scored on held-out runs, on later steps predicted from earlier ones, and against null
models; `FitReport.verdict` summarizes the scores.
"""

from raymix.laws.base import (
    FitReport,
    Law,
    Score,
    build_law,
    known_laws,
    law,
    law_from_dict,
    law_to_dict,
    mean_score,
)
from raymix.laws.cross_validation import scores
from raymix.laws.entropy import entropy_shares, shares_of_entropy, von_neumann_entropy
from raymix.laws.files import fit_law, load_law, save_law
from raymix.laws.models import auto, parametric, regression
from raymix.laws.models import gp_law as gp
from raymix.laws.models.auto import AutoLaw
from raymix.laws.models.fitted_law import FittedLaw
from raymix.laws.search.feasible import Problem, Region, feasible
from raymix.laws.search.minimize import minimize, optimum_at
from raymix.laws.search.objective import Objective, Optimum
from raymix.laws.search.separable import Powers, SeparableOptimum, separable_optimum
from raymix.laws.table import MixtureTable, make_table, read_table

__all__ = [
    "AutoLaw",
    "FitReport",
    "FittedLaw",
    "Law",
    "MixtureTable",
    "Objective",
    "Optimum",
    "Powers",
    "Problem",
    "Region",
    "Score",
    "SeparableOptimum",
    "build_law",
    "entropy_shares",
    "feasible",
    "fit_law",
    "known_laws",
    "law",
    "law_from_dict",
    "law_to_dict",
    "load_law",
    "make_table",
    "mean_score",
    "minimize",
    "optimum_at",
    "read_table",
    "save_law",
    "scores",
    "separable_optimum",
    "shares_of_entropy",
    "von_neumann_entropy",
]

# Importing these modules runs their `@law` decorators; the tuple keeps linters from removing
# the imports as unused.
_KINDS = (auto, gp, parametric, regression)
