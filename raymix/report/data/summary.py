"""Summary of a run in JSON types: the data of the JSON twin and of most of the page.

Shapes: S recorded steps, V entries of the mixture log, E evaluations, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from raymix.report.data import predictions
from raymix.report.data.exactness import RealizedMixture, bound, realized_mixture, usable_tokens
from raymix.report.data.read import RunRecord
from raymix.report.data.steps import Document, Floats, Steps, number
from raymix.sampling import DOMAINS_CHANGE
from raymix.store import Manifest

_SIGNALS = ("grad_norm2", "grad_noise", "alignment")
# As many points as a figure has pixels; more only make the page larger.
MAX_POINTS = 800
# As many as there are colors that can be told apart.
MAX_SERIES = 10
MAX_PANELS = 24
MAX_ROWS = 40


def summarize(run: RunRecord) -> Document:
    """Return the summary of a run in JSON types, NaN as None; keys and values are stable."""
    shares_VD = _shares(run)
    realized = realized_mixture(run, _asked(run, shares_VD))
    domains = _domains(run, realized)
    notes = [*run.notes, *_domain_changes(run)]
    scheduled = predictions.schedules(run, notes)
    document = {
        "name": run.name,
        "path": run.where,
        "state": _state(run),
        "header": _header(run),
        "domains": domains,
        "training": _training(run),
        "weights": _weights(run, shares_VD),
        "heldout": _heldout(run, domains),
        "signals": _signals(run),
        "exactness": _exactness(run, realized, shares_VD),
        "law": predictions.law_of(run, notes),
        "notes": notes,
    }
    # Costs keep all their digits: a planner that breaks ties by them must plan the same again.
    exact = [{**step, "measured_s": plain(step["measured_s"])} for step in scheduled]
    return {**plain(document), "schedules": exact}


def _domain_changes(run: RunRecord) -> Iterator[str]:
    for entry in run.log.entries if run.log else ():
        changed = (entry.stats or {}).get(DOMAINS_CHANGE)
        if isinstance(changed, dict):
            words = [f"{key} {', '.join(names[:8])}" for key, names in changed.items() if names]
            yield f"From step {entry.first_step:,} on other domains: {'; '.join(words)}."


def _shares(run: RunRecord) -> Floats:
    """Return the shares of each mixture, shape (V, D): the log's, else those of the metrics."""
    if run.log is not None and run.log.entries:
        return np.array([entry.weights for entry in run.log.entries], dtype=np.float64)
    # A run without its log still has the shares in its metrics, if not when they were asked.
    recorded = [shares for shares in run.steps.shares if shares]
    changes = [new for old, new in zip([None, *recorded], recorded, strict=False) if new != old]
    return np.array(
        [[number(shares.get(name, 0.0)) for name in run.domains] for shares in changes]
    ).reshape(len(changes), len(run.domains))


def _asked(run: RunRecord, shares_VD: Floats) -> Iterator[Floats]:
    """Yield the shares asked in each recorded step, shape (D,)."""
    if not len(shares_VD):
        for _ in range(len(run.steps)):
            yield np.full(len(run.domains), np.nan)
        return
    if run.log is None or not run.log.entries:
        yield from _asked_by_metrics(run, shares_VD)
        return
    # A log may begin with a later version where its head was cut off.
    first = run.log.entries[0].version
    versions = run.steps.version_S.tolist()
    for step, version in zip(run.steps.step_S.tolist(), versions, strict=True):
        # A line without a version follows the log by its step; `step` counts the steps done.
        at = version - first if version >= first else run.log.at(max(step - 1, 0)).version - first
        yield shares_VD[min(at, len(shares_VD) - 1)]


def _asked_by_metrics(run: RunRecord, shares_VD: Floats) -> Iterator[Floats]:
    at, last = -1, None
    for shares in run.steps.shares:
        if shares and shares != last:
            at, last = at + 1, shares
        yield shares_VD[max(at, 0)]


def _state(run: RunRecord) -> str:
    # The recipe may give the length of a run in tokens; the environment has it in steps.
    planned = run.environment.get("steps") or (run.recipe.get("train") or {}).get("steps")
    done = int(run.steps.step_S[-1]) if run.steps.step_S.size else 0
    if not isinstance(planned, int):
        return f"{done:,} steps"
    if done >= planned:
        return f"finished: {done:,} steps"
    return f"unfinished: {done:,} of {planned:,} steps"


