"""Mixing laws: predict a run's losses from its shares and length, after a few small runs.

`build_law(kind).fit(table)` learns from a mixture table and says how far it can be trusted;
`predict` answers for shares nobody has run, `minimize` finds the best ones. Packages outside add
kinds with `@law("kind")`.

| kind | log loss | runs needed | optimum | when |
|---|---|---|---|---|
| bimix | own share and steps, as published | 3 or 4 | closed form | domains that do not interact |
| exponential | exp of a linear form (Data Mixing Laws) | 2 D | convex | the published baseline |
| additive | inverse of a sum of powers | 1 to 2 D | convex | few runs; smooth |
| joint | the same, and steps that depend on shares | 1 to 2 D | as additive | several checkpoints |
| gp | additive or joint, and a process around it | 1 to 2 D | restarts | accuracy, spread |
| regression | ridge on shares and their logs | 2 D | restarts | a check that assumes little |
| lightgbm | boosted trees (RegMix) | 250 and more | search | hundreds of runs; the baseline |
| auto | whichever predicts runs left out best | as that | as that | the default |

Every fit is judged on runs left out, on later steps from earlier ones, and against models that
know less; `FitReport.verdict` says it in words.
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

# Imported for the kinds they register.
_KINDS = (auto, gp, parametric, regression)
