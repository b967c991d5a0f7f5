"""What a run foresaw: the schedules of its documents, and the losses of a law.

In document mode `schedule.jsonl` holds the documents' lengths of some steps and what they are
dealt out by; a schedule is a pure function of these. A law is the one of the search that the run
is a part of. Shapes: E evaluations, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raymix.errors import RaymixError
from raymix.jsontext import parse_json
from raymix.laws import law_from_dict
from raymix.report.data.read import RunRecord
from raymix.report.data.steps import Document, Floats, is_step, number
from raymix.schedule import CostModel, Layout, Schedule, training_planner

SCHEDULE = "schedule.jsonl"
LAW = "law.json"
# Steps drawn: the first, which is usual enough, and the last ones.
_DRAWN = 4
_MOST_DOCUMENTS = 100_000


def schedules(run: RunRecord, notes: list[str]) -> list[Document]:
    """Return the schedules of some steps as they were planned, rising; none outside document mode.

    Args:
        run: The run.
        notes: Gets what is damaged, in words.
    """
    try:
        text = (run.path / SCHEDULE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found: dict[int, Document] = {}
    for line in filter(None, text.split("\n")):
        try:
            planned = _planned(parse_json(line))
        except (RaymixError, ValueError, TypeError, LookupError, ArithmeticError):
            notes.append(f"{SCHEDULE}: a damaged line is left out.")
            continue
        found[planned["step"]] = planned
    steps = sorted(found)
    kept = list(dict.fromkeys([*steps[:1], *steps[-(_DRAWN - 1) :]]))
    seconds = dict(zip(run.steps.step_S.tolist(), run.steps.seconds_S.tolist(), strict=True))
    return [{**found[step], "measured_s": seconds.get(step, np.nan)} for step in kept]


def schedule_of(planned: Mapping[str, Any]) -> Schedule:
    """Return the schedule of a step, made again as it was made."""
    told = planned["layout"]
    widths = tuple(told["widths"])
    layout = Layout(told["groups"], told["context"], barrier=told["barrier"], widths=widths)
    cost = CostModel.from_document(planned["cost"])
    return training_planner(planned["planner"]).plan(planned["lengths"], layout, cost)


def _planned(line: Mapping[str, Any]) -> Document:
    lengths = line["lengths"]
    if not is_step(line["step"]) or not 0 < len(lengths) <= _MOST_DOCUMENTS:
        raise ValueError("no step, or no documents")
    schedule = schedule_of(line)
    busy = schedule.timing.busy_MR.sum()
    return {
        "step": line["step"],
        "documents": len(lengths),
        "tokens": int(sum(lengths)),
        "micro_steps": schedule.micro_steps,
        "shared": int((schedule.placed.width_K > 1).sum()),
        "busy_share": float(busy / (schedule.layout.ranks * schedule.seconds)),
        "planned_s": schedule.seconds,
        **{key: line[key] for key in ("planner", "layout", "cost", "lengths")},
    }


def law_of(run: RunRecord, notes: list[str]) -> Document | None:
    """Return what the law of a run's search says of its held-out losses; None without a law.

    It is `law.json` in the run's directory or in that of the search around it. A law speaks of
    constant shares, so a run whose mixture changes has none.

    Args:
        run: The run.
        notes: Gets what is damaged, in words.
    """
    places = [folder / LAW for folder in (run.path, run.path.resolve().parent)]
    place = next((path for path in places if path.is_file()), None)
    if place is None or run.log is None or len(run.log.entries) != 1:
        return None
    try:
        return _foretold(place, run)
    except (OSError, RaymixError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        notes.append(f"{LAW} beside the run cannot be used ({first}).")
        return None


def _foretold(place: Path, run: RunRecord) -> Document | None:
    document = parse_json(place.read_text(encoding="utf-8"))
    law = law_from_dict(document)
    assert run.log is not None
    shares = dict(zip(run.log.domains, run.log.entries[0].weights, strict=True))
    if set(law.domains) != set(shares):
        return None
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
    after = np.searchsorted(run.steps.step_S, step_E, side="right")
    return np.array([run.steps.tokens_S[at - 1] if at else 0.0 for at in after.tolist()])


def _error(run: RunRecord, targets: tuple[str, ...], step_E: Floats, loss_EV: Floats) -> float:
    """Return the mean relative error of the last prediction over the losses."""
    if not step_E.size:
        return float("nan")
    last = {name: number(row.get("loss")) for name, row in run.evaluations[-1].domains.items()}
    errors = [
        abs(loss_EV[-1, at] / last[name] - 1) for at, name in enumerate(targets) if name in last
    ]
    return float(np.mean(errors)) if errors else float("nan")