def _header(run: RunRecord) -> Document:
    """Return the facts of the page's header by key; absent ones are left out."""
    environment, steps = run.environment, run.steps
    packages = environment.get("packages") or {}
    manifest = run.corpus.manifest if run.corpus else None
    # The median, as the first step waits for the first blocks and warms up.
    finite = steps.tokens_per_s_S[np.isfinite(steps.tokens_per_s_S)]
    head: Document = {
        "model": _model(run),
        "parameters": environment.get("parameters"),
        "tokens": _last(steps.tokens_S),
        "tokens_per_s": float(np.median(finite)) if finite.size else None,
        "mixer": (run.recipe.get("mixer") or {}).get("kind"),
        "corpus": (run.recipe.get("corpus") or {}).get("path"),
        "corpus_fingerprint": manifest.fingerprint if manifest else None,
        "corpus_tokens": _training_tokens(manifest),
        "tokenizer": manifest.tokenizer.fingerprint if manifest else None,
        "vocabulary": manifest.tokenizer.vocab_size if manifest else None,
        "machine": _machine(environment),
        "workers": (run.recipe.get("cluster") or {}).get("workers"),
        "versions": {name: version for name, version in packages.items() if version},
        "python": environment.get("python"),
        "revision": environment.get("revision"),
        "started": environment.get("started"),
        "seed": run.recipe.get("seed"),
    }
    return {key: value for key, value in head.items() if value not in (None, {}, "")}


def _training_tokens(manifest: Manifest | None) -> int | None:
    if manifest is None:
        return None
    return sum(domain.train.tokens for domain in manifest.domains.values())


def _model(run: RunRecord) -> str | None:
    model = run.recipe.get("model") or {}
    return model.get("path") if model.get("kind") == "pretrained" else model.get("type")


def _machine(environment: Document) -> str | None:
    parts = [str(environment[key]) for key in ("gpu", "device") if environment.get(key)]
    if environment.get("cores"):
        parts.append(f"{environment['cores']} cores")
    if isinstance(environment.get("memory_bytes"), int):
        parts.append(f"{environment['memory_bytes'] / 2**30:.0f} GiB of memory")
    if environment.get("platform"):
        parts.append(str(environment["platform"]))
    return ", ".join(parts) or None


def _domains(run: RunRecord, realized: RealizedMixture) -> dict[str, Document]:
    """Return one row per domain, in order of tokens where a table cannot show them all."""
    asked = realized.asked_D.sum()
    read_D = realized.read_D
    read = read_D.sum() if read_D is not None else 0.0
    rows = {}
    for at, name in enumerate(run.domains):
        info = run.corpus.manifest.domains.get(name) if run.corpus else None
        usable = usable_tokens(run, name)
        scored = [e.domains[name] for e in run.evaluations if name in e.domains]
        tokens = read_D[at] if read_D is not None else realized.asked_D[at]
        rows[name] = {
            "tokens": tokens,
            "share_asked": _ratio(realized.asked_D[at], asked),
            "share_realised": _ratio(read_D[at], read) if read_D is not None else math.nan,
            "epochs": _ratio(tokens, usable or 0),
            "loss_first": number(scored[0].get("loss")) if scored else math.nan,
            "loss_last": number(scored[-1].get("loss")) if scored else math.nan,
            # The manifest has 0 for a domain without held-out text, which is no entropy.
            "unigram_entropy": (info.valid.unigram_entropy if info else 0) or math.nan,
            "bits_per_byte": number(scored[-1].get("bits_per_byte")) if scored else math.nan,
        }
    # Few domains stay in the recipe's order, in which the user knows them.
    if len(rows) > MAX_ROWS:
        rows = dict(sorted(rows.items(), key=lambda item: -_finite(item[1]["tokens"])))
    return rows


def _ratio(part: float, whole: float) -> float:
    """Return `part / whole`; NaN where there is none, as in files with infinite counts."""
    return float(part) / float(whole) if whole and math.isfinite(whole) else math.nan


def _training(run: RunRecord) -> Document:
    steps = run.steps
    points = thinned(len(steps))
    window = training_window(steps)
    return {
        "step": steps.step_S[points],
        "tokens": steps.tokens_S[points],
        "loss": steps.loss_S[points],
        "loss_smooth": smoothed(steps.loss_S, window)[points],
        "smoothing_steps": window,
        "lr": steps.lr_S[points],
        "tokens_per_s": steps.tokens_per_s_S[points],
        "tokens_per_s_smooth": smoothed(steps.tokens_per_s_S, window)[points],
        "data_wait": steps.data_wait_S[points],
        "data_wait_smooth": smoothed(steps.data_wait_S, window)[points],
    }


def _weights(run: RunRecord, shares_VD: Floats) -> Document:
    """Return the requested shares where they change, with the smallest domains summed up."""
    last = int(run.steps.step_S[-1]) if run.steps.step_S.size else 0
    if not len(shares_VD):
        return {"step": [], "shares": {}}
    if run.log is not None and run.log.entries:
        # Entries are logged before they apply; those after the last step were never used.
        starts = np.array([entry.first_step for entry in run.log.entries])
        used = np.flatnonzero(starts < max(last, 1))
        starts, shares_VD = starts[used], shares_VD[used]
    else:
        # The metrics do not say at which step a change was asked: spread evenly.
        starts = np.linspace(0, last, len(shares_VD), endpoint=False).astype(np.int64)
    points = thinned(len(starts))
    starts, shares_VD = starts[points], shares_VD[points]
    order = np.argsort(-shares_VD.mean(axis=0), kind="stable")
    # Domains that never had a share would take a color and a label for nothing.
    order = order[shares_VD[:, order].any(axis=0)]
    top = np.sort(order if len(order) <= MAX_SERIES else order[: MAX_SERIES - 1])
    shares = {run.domains[at]: shares_VD[:, at] for at in top.tolist()}
    if len(top) < len(order):
        rest = np.setdiff1d(order, top)
        shares[f"{len(rest):,} others"] = shares_VD[:, rest].sum(axis=1)
    return {"step": starts, "until": last, "shares": shares}


