"""A run's metrics as gauges of the Ray cluster, for Prometheus and Grafana.

`cluster/grafana.json` is a dashboard of all of them. The writing rank sets them, at most once a
second. A private cluster reports no metrics, so it has no gauges.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_INTERVAL_S = 1.0
# Prometheus stores a series per label value and gauge; beyond this only the run's own are set.
_MAX_DOMAINS = 100
_METRICS_VARIABLE = "RAY_enable_metrics_collection"


@dataclass(frozen=True, slots=True)
class Metric:
    """One gauge: `ray_NAME` to Prometheus, labeled by run, and by domain where it has one."""

    name: str
    """Name in Ray, without Prometheus' prefix `ray_`."""
    description: str
    """Description with its unit, shown by Prometheus."""
    key: str
    """Key in a line of `metrics.jsonl`; the value is a mapping by domain if `by_domain`."""
    by_domain: bool = False
    """Whether it has one value per domain."""


METRICS = (
    Metric("raymix_step", "Optimizer steps done", "step"),
    Metric("raymix_loss", "Training loss, nats per token", "loss"),
    Metric("raymix_learning_rate", "Learning rate", "lr"),
    Metric("raymix_grad_norm", "Norm of the gradient before clipping", "grad_norm"),
    Metric("raymix_tokens", "Tokens trained on", "tokens"),
    Metric("raymix_tokens_per_second", "Tokens per second, all workers together", "tokens_per_s"),
    Metric("raymix_data_wait_ratio", "Share of time spent waiting for data, 0 to 1", "data_wait"),
    Metric("raymix_mixture_version", "Version of the mixture, as the controller counts",
           "mixture_version"),
    Metric("raymix_share", "Share of tokens asked of a domain, 0 to 1", "shares", True),
    Metric("raymix_domain_loss", "Its training loss, nats per token", "domain_loss", True),
    Metric("raymix_domain_tokens", "Tokens read of the domain", "domain_tokens", True),
    Metric("raymix_domain_epochs", "Passes over the domain", "domain_epochs", True),
    Metric("raymix_heldout_loss", "Its held-out loss, nats per token", "heldout", True),
)  # fmt: skip
"""All gauges of a run."""


class Gauge(Protocol):
    """The interface of `ray.util.metrics.Gauge`."""

    def set(self, value: float, tags: dict[str, str]) -> None:
        """Set the value for one combination of labels."""
        ...


class Gauges:
    """Sets a run's gauges to the values of the newest step."""

    def __init__(
        self,
        run: str,
        domain_tokens: Mapping[str, int],
        *,
        read: Mapping[str, int],
        make: Callable[[Metric], Gauge] | None = None,
    ) -> None:
        """Create the gauges.

        Args:
            run: Name of the run, used as a label.
            domain_tokens: Training tokens in each domain.
            read: Tokens of each domain read before this attempt.
            make: Factory of a gauge; default: Ray's.
        """
        self._run = run
        self._domain_tokens = dict(domain_tokens)
        self._read = dict.fromkeys(domain_tokens, 0) | dict(read)
        self._with_domains = len(domain_tokens) <= _MAX_DOMAINS
        self._gauges = {metric.key: (make or _ray_gauge)(metric) for metric in METRICS}
        self._due_s = 0.0

    def step(self, line: Mapping[str, Any]) -> None:
        """Set the gauges from a step's line of `metrics.jsonl`."""
        # Counted at every step, also at those whose values are not set.
        if self._with_domains:
            for name, tokens in line.get("counts", {}).items():
                self._read[name] = self._read.get(name, 0) + tokens
        now = time.monotonic()
        if now < self._due_s:
            return
        # Ray exports every few seconds and Prometheus scrapes less often: more would be lost work.
        self._due_s = now + _INTERVAL_S
        sizes = self._domain_tokens
        epochs = {name: n / sizes[name] for name, n in self._read.items() if sizes.get(name)}
        values = {**line, "domain_tokens": self._read, "domain_epochs": epochs}
        for metric in METRICS:
            self._set(metric, values.get(metric.key))

    def evaluation(self, table: Mapping[str, Mapping[str, float | int | None]]) -> None:
        """Set the held-out losses."""
        for metric in METRICS:
            if metric.key == "heldout":
                self._set(metric, {name: row.get("loss") for name, row in table.items()})

    def _set(self, metric: Metric, value: Any) -> None:
        gauge = self._gauges[metric.key]
        if not metric.by_domain:
            if value is not None:
                gauge.set(float(value), {"run": self._run})
        elif self._with_domains:
            for name, number in (value or {}).items():
                if number is not None:
                    gauge.set(float(number), {"run": self._run, "domain": name})


def cluster_gauges(
    run: str, domain_tokens: Mapping[str, int], *, read: Mapping[str, int]
) -> Gauges | None:
    """Return the gauges of a run; None if no cluster would report them.

    Args:
        run: Name of the run.
        domain_tokens: Training tokens in each domain.
        read: Tokens of each domain read before this attempt.
    """
    # Not imported: a run without Ray must not pay the seconds that its import takes.
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    # A private cluster's workers inherit this from the driver, which switches its metrics off.
    if os.environ.get(_METRICS_VARIABLE, "1").lower() in ("0", "false"):
        return None
    return Gauges(run, domain_tokens, read=read)


def _ray_gauge(metric: Metric) -> Gauge:
    from ray.util.metrics import Gauge as RayGauge

    labels = ("run", "domain") if metric.by_domain else ("run",)
    return RayGauge(metric.name, description=metric.description, tag_keys=labels)
