"""The document of a search for the best shares, of runs whose losses are known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raymix.laws import MixtureTable
from raymix.recipe import TuneConfig
from raymix.store import Corpus
from raymix.tuning.mixtures.candidates import (
    Mixture,
    MixtureSpace,
    design_mixtures,
    optimum_mixture,
    references,
    space_of,
)
from raymix.tuning.mixtures.learn import (
    law_accuracy,
    learn,
    mixture_table,
    optimum_path,
    predict_mixture,
    slices,
)
from raymix.tuning.mixtures.verify import BASELINES, observed_runs, roles_of, verify_mixtures
from tests.unit.tuning.test_candidates import STEPS, recipe, results_of

SEEDS = (1, 2)


def table_of(mixtures: Sequence[Mixture], space: MixtureSpace) -> MixtureTable:
    """Return every evaluation of the runs."""
    return mixture_table(results_of(list(mixtures)), {m.name: m.shares for m in mixtures}, space)


def search_document(corpus: Corpus) -> dict[str, Any]:
    """Return the document of a search, made as `tune` makes it but for training."""
    space = space_of(recipe(corpus), corpus)
    mixtures = design_mixtures(TuneConfig(runs=6), space)
    learned = learn(table_of(mixtures, space), recipe(corpus), space)
    table = table_of(mixtures, space)
    runs = observed_runs(results_of(mixtures), mixtures, learned.objective)
    roles = roles_of(runs, optimum_mixture(learned.optimum.shares, space), references(space))
    tried = results_of(list({m.name: m for m in roles.values()}.values()), seeds=SEEDS)
    return {
        "name": "A <search>",
        "mode": "design",
        "steps": STEPS,
        "horizon": float(STEPS),
        "corpus_fingerprint": "0123456789abcdef",
        "domains": list(space.domains),
        "targets": [],
        "weights": dict(learned.objective.weights or {}),
        "minimax": False,
        "rows": len(table),
        "law": learned.report.law,
        "report": learned.report.document(),
        "judged": law_accuracy(learned, table),
        "optimum": learned.optimum.document(),
        "path": optimum_path(learned, recipe(corpus), table),
        "slices": slices(learned, space, step=float(STEPS)),
        "seeds": list(SEEDS),
        "runs": [
            {**r, "predicted": predict_mixture(learned, r["shares"], step=STEPS)["value"]}
            for r in runs
        ],
        "verified": verify_mixtures(roles, tried, learned, space=space, step=STEPS),
        "failed": 0,
        "problems": {},
        "files": ["tune.json"],
    }


Change = Callable[[dict[str, Any]], object]


def changed(document: Mapping[str, Any], *changes: Change) -> dict[str, Any]:
    """Return a copy of a document, changed."""
    result = copy.deepcopy(dict(document))
    for change in changes:
        change(result)
    return result


def unverified(document: dict[str, Any]) -> None:
    """Take away what `verify: 0` does not measure."""
    document["seeds"] = []
    for row in document["verified"].values():
        row["measured"] = {"mean": None, "sd": None, "by_seed": {}}
        row["error"], row["against"] = None, dict.fromkeys(BASELINES)
