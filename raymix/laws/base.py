"""The seam between a table of runs and whatever predicts from it: `Law`, what it says, its kinds.

Shapes: R rows, D domains, V targets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from raymix.errors import LawError, did_you_mean
from raymix.laws.table import Floats, MixtureTable

if TYPE_CHECKING:
    from raymix.laws.search.objective import Objective, Optimum

FORMAT = 1
"""Version of the JSON form of a law."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well predictions of one target agree with what was measured."""

    spearman: float
    """Rank correlation; NaN where all are equal."""
    r2: float
    """1 - squared error / squared deviation from the mean."""
    mre: float
    """Mean of |predicted - measured| / measured, as a fraction."""

    def document(self) -> dict[str, float | None]:
        """Return JSON types; NaN becomes None."""
        pairs = {"spearman": self.spearman, "r2": self.r2, "mre": self.mre}
        return {name: None if np.isnan(value) else float(value) for name, value in pairs.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """What a fit is worth: scores on rows that were left out, beside models that know less."""

    law: str
    """Kind of the law."""
    rows: int
    """Rows it was fitted to."""
    runs: int
    """Different runs among them."""
    cpu_s: float
    """Processor seconds of fitting and of judging."""
    verdict: str
    """In plain words: how far to trust it."""
    targets: Mapping[str, Score] = field(default_factory=dict)
    """By target: scores by cross-validation over runs."""
    ahead: Mapping[str, Score] = field(default_factory=dict)
    """By target: later steps, predicted from the earlier ones; empty without steps."""
    nulls: Mapping[str, Score] = field(default_factory=dict)
    """By null model (`mean`, `steps`, `own`): the mean of its scores over targets."""
    candidates: Mapping[str, Score] = field(default_factory=dict)
    """By kind of law that was tried: the mean of its scores over targets."""
    coefficients: Mapping[str, Mapping[str, tuple[float, float, float]]] = field(
        default_factory=dict
    )
    """By target and name: value, and the 90 % interval of a bootstrap over runs."""

    @property
    def mean(self) -> Score:
        """Return the mean of the scores over targets."""
        return mean_score(self.targets)

    def document(self) -> dict[str, Any]:
        """Return the report in JSON types."""

        def scores(given: Mapping[str, Score]) -> dict[str, Any]:
            return {name: score.document() for name, score in given.items()}

        return {
            "law": self.law,
            "rows": self.rows,
            "runs": self.runs,
            "cpu_s": round(self.cpu_s, 3),
            "verdict": self.verdict,
            "targets": scores(self.targets),
            "mean": self.mean.document(),
            "ahead": scores(self.ahead),
            "nulls": scores(self.nulls),
            "candidates": scores(self.candidates),
            "coefficients": {
                target: {name: list(map(float, given)) for name, given in some.items()}
                for target, some in self.coefficients.items()
            },
        }


def mean_score(scores: Mapping[str, Score]) -> Score:
    """Return the mean over targets that have a score, each measure by itself; NaN without any."""

    def mean(values: list[float]) -> float:
        known = [value for value in values if np.isfinite(value)]
        return float(np.mean(known)) if known else np.nan

    every = scores.values()
    return Score(
        spearman=mean([score.spearman for score in every]),
        r2=mean([score.r2 for score in every]),
        mre=mean([score.mre for score in every]),
    )


@runtime_checkable
class Law(Protocol):
    """Predicts the losses of a run from its shares and its length."""

    @property
    def kind(self) -> str:
        """Return the name it is registered under."""
        ...

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the domains of the table it was fitted to: the order of every D axis."""
        ...

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the losses it predicts: the order of every V axis."""
        ...

    @property
    def convex(self) -> bool:
        """Return whether every predicted loss is a convex function of the shares."""
        ...

    @property
    def most_D(self) -> Floats:
        """Return the largest share each domain had in any run of the table, shape (D,)."""
        ...

    def fit(self, table: MixtureTable) -> FitReport:
        """Learn from a table, and return how well rows left out are predicted.

        Raises:
            LawError: If the law cannot be fitted to this table; it is then as it was before.
        """
        ...

    def predict(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return losses, shape (R, V), of shares (R, D) after steps (R,), in the table's unit.

        Without steps it is the last one of the table.
        """
        ...

    def deviation(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return standard deviations of those predictions, in nats, shape (R, V)."""
        ...

    def share_gradient(self, share_D: Floats, step: float | None = None) -> tuple[Floats, Floats]:
        """Return losses, shape (V,), and their derivatives by the shares, shape (V, D)."""
        ...

    def minimize(self, objective: Objective) -> Optimum:
        """Return the best shares, and what proves or supports that there are none better."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted law in JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become a law that was fitted before."""
        ...


LawFactory = Callable[..., Law]
_FACTORIES: dict[str, LawFactory] = {}


def law(kind: str) -> Callable[[LawFactory], LawFactory]:
    """Return a decorator that registers a factory `(**options) -> Law` under `kind`."""

    def register(factory: LawFactory) -> LawFactory:
        _FACTORIES[kind] = factory
        return factory

    return register


def known_laws() -> tuple[str, ...]:
    """Return the kinds that `build_law` can build, sorted."""
    return tuple(sorted(_FACTORIES))


def build_law(kind: str, **options: Any) -> Law:
    """Return a law that is not fitted yet.

    Raises:
        LawError: If the kind is unknown or an option does not fit.
    """
    if kind not in _FACTORIES:
        known = known_laws()
        near = did_you_mean(kind, known)
        raise LawError.at("law", kind, "not a law", allowed=f"Known: {', '.join(known)}", fix=near)
    factory = _FACTORIES[kind]
    taken = inspect.signature(factory).parameters
    if not any(given.kind is given.VAR_KEYWORD for given in taken.values()):
        for name in options.keys() - taken.keys():
            known = f"Options: {', '.join(taken)}" if taken else "It has none"
            near = did_you_mean(name, list(taken))
            raise LawError.at(
                f"law.{name}",
                options[name],
                f"no option of the law {kind!r}",
                allowed=known,
                fix=near,
            )
    return factory(**options)


def law_to_dict(fitted: Law, report: FitReport | None = None) -> dict[str, Any]:
    """Return a fitted law as one JSON document, with the report of its fit."""
    return {
        "format": FORMAT,
        "law": fitted.kind,
        "domains": list(fitted.domains),
        "targets": list(fitted.targets),
        "state": fitted.state_dict(),
        "report": None if report is None else report.document(),
    }


def law_from_dict(document: Mapping[str, Any]) -> Law:
    """Return the law of a document that `law_to_dict` made.

    Raises:
        LawError: If it is none.
    """
    try:
        if document["format"] != FORMAT:
            raise LawError.at(
                "law.format", document["format"], f"not format {FORMAT}", fix="Fit it again"
            )
        fitted = build_law(document["law"])
        fitted.load_state_dict(document["state"])
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if isinstance(error, LawError):
            raise
        raise LawError.at(
            "law",
            document.get("law"),
            f"no law: {type(error).__name__} {error}",
            fix="Fit it again",
        ) from error
    return fitted
