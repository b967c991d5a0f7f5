"""Predictions beside a run's measurements: planned schedules, and losses by a mixing law.

In document mode `schedule.jsonl` records, for some steps, the documents' lengths, the layout and
the cost model; a schedule is a pure function of these and is planned again here. The law is that
of the search that the run belongs to. Shapes: E evaluations, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raymix._utils.json import parse_json
from raymix.errors import RaymixError
from raymix.laws import law_from_dict
from raymix.report.data.read import RunRecord
from raymix.report.data.steps import Document, Floats, is_step, number
from raymix.schedule import CostModel, Layout, Schedule, training_planner

SCHEDULE = "schedule.jsonl"
LAW = "law.json"
# The first step, whose mixture is the initial one, and the last three.
_SCHEDULES_SHOWN = 4
# A damaged line must not start a plan that takes minutes.
_MAX_DOCUMENTS = 100_000


def schedules(run: RunRecord, notes: list[str]) -> list[Document]:
    """Return the planned schedules of some steps, in their order; none outside document mode.

    Args:
        run: The run.
        notes: Damaged lines are reported here, one sentence each.
    """
    try:
        text = (run.path / SCHEDULE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    by_step: dict[int, Document] = {}
    for line in filter(None, text.split("\n")):
        try:
            planned = _planned(parse_json(line))
        # Damaged numbers that still parse fail wherever the planner first trips over them.
        except (RaymixError, ValueError, TypeError, LookupError, ArithmeticError):
            notes.append(f"{SCHEDULE}: a damaged line is left out.")
            continue
        by_step[planned["step"]] = planned
    steps = sorted(by_step)
    shown = list(dict.fromkeys([*steps[:1], *steps[-(_SCHEDULES_SHOWN - 1) :]]))
    seconds = dict(zip(run.steps.step_S.tolist(), run.steps.seconds_S.tolist(), strict=True))
    return [{**by_step[step], "measured_s": seconds.get(step, np.nan)} for step in shown]


def schedule_of(planned: Mapping[str, Any]) -> Schedule:
    """Return the schedule of a step, planned again from its recorded inputs."""
    recorded = planned["layout"]
    layout = Layout(
        recorded["groups"],
        recorded["context"],
        barrier=recorded["barrier"],
        widths=tuple(recorded["widths"]),
    )
    cost = CostModel.from_document(planned["cost"])
    return training_planner(planned["planner"]).plan(planned["lengths"], layout, cost)


def _planned(line: Mapping[str, Any]) -> Document:
    lengths = line["lengths"]
    if not is_step(line["step"]) or not 0 < len(lengths) <= _MAX_DOCUMENTS:
        raise ValueError("no step, or no documents")
    schedule = schedule_of(line)
    busy = schedule.timing.busy_MR.sum()
    return {
        "step": line["step"],
        "documents": len(lengths),
        "tokens": int(sum(lengths)),
        "micro_steps": schedule.micro_steps,
        "shared": int((schedule.placement.width_K > 1).sum()),
        "busy_share": float(busy / (schedule.layout.ranks * schedule.seconds)),
        "planned_s": schedule.seconds,
        **{key: line[key] for key in ("planner", "layout", "cost", "lengths")},
    }


def law_of(run: RunRecord, notes: list[str]) -> Document | None:
    """Return the held-out losses that the law of a run's search predicts; None without a law.

    The law is `law.json` in the run's directory or in that of the search around it. Laws are fitted
    to constant shares, so there is no prediction for a run whose mixture changes.

    Args:
        run: The run.
        notes: A damaged law is reported here, in one sentence.
    """
    # `tune` keeps the law beside the directories of its runs.
    places = [folder / LAW for folder in (run.path, run.path.resolve().parent)]
    place = next((path for path in places if path.is_file()), None)
    if place is None or run.log is None or len(run.log.entries) != 1:
        return None
    try:
        return _predicted(place, run)
    except (OSError, RaymixError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        notes.append(f"{LAW} beside the run cannot be used ({first}).")
        return None


def _predicted(place: Path, run: RunRecord) -> Document | None:
    document = parse_json(place.read_text(encoding="utf-8"))
    law = law_from_dict(document)
    assert run.log is not None
    shares = dict(zip(run.log.domains, run.log.entries[0].weights, strict=True))
    # A law of other domains says nothing of this run; that is no fault of either.
    if set(law.domains) != set(shares):
        return None
    # Laws are fitted to trained models: step 0 is outside their domain.
    step_E = np.array([e.step for e in run.evaluations if e.step], dtype=np.float64)
    share_ED = np.tile([shares[name] for name in law.domains], (step_E.size, 1))
    loss_EV = law.predict(share_ED, step_E) if step_E.size else np.zeros((0, len(law.targets)))
    scores = (
        ((document.get("report") or {}).get("mean") or {}) if isinstance(document, dict) else {}
    )
    return {
        "kind": law.kind,
        "file": str(place),
        "step": step_E,
        "tokens": _tokens(run, step_E),
        "loss": {name: loss_EV[:, at] for at, name in enumerate(law.targets)},
        "error": _error(run, law.targets, step_E, loss_EV),
        "unseen": {key: value for key, value in scores.items() if isinstance(value, float)},
    }


def _tokens(run: RunRecord, step_E: Floats) -> Floats:
    # A cut-off metrics file may lack the very step of an evaluation: the one before it stands in.
    after = np.searchsorted(run.steps.step_S, step_E, side="right")
    return np.array([run.steps.tokens_S[at - 1] if at else 0.0 for at in after.tolist()])


def _error(run: RunRecord, targets: tuple[str, ...], step_E: Floats, loss_EV: Floats) -> float:
    """Return the mean over losses of the last prediction's relative error."""
    if not step_E.size:
        return float("nan")
    last = {name: number(row.get("loss")) for name, row in run.evaluations[-1].domains.items()}
    errors = [
        abs(loss_EV[-1, at] / last[name] - 1) for at, name in enumerate(targets) if name in last
    ]
    return float(np.mean(errors)) if errors else float("nan")
