"""A run's numbers as gauges of the Ray cluster, which Prometheus scrapes and Grafana draws.

`cluster/grafana.json` draws all of them. The writing rank sets them, every second at most; in a
private cluster, whose processes report nothing, there are none.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_INTERVAL_S = 1.0
_MOST_DOMAINS = 100
_REPORTED = "RAY_enable_metrics_collection"


@dataclass(frozen=True, slots=True)
class Metric:
    """One gauge: `ray_NAME` to Prometheus, labeled by run, and by domain where it has one."""

    name: str
    """Name as Ray is given it."""
    description: str
    """What it says, with its unit."""
    key: str
    """Where a line of `metrics.jsonl` holds it; a mapping by domain where it is one of domains."""
    by_domain: bool = False
    """Whether it has a value for each domain."""


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
"""All gauges there are."""


class Gauge(Protocol):
    """What `ray.util.metrics.Gauge` does."""

    def set(self, value: float, tags: dict[str, str]) -> None:
        """Set the value under labels."""
        ...


class Gauges:
    """Sets a run's gauges, the values of the newest step."""

    def __init__(
        self,
        run: str,
        domain_tokens: Mapping[str, int],
        *,
        read: Mapping[str, int],
        make: Callable[[Metric], Gauge] | None = None,
    ) -> None:
        """Begin.

        Args:
            run: Name of the run, its label.
            domain_tokens: Training tokens that each domain holds.
            read: Tokens read of each domain before.
            make: Makes a gauge; left out, one of Ray's.
        """
        self._run = run
        self._held = dict(domain_tokens)
        self._read = dict.fromkeys(domain_tokens, 0) | dict(read)
        # More label values than these would drown whatever keeps them.
        self._few = len(domain_tokens) <= _MOST_DOMAINS
        self._gauges = {metric.key: (make or _of_ray)(metric) for metric in METRICS}
        self._due = 0.0

    def step(self, line: Mapping[str, Any]) -> None:
        """Take a step's line of `metrics.jsonl`."""
        if self._few:
            for name, tokens in line.get("counts", {}).items():
                self._read[name] = self._read.get(name, 0) + tokens
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _INTERVAL_S
        held = self._held
        epochs = {name: n / held[name] for name, n in self._read.items() if held.get(name)}
        everything = {**line, "domain_tokens": self._read, "domain_epochs": epochs}
        for metric in METRICS:
            self._set(metric, everything.get(metric.key))

    def evaluation(self, table: Mapping[str, Mapping[str, float | int | None]]) -> None:
        """Take the held-out losses."""
        for metric in METRICS:
            if metric.key == "heldout":
                self._set(metric, {name: row.get("loss") for name, row in table.items()})

    def _set(self, metric: Metric, value: Any) -> None:
        gauge = self._gauges[metric.key]
        if not metric.by_domain:
            if value is not None:
                gauge.set(float(value), {"run": self._run})
        elif self._few:
            for name, one in (value or {}).items():
                if one is not None:
                    gauge.set(float(one), {"run": self._run, "domain": name})


def cluster_gauges(
    run: str, domain_tokens: Mapping[str, int], *, read: Mapping[str, int]
) -> Gauges | None:
    """Return the gauges of a run, None where no cluster would report them.

    Args:
        run: Name of the run.
        domain_tokens: Training tokens that each domain holds.
        read: Tokens read of each domain before.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    # The processes of a private cluster inherit this of the driver.
    if os.environ.get(_REPORTED, "1").lower() in ("0", "false"):
        return None
    return Gauges(run, domain_tokens, read=read)


def _of_ray(metric: Metric) -> Gauge:
    from ray.util.metrics import Gauge as RayGauge

    labels = ("run", "domain") if metric.by_domain else ("run",)
    return RayGauge(metric.name, description=metric.description, tag_keys=labels)
