"""Charts of a search for the best shares.

Shapes: D domains, H horizons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raymix.report.figures.chart import Chart, Series, floats, mark, named_series, to_svg
from raymix.report.figures.theme import (
    BAND_COLORS,
    INK,
    MUTED,
    PAPER,
    SERIES_COLORS,
    figure,
    panel,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]

_MAX_DOMAINS = 30
_MARKERS = "osD^v"
# Gray: the law has seen them, so they are no evidence for it.
_SMALL_RUNS = Series(key="small-runs", label="small runs (fitted)", color=MUTED, marker="o")


def main_charts(document: Document) -> list[Chart]:
    """Return the large charts: predictions against measurements, shares, shares by horizon."""
    by_horizon = [_shares_by_horizon(document)] if len(document["path"]) > 1 else []
    return [_agreement(document), _shares(document), *by_horizon]


def _role_series(document: Document) -> list[Series]:
    """Return a series per verified mixture: the same color and marker in every chart."""
    return [
        replace(series, marker=_MARKERS[at % len(_MARKERS)])
        for at, series in enumerate(named_series("role", document["verified"]))
    ]


def _agreement(document: Document) -> Chart:
    roles = _role_series(document)
    with figure(270) as (sheet, (axes,)):
        runs = [run for run in document["runs"] if run["value"] is not None]
        # The prediction is for the full number of steps; runs stopped early are not comparable.
        runs = [run for run in runs if run["step"] == document["steps"]]
        x = [run["predicted"] for run in runs]
        y = [run["value"] for run in runs]
        mark(axes.plot(x, y, "o", color=MUTED, markersize=3.5), _SMALL_RUNS)
        for series, row in zip(roles, document["verified"].values(), strict=True):
            if row["measured"]["mean"] is not None:
                _verified_point(axes, series, row)
                x, y = [*x, row["predicted"]["value"]], [*y, row["measured"]["mean"]]
        low, high = min([*x, *y]), max([*x, *y])
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, zorder=1)
        axes.set_xlabel("predicted, nats per token")
        axes.set_ylabel("measured, nats per token")
        title = "Predicted against measured"
        svg = to_svg(sheet, "tune-agreement", title=title)
    caption = (
        "On the line, prediction and measurement agree. Bars: 95 % interval of the prediction, "
        "least and most over seeds of the measurement."
    )
    return Chart(title=title, svg=svg, caption=caption, legend=(_SMALL_RUNS, *roles))


def _verified_point(axes: Axes, series: Series, row: Document) -> None:
    predicted, measured = row["predicted"], row["measured"]
    values = floats(list(measured["by_seed"].values()))
    mean = measured["mean"]
    value, low, high = predicted["value"], predicted["low"], predicted["high"]
    drawn = axes.errorbar(
        [value],
        [mean],
        xerr=None if low is None else [[value - low], [high - value]],
        yerr=[[mean - values.min()], [values.max() - mean]],
        marker=series.marker,
        markersize=5,
        color=series.color,
        linewidth=1,
        linestyle="none",
        zorder=3,
    )
    mark(drawn.get_children(), series)


def _shares(document: Document) -> Chart:
    """Return the shares of the verified mixtures, a row per domain."""
    verified, roles = document["verified"], _role_series(document)
    optimum = verified["optimum"]["shares"]
    names = sorted(document["domains"], key=lambda name: -optimum[name])[:_MAX_DOMAINS]
    with figure(60 + 18 * len(names)) as (sheet, (axes,)):
        rows = np.arange(len(names))
        for at, (series, row) in enumerate(zip(roles, verified.values(), strict=True)):
            lines = axes.plot(
                [100 * row["shares"][name] for name in names],
                rows,
                series.marker,
                color=series.color,
                markersize=6 if at == 0 else 4,
                alpha=1.0 if at == 0 else 0.75,
            )
            mark(lines, series)
        axes.set_yticks(rows, names)
        # Room for whole markers in the first and last row.
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("share of tokens, %")
        svg = to_svg(sheet, "tune-shares", title="Shares")
    left = len(document["domains"]) - len(names)
    rest = f"; {left} further domains are in tune.json" if left else ""
    caption = f"Domains in order of the optimum's shares{rest}."
    return Chart(title="Shares", svg=svg, caption=caption, legend=tuple(roles))


def _shares_by_horizon(document: Document) -> Chart:
    """Return the optimum as the horizon grows, one band per domain."""
    path, last = document["path"], document["path"][-1]["shares"]
    names = sorted(last, key=lambda name: -last[name])
    # The last color is left for the sum of the rest.
    most = len(BAND_COLORS) if len(names) <= len(BAND_COLORS) else len(BAND_COLORS) - 1
    shown, others = names[:most], names[most:]
    share_DH = np.array([[100 * spot["shares"][name] for spot in path] for name in shown])
    if others:
        rest = [100 * sum(spot["shares"][name] for name in others) for spot in path]
        share_DH, shown = np.vstack([share_DH, [rest]]), [*shown, f"{len(others)} others"]
    bands = [
        Series(key=f"band-{at}", label=name, color=BAND_COLORS[at], area=True)
        for at, name in enumerate(shown)
    ]
    steps = floats([spot["step"] for spot in path])
    measured = [spot["step"] for spot in path if spot["measured"]]
    with figure(270) as (sheet, (axes,)):
        colors = [series.color for series in bands]
        stack = axes.stackplot(steps, share_DH, colors=colors, edgecolor=PAPER, linewidth=0.6)
        for band, series in zip(stack, bands, strict=True):
            mark([band], series)
        if measured:
            # Extrapolated shares look as certain as fitted ones: the line parts them.
            axes.axvline(max(measured), color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_xscale("log")
        _plain_ticks(axes)
        axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 100))
        axes.set_xlabel("steps of the run that the shares are for")
        axes.set_ylabel("share of tokens, %")
        title = "The optimum as the run grows longer"
        svg = to_svg(sheet, "tune-path", title=title)
    caption = "Right of the dashed line nothing was measured: there the law extrapolates."
    # Bands are stacked from the bottom: a legend from the top reads in their order.
    return Chart(title=title, svg=svg, caption=caption, legend=tuple(reversed(bands)))


def _plain_ticks(axes: Axes) -> None:
    """Mark 1, 2 and 5 times the powers of ten, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def slice_panels(document: Document) -> list[Chart]:
    """Return per domain the predicted value as its share changes."""
    optimum = document["optimum"]["shares"]
    drawn: list[Chart] = []
    for name, curve in document["slices"].items():
        with panel() as (sheet, axes):
            x, y = 100 * floats(curve["share"]), floats(curve["value"])
            axes.plot(x, y, color=SERIES_COLORS[0], linewidth=1.3)
            at = 100 * optimum[name]
            axes.plot([at], [np.interp(at, x, y)], "o", color=SERIES_COLORS[1], markersize=4)
            axes.set_xlabel("share, %", fontsize=9)
            axes.set_ylabel("nats per token", fontsize=9)
            axes.locator_params(nbins=4)
            title = f"Predicted value by the share of {name}"
            svg = to_svg(sheet, f"tune-slice-{name}", title=title)
        drawn.append(Chart(title=name, svg=svg))
    return drawn


def coefficient_panels(document: Document) -> list[Chart]:
    """Return per loss the law's coefficients with their intervals."""
    drawn: list[Chart] = []
    for target, coefficients in document["report"]["coefficients"].items():
        if not coefficients:
            continue
        names: Sequence[str] = list(coefficients)
        value, low, high = (floats([coefficients[name][i] for name in names]) for i in range(3))
        with panel() as (sheet, axes):
            rows = np.arange(len(names))
            axes.hlines(rows, low, high, color=MUTED, linewidth=2)
            axes.plot(value, rows, "o", color=SERIES_COLORS[0], markersize=3.5)
            axes.axvline(0, color=MUTED, linewidth=0.8)
            axes.set_yticks(rows, names, fontsize=7)
            axes.set_ylim(len(names) - 0.5, -0.5)
            title = f"Coefficients of the law of {target}"
            svg = to_svg(sheet, f"tune-coefficients-{target}", title=title)
        drawn.append(Chart(title=target, svg=svg))
    return drawn