def _heldout(run: RunRecord, domains: dict[str, Document]) -> Document:
    largest = sorted(domains, key=lambda name: -_finite(domains[name]["tokens"]))[:MAX_PANELS]
    shown = [name for name in domains if name in set(largest)]
    steps = [evaluation.step for evaluation in run.evaluations]
    return {
        "step": steps,
        "tokens": _tokens_at(run, steps),
        "loss": {
            name: [number((e.domains.get(name) or {}).get("loss")) for e in run.evaluations]
            for name in shown
        },
        "left_out": len(domains) - len(shown),
    }


def _tokens_at(run: RunRecord, steps: Sequence[int]) -> list[float]:
    done_S, tokens_S = run.steps.step_S, run.steps.tokens_S
    # An evaluation is after a step, or after the last one that the metrics still have.
    after = np.searchsorted(done_S, steps, side="right")
    return [float(tokens_S[at - 1]) if at else 0.0 for at in after.tolist()]


def _signals(run: RunRecord) -> Document | None:
    """Return gradient signals per kind and domain at each log entry, None without any.

    Of many domains, those with the largest mean magnitude of the first kind.
    """
    entries = [entry for entry in (run.log.entries if run.log else ()) if entry.stats]
    measured_VD = {
        kind: np.array([_row(entry.stats or {}, kind, len(run.domains)) for entry in entries])
        for kind in _SIGNALS
    }
    measured_VD = {kind: rows for kind, rows in measured_VD.items() if np.isfinite(rows).any()}
    if not measured_VD:
        return None
    points = thinned(len(entries))
    first_VD = next(iter(measured_VD.values()))
    means_D = np.nan_to_num(np.abs(first_VD)).mean(axis=0)
    top = np.sort(np.argsort(-means_D, kind="stable")[:MAX_SERIES]).tolist()
    return {
        "step": [entries[at].first_step for at in points.tolist()],
        "left_out": len(run.domains) - len(top),
        "values": {
            kind: {run.domains[at]: value_VD[points, at] for at in top}
            for kind, value_VD in measured_VD.items()
        },
    }


def _row(stats: dict[str, Any], kind: str, domains: int) -> Floats:
    """Return the values of a kind by domain, shape (D,), NaN where the entry lacks them."""
    given = stats.get(kind)
    if not isinstance(given, list) or len(given) != domains:
        return np.full(domains, np.nan)
    return np.array([number(item) for item in given], dtype=np.float64)


def _exactness(run: RunRecord, realized: RealizedMixture, shares_VD: Floats) -> Document | None:
    proved = bound(run, shares_VD, capped=realized.capped)
    if proved is None or realized.read_D is None:
        return None
    points = thinned(len(run.steps))
    return {
        "step": run.steps.step_S[points],
        "ahead": realized.ahead_S[points],
        "behind": realized.behind_S[points],
        "most_ahead": realized.ahead_S.max(),
        "most_behind": realized.behind_S.min(),
        "bound_ahead": proved.ahead,
        "bound_behind": proved.behind,
        "unit": proved.unit,
        "because": proved.because,
    }


def training_window(steps: Steps) -> int:
    """Return the steps that a smoothed training curve averages over."""
    return max(5, len(steps) // 40)


def thinned(length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return at most `MAX_POINTS` indices into `length` values, evenly spread, ends included."""
    if length <= MAX_POINTS:
        return np.arange(length, dtype=np.int64)
    return np.unique(np.linspace(0, length - 1, MAX_POINTS).round().astype(np.int64))


def smoothed(values_S: Floats, window: int) -> Floats:
    """Return the centered moving mean over `window` steps, NaN ignored, shape (S,)."""
    known = np.isfinite(values_S)
    # Prefix sums: a window of a long run's fortieth makes the direct way quadratic.
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values_S, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values_S))
    low = np.maximum(at - window // 2, 0)
    high = np.minimum(at + (window + 1) // 2, len(values_S))
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.divide(total, count, out=np.full(len(values_S), np.nan), where=count > 0)


def _last(values: Floats) -> float | None:
    return float(values[-1]) if values.size and np.isfinite(values[-1]) else None


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def plain(value: Any) -> Any:
    """Return `value` in JSON types: arrays as lists, floats to 7 digits, NaN as None.

    JSON has no NaN, and browsers refuse the one that Python writes.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    # Seven digits, those of single precision: more would only make the file larger.
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
