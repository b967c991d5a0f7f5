"""The part of `unchanged` that runs inside the tree under test: `python -P FILE JOB IN OUT`.

It is run by its path, in a process of its own, so that `raymix` is the one on PYTHONPATH. Names
that a rename of packages keeps are all it imports: `raymix`, `raymix.laws`, `raymix.schedule`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Results = Iterator[tuple[str, Callable[[], Any]]]
"""Names, and how to compute the value: one that cannot be computed must not take the rest along."""


def where(_: Any) -> Results:
    """Yield the directory that raymix is imported from."""
    import raymix

    yield "where", lambda: str(Path(raymix.__file__).parents[1])


def laws(table: str) -> Results:
    """Yield what each kind of law says after it was fitted to the table."""
    from raymix.laws import known_laws

    for kind in known_laws():
        yield f"laws/{kind}", lambda kind=kind: _law(kind, table)


def _law(kind: str, table: str) -> dict[str, Any]:
    import numpy as np

    import raymix
    from raymix.laws import Objective, law_from_dict, law_to_dict

    law, report = raymix.fit_law(table, law=kind)
    share_RD = np.random.default_rng(2).dirichlet(np.ones(len(law.domains)), 6)
    step_R = np.full(6, 800.0)
    limits = Objective(floors={law.domains[0]: 0.1}, caps={law.domains[1]: 0.5}, horizon=800)
    again = law_from_dict(json.loads(json.dumps(law_to_dict(law, report))))
    return {
        "predicted": law.predict(share_RD, step_R).tolist(),
        "predicted_last_step": law.predict(share_RD).tolist(),
        "predicted_by_the_written_law": again.predict(share_RD, step_R).tolist(),
        "deviation": law.deviation(share_RD, step_R).tolist(),
        "optimum": _optimum(law, Objective()).document(),
        "optimum_within_limits": _optimum(law, limits).document(),
        "report": report.document(),
    }


def _optimum(law: Any, objective: Any) -> Any:
    """Return the optimum under a law, whose method was spelled in British English before."""
    method = getattr(law, "minimize", None) or law.minimise
    return method(objective)


def planners(_: Any) -> Results:
    """Yield the plan of every planner for two distributions of lengths on two layouts."""
    from raymix.schedule import Layout, known_planners, preset, sample_lengths

    layouts = {
        "2x4": Layout(2, 4, widths=(2,)),
        "3x2-all": Layout(3, 2, barrier="all"),
    }
    cost = preset("0.5b", "slow")
    for name in known_planners():
        # Exact plans take seconds for ten sequences, hours for forty.
        count = {"milp": 8, "flexsp": 24}.get(name, 40)
        for source in ("chatqa2", "longalign"):
            length_K = sample_lengths(source, count, seed=3, longest=40_000)
            for shape, layout in layouts.items():
                yield (
                    f"planners/{name}/{source}/{shape}",
                    lambda a=(length_K, layout, cost, name): _planned(*a),
                )


def _planned(length_K: Any, layout: Any, cost: Any, planner: str) -> dict[str, Any]:
    import raymix

    return raymix.plan_batch(length_K, layout, cost, planner).document()


def merges(files: dict[str, Any]) -> Results:
    """Yield the reports of merges into `merged/NAME`; the caller hashes what was written."""
    for name, document in files.items():
        yield f"merges/{name}/summary", lambda name=name, doc=document: _merged(name, doc)


def _merged(name: str, document: dict[str, Any]) -> dict[str, Any]:
    import raymix

    return raymix.merge(document, f"merged/{name}")


def runs(given: dict[str, Any]) -> Results:
    """Yield the summaries of runs; the caller reads their directories."""
    import raymix

    if given["cluster"]:
        import ray

        # One cluster for all runs: its workers have imported torch when the second run starts.
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init("local", num_cpus=4, object_store_memory=200_000_000, **options)
    for name, path in given["recipes"].items():
        yield (
            f"runs/{name}/summary",
            # Drawing a report takes longer than such a run.
            lambda path=path: raymix.train(raymix.load_recipe(path), report=given["report"]),
        )


def plans(recipes: dict[str, list[str]]) -> Results:
    """Yield the plan of each recipe: path, then changes."""
    import raymix

    for name, (path, *changes) in recipes.items():
        yield (
            f"plan/{name}",
            lambda path=path, changes=changes: raymix.plan(
                raymix.load_recipe(path, changes)
            ).document(),
        )


def messages(recipes: dict[str, list[str]]) -> Results:
    """Yield what each recipe is refused with, and the resolved form of the others."""
    for name, (path, *changes) in recipes.items():
        yield f"messages/{name}", lambda path=path, changes=changes: _answer(path, changes)


def _answer(path: str, changes: list[str]) -> dict[str, Any]:
    import raymix

    try:
        recipe = raymix.load_recipe(path, changes)
        raymix.plan(recipe)
    except raymix.RaymixError as error:
        return {"error": type(error).__name__, "problems": list(error.problems)}
    return {"recipe": raymix.recipe_to_yaml(recipe).splitlines()}


JOBS: dict[str, Callable[[Any], Results]] = {
    job.__name__: job for job in (where, laws, planners, merges, runs, plans, messages)
}


def main(job: str, source: str, out: str) -> None:
    """Do one job; write its results, and for one that failed why."""
    given = json.loads(Path(source).read_text("utf-8"))
    results: dict[str, Any] = {}
    for name, compute in JOBS[job](given):
        try:
            results[name] = compute()
        except Exception as error:  # noqa: BLE001 - the rest is recorded all the same
            results[name] = {"FAILED": f"{type(error).__name__}: {error}"}
    Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
