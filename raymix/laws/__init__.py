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
from raymix.laws.objective import Objective, Optimum
from raymix.laws.table import MixtureTable, concatenate, make_table, read_table

__all__ = [
    "FitReport",
    "Law",
    "MixtureTable",
    "Objective",
    "Optimum",
    "Score",
    "build_law",
    "concatenate",
    "known_laws",
    "law",
    "law_from_dict",
    "law_to_dict",
    "make_table",
    "mean_score",
    "read_table",
]
