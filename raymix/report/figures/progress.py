"""Charts of a run's progress: losses, learning rate, throughput, gradient norm.

Each is drawn from the summary and the training curves of `raymix.report.data` and nothing else.
Runs are series of the whole page; domains are series of one chart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raymix.report.data.steps import Document, Floats
from raymix.report.figures.chart import Chart, Series, floats, mark, named_series, to_svg
from raymix.report.figures.mixture import line_series
from raymix.report.figures.theme import INK, few_ticks, figure, panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTTED = (0, (1, 1.6))


@dataclass(frozen=True, slots=True)
class ProgressAxis:
    """The x axis of all charts of progress."""

    label: str
    of: Callable[[Document], Floats]
    """Maps a document with `step` and `tokens` to positions."""


def progress_axis(runs: Sequence[Document]) -> ProgressAxis:
    """Return steps where all runs have equal steps, else tokens."""
    # Losses of runs compare at equal tokens; steps say the same only where they are equal.
    sizes = {_step_tokens(run) for run in runs}
    if len(runs) > 1 and (len(sizes) > 1 or None in sizes):
        return ProgressAxis("tokens, millions", lambda series: floats(series["tokens"]) / 1e6)
    size = sizes.pop()
    label = f"step ({size:,} tokens each)" if size else "step"
    return ProgressAxis(label, lambda series: floats(series["step"]))


def run_series(runs: Sequence[Document]) -> list[Series]:
    """Return a series per run, in their order."""
    return named_series("run", [run["name"] for run in runs])


def training_loss(runs: Sequence[Document], axis: ProgressAxis) -> Chart | None:
    """Return the training loss of every step and smoothed, above the learning rate."""
    with figure(280, ratios=(3, 1)) as (drawn, (top, bottom)):
        for run, series in zip(runs, run_series(runs), strict=True):
            training = run["training"]
            x = axis.of(training)
            if not x.size:
                continue
            _raw_and_smooth(top, x, training, "loss", series)
            # The learning rate has no noise to smooth.
            mark(bottom.plot(x, floats(training["lr"]), color=series.color), series)
        if not top.lines:
            return None
        _limit_to_smoothed(top, runs)
        top.set_ylabel("loss, nats per token")
        bottom.set_ylabel("learning rate")
        bottom.set_ylim(bottom=0)
        bottom.yaxis.set_major_locator(few_ticks(3))
        bottom.yaxis.set_major_formatter("{x:g}")
        bottom.set_xlabel(axis.label)
        drawn.align_ylabels()
        title = "Training loss and learning rate"
        window = runs[0]["training"]["smoothing_steps"]
        caption = f"Thin: training loss of every step. Bold: mean of {window:,} steps around it."
        return Chart(title=title, caption=caption, svg=to_svg(drawn, "loss", title=title))


def throughput(runs: Sequence[Document], axis: ProgressAxis) -> Chart | None:
    """Return tokens per second above the share of time spent waiting for data."""
    with figure(280, ratios=(3, 2)) as (drawn, (top, bottom)):
        for run, series in zip(runs, run_series(runs), strict=True):
            training = run["training"]
            x = axis.of(training)
            for axes, key, scale in ((top, "tokens_per_s", 1e-3), (bottom, "data_wait", 100)):
                if np.isfinite(floats(training[key])).any():
                    _raw_and_smooth(axes, x, training, key, series, scale=scale)
        if not top.lines:
            return None
        top.set_ylabel("thousand tokens per s")
        bottom.set_ylabel("waiting, % of time")
        top.set_ylim(bottom=0)
        waits = [100 * floats(run["training"]["data_wait"]) for run in runs]
        beyond = _limit_to_usual(bottom, waits, least=1.0, form="waits up to {:.0f} %")
        bottom.set_xlabel(axis.label)
        drawn.align_ylabels()
        title = "Throughput and waiting for data"
        caption = f"All workers together. Thin: every step. Bold: smoothed.{beyond}"
        return Chart(title=title, caption=caption, svg=to_svg(drawn, "throughput", title=title))


def gradient_norm(runs: Sequence[Document], axis: ProgressAxis) -> Chart | None:
    """Return the norm of the gradient before clipping, None where no run recorded it."""
    with figure(260) as (drawn, (axes,)):
        norms: list[Floats] = []
        for run, series in zip(runs, run_series(runs), strict=True):
            curve = run["curves"]["grad_norm"]
            if curve is not None:
                _raw_and_smooth(axes, axis.of(curve), curve, "grad_norm", series)
                norms.append(floats(curve["grad_norm"]))
        if not norms:
            return None
        beyond = _limit_to_usual(axes, norms, least=0.0, form="norms up to {:.3g}")
        axes.set_ylabel("gradient norm")
        axes.set_xlabel(axis.label)
        # Several limits would need several lines, which nobody could tell apart.
        limits = {run["curves"]["clip_norm"] for run in runs} - {None}
        clip = ""
        if len(limits) == 1 and (limit := float(limits.pop())) <= axes.get_ylim()[1]:
            axes.axhline(limit, color=INK, linestyle=DOTTED, linewidth=1.4)
            clip = f" Dotted: clipped to {limit:g}."
        title = "Gradient norm"
        caption = f"L2 norm before clipping. Thin: every step. Bold: smoothed.{clip}{beyond}"
        return Chart(title=title, caption=caption, svg=to_svg(drawn, "grad-norm", title=title))


def domain_training_loss(run: Document, axis: ProgressAxis) -> Chart | None:
    """Return the smoothed training loss of each domain, None where it was not recorded."""
    curves = run["curves"]["domain_loss"]
    if curves is None:
        return None
    legend = line_series(run, list(curves["loss"]))
    x = axis.of(curves)
    with figure(260) as (drawn, (axes,)):
        smooth = [floats(loss) for loss in curves["loss"].values()]
        for loss, series in zip(smooth, legend, strict=True):
            # A domain with few tokens is missing in most steps: markers show its lone points.
            mark(
                axes.plot(x, loss, color=series.color, linewidth=1.4, marker=_lone_marker(loss)),
                series,
            )
        axes.set_ylabel("loss, nats per token")
        axes.set_xlabel(axis.label)
        title = "Training loss per domain"
        rest = f" {curves['left_out']:,} other domains are not drawn." * (curves["left_out"] > 0)
        caption = (
            "Training loss on the tokens of each domain, mean of "
            f"{curves['smoothing_steps']:,} steps around each.{rest}"
        )
        svg = to_svg(drawn, f"domain-loss-{run['name']}", title=title)
        return Chart(title=title, caption=caption, svg=svg, legend=tuple(legend))


def heldout_panels(runs: Sequence[Document], axis: ProgressAxis) -> list[Chart]:
    """Return one small chart per domain: held-out loss, and the unigram entropy dotted."""
    names = list(dict.fromkeys(name for run in runs for name in run["heldout"]["loss"]))
    return [_heldout_panel(name, runs, axis) for name in names]


def _heldout_panel(name: str, runs: Sequence[Document], axis: ProgressAxis) -> Chart:
    last: list[float] = []
    with panel() as (drawn, axes):
        for run, series in zip(runs, run_series(runs), strict=True):
            loss = floats(run["heldout"]["loss"].get(name, []))
            if not np.isfinite(loss).any():
                continue
            x = axis.of(run["heldout"])
            lines = axes.plot(
                x, loss, color=series.color, marker="o", markersize=2.2, linewidth=1.3
            )
            last.append(loss[np.isfinite(loss)][-1])
            law = run["law"] or {"loss": {}}
            if name in law["loss"]:
                predicted = floats(law["loss"][name])
                lines += axes.plot(
                    axis.of(law), predicted, color=series.color, dashes=(4, 2), linewidth=1.1
                )
            mark(lines, series)
        entropies = {(run["domains"].get(name) or {}).get("unigram_entropy") for run in runs}
        for entropy in sorted(value for value in entropies if value is not None):
            axes.axhline(entropy, color=INK, linestyle=DOTTED, linewidth=1.4)
        # matplotlib's own choice of ticks overlaps at this size.
        axes.xaxis.set_major_locator(few_ticks(4))
        axes.yaxis.set_major_locator(few_ticks(4))
        axes.set_xlabel(axis.label.split(" (")[0], fontsize=9)
        axes.set_ylabel("nats per token", fontsize=9)
        svg = to_svg(drawn, f"heldout-{name}", title=f"Held-out loss of {name}")
    return Chart(title=name, value=", ".join(f"{value:.2f}" for value in last), svg=svg)


def _raw_and_smooth(
    axes: Axes, x: Floats, curves: Document, key: str, series: Series, *, scale: float = 1.0
) -> None:
    """Draw a value of every step thin, and its moving mean bold."""
    raw, smooth = scale * floats(curves[key]), scale * floats(curves[f"{key}_smooth"])
    lines = axes.plot(x, raw, color=series.color, alpha=0.3, linewidth=0.8)
    lines += axes.plot(x, smooth, color=series.color)
    mark(lines, series)


def _lone_marker(values: Floats) -> str | None:
    return "." if np.count_nonzero(np.isfinite(values)) < 3 else None


def _step_tokens(run: Document) -> int | None:
    """Return the tokens of a step, None where steps differ."""
    tokens = floats(run["training"]["tokens"])
    step = floats(run["training"]["step"])
    if not tokens.size or not step[0] or not np.isfinite(tokens).all():
        return None
    size = tokens / step
    return int(size[0]) if np.ptp(size) == 0 else None


def _limit_to_smoothed(axes: Axes, runs: Sequence[Document]) -> None:
    """End the y axis at the smoothed losses, so that a few spikes do not flatten the rest."""
    smooth = np.concatenate([floats(run["training"]["loss_smooth"]) for run in runs])
    raw = np.concatenate([floats(run["training"]["loss"]) for run in runs])
    if not np.isfinite(smooth).any():
        return
    low, high = np.nanmin(raw), np.nanmax(smooth)
    room = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)


def _limit_to_usual(axes: Axes, values: Sequence[Floats], *, least: float, form: str) -> str:
    """End the y axis above the usual values; return a sentence on those beyond it.

    Args:
        axes: The axes.
        values: Everything drawn on them.
        least: Smallest end of the axis.
        form: Names the largest value.
    """
    # numpy warns of a maximum of nothing but NaN.
    every = np.append(np.concatenate(values), 0.0)
    highest = float(np.nanmax(every))
    usual = max(least, 1.3 * float(np.nanquantile(every, 0.98)))
    top = min(usual, max(least, 1.1 * highest))
    if top > 0:
        axes.set_ylim(0, top)
    return f" Off the scale: {form.format(highest)}." if highest > usual else ""
