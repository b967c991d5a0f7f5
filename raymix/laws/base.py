"""The `Law` protocol, its fit report, the registry of kinds, and the JSON form.

Callers use `Law` and never a concrete class, so a registered kind of another package is on a par
with the built-in ones.

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
    # At run time this would be a circle: `search` imports `Law` from here.
    from raymix.laws.search.objective import Objective, Optimum

FORMAT = 1
"""Version of the JSON form of a law."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Agreement of predicted and measured losses of one target."""

    spearman: float
    """Rank correlation; NaN where all predictions or all measurements are equal."""
    r2: float
    """1 - squared error / squared deviation from the mean."""
    mre: float
    """Mean of |predicted - measured| / measured, as a fraction."""

    def document(self) -> dict[str, float | None]:
        """Return JSON types; NaN becomes None."""
        # JSON has no NaN, and files are written with `allow_nan=False`.
        pairs = {"spearman": self.spearman, "r2": self.r2, "mre": self.mre}
        return {name: None if np.isnan(value) else float(value) for name, value in pairs.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """Held-out scores of a fitted law and of the null models."""

    law: str
    """Kind of the law."""
    rows: int
    """Number of rows in the training table."""
    runs: int
    """Number of distinct runs in the training table."""
    cpu_s: float
    """CPU seconds of fitting and cross-validation."""
    verdict: str
    """Summary of the scores: how far to trust the law."""
    targets: Mapping[str, Score] = field(default_factory=dict)
    """Scores of cross-validation over runs, by target."""
    ahead: Mapping[str, Score] = field(default_factory=dict)
    """Scores of later steps predicted from earlier ones, by target; empty without steps."""
    nulls: Mapping[str, Score] = field(default_factory=dict)
    """Scores of the null models (`mean`, `steps`, `own`), averaged over targets."""
    candidates: Mapping[str, Score] = field(default_factory=dict)
    """Scores of the kinds that `auto` compared, averaged over targets."""
    coefficients: Mapping[str, Mapping[str, tuple[float, float, float]]] = field(
        default_factory=dict
    )
    """Value and 90 % bootstrap interval over runs, by target and coefficient."""

    @property
    def mean(self) -> Score:
        """Return the mean of the scores over targets."""
        return mean_score(self.targets)

    def document(self) -> dict[str, Any]:
        """Return the report in JSON types."""

        def documents(scores: Mapping[str, Score]) -> dict[str, Any]:
            return {name: score.document() for name, score in scores.items()}

        return {
            "law": self.law,
            "rows": self.rows,
            "runs": self.runs,
            "cpu_s": round(self.cpu_s, 3),
            "verdict": self.verdict,
            "targets": documents(self.targets),
            "mean": self.mean.document(),
            "ahead": documents(self.ahead),
            "nulls": documents(self.nulls),
            "candidates": documents(self.candidates),
            "coefficients": {
                target: {name: list(map(float, interval)) for name, interval in by_name.items()}
                for target, by_name in self.coefficients.items()
            },
        }


def mean_score(scores: Mapping[str, Score]) -> Score:
    """Return the mean score over targets, each measure over its finite values; NaN without any."""

    # Not np.nanmean: it warns where no value is finite, for instance Spearman of the mean model.
    def mean(values: list[float]) -> float:
        finite = [value for value in values if np.isfinite(value)]
        return float(np.mean(finite)) if finite else np.nan

    return Score(
        spearman=mean([score.spearman for score in scores.values()]),
        r2=mean([score.r2 for score in scores.values()]),
        mre=mean([score.mre for score in scores.values()]),
    )


@runtime_checkable
class Law(Protocol):
    """Predicts the losses of a run from its shares and its length."""

    @property
    def kind(self) -> str:
        """Return the registered name."""
        ...

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the domains of the training table, in the order of all D axes."""
        ...

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the names of the predicted losses, in the order of all V axes."""
        ...

    @property
    def convex(self) -> bool:
        """Return whether every predicted loss is a convex function of the shares."""
        ...

    @property
    def max_share_D(self) -> Floats:
        """Return the largest share of each domain over the runs of the table, shape (D,)."""
        ...

    def fit(self, table: MixtureTable) -> FitReport:
        """Fit the law to a table and return its held-out scores.

        Raises:
            LawError: If the law cannot be fitted to this table; the law is then unchanged.
        """
        ...

    def predict(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return losses in nats, shape (R, V), of shares (R, D) after steps (R,).

        Steps are in the table's unit; the default is the table's last step.
        """
        ...

    def deviation(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return standard deviations of the predictions, in nats, shape (R, V)."""
        ...

    def share_gradient(self, share_D: Floats, step: float | None = None) -> tuple[Floats, Floats]:
        """Return losses, shape (V,), and their derivatives by the shares, shape (V, D)."""
        ...

    def minimize(self, objective: Objective) -> Optimum:
        """Return the optimal shares, with a bound on the gap where the law is convex."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted law in JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
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
    """Return an unfitted law.

    Raises:
        LawError: If the kind is unknown, or has no such option.
    """
    if kind not in _FACTORIES:
        known = known_laws()
        suggestion = did_you_mean(kind, known)
        raise LawError.at(
            "law", kind, "not a law", allowed=f"Known: {', '.join(known)}", fix=suggestion
        )
    factory = _FACTORIES[kind]
    # Checked against the signature, not by calling: the factory's own TypeError has no hint, and
    # one raised deep inside it would be mistaken for a wrong option.
    parameters = inspect.signature(factory).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in options.keys() - parameters.keys():
            known = f"Options: {', '.join(parameters)}" if parameters else "It has none"
            suggestion = did_you_mean(name, list(parameters))
            raise LawError.at(
                f"law.{name}",
                options[name],
                f"no option of the law {kind!r}",
                allowed=known,
                fix=suggestion,
            )
    return factory(**options)


def law_to_dict(fitted: Law, report: FitReport | None = None) -> dict[str, Any]:
    """Return a fitted law and its report as one JSON document."""
    return {
        "format": FORMAT,
        "law": fitted.kind,
        "domains": list(fitted.domains),
        "targets": list(fitted.targets),
        "state": fitted.state_dict(),
        "report": None if report is None else report.document(),
    }


def law_from_dict(document: Mapping[str, Any]) -> Law:
    """Return the law of a document written by `law_to_dict`.

    Raises:
        LawError: If the document is not a valid law.
    """
    try:
        if document["format"] != FORMAT:
            raise LawError.at(
                "law.format", document["format"], f"not format {FORMAT}", fix="Fit it again"
            )
        fitted = build_law(document["law"])
        fitted.load_state_dict(document["state"])
    # The document is untrusted: a state of the wrong shape fails anywhere in numpy, with any of
    # these. LawError is a ValueError and already has its message.
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if isinstance(error, LawError):
            raise
        raise LawError.at(
            "law",
            document.get("law"),
            f"not a law: {type(error).__name__} {error}",
            fix="Fit it again",
        ) from error
    return fitted
