"""Mixing laws: predict a run's losses from its shares and length, after a few small runs."""

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
from raymix.laws.entropy import entropy_shares, shares_of_entropy, von_neumann_entropy
from raymix.laws.feasible import Problem, Region, feasible
from raymix.laws.minimise import minimise, optimum_at
from raymix.laws.objective import Objective, Optimum
from raymix.laws.seen import Seen
from raymix.laws.separable import SeparableOptimum, separable_optimum
from raymix.laws.table import MixtureTable, concatenate, make_table, read_table

__all__ = [
    "FitReport",
    "Law",
    "MixtureTable",
    "Objective",
    "Optimum",
    "Problem",
    "Region",
    "Score",
    "Seen",
    "SeparableOptimum",
    "build_law",
    "concatenate",
    "entropy_shares",
    "feasible",
    "known_laws",
    "law",
    "law_from_dict",
    "law_to_dict",
    "make_table",
    "mean_score",
    "minimise",
    "optimum_at",
    "read_table",
    "separable_optimum",
    "shares_of_entropy",
    "von_neumann_entropy",
]
