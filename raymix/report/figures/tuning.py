"""The pictures of a search for the best shares.

Shapes: D domains, H horizons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from raymix.report.figures.progress import floats
from raymix.report.figures.style import (
    BAND_COLOURS,
    COLOURS,
    INK,
    MUTED,
    PAPER,
    figure,
    panel,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]
Drawn = tuple[str, str, str]
"""Title, picture, caption."""

_MOST_DOMAINS = 30
_ABOVE: dict[str, Any] = {
    "frameon": False,
    "fontsize": 8,
    "ncols": 3,
    "loc": "lower center",
    "bbox_to_anchor": (0.45, 1),
}
_MARKERS = "osD^v"


def main_figures(document: Document) -> list[Drawn]:
    """Return the large pictures: predictions against measurements, shares, the path."""
    path = [_path(document)] if len(document["path"]) > 1 else []
    return [_agreement(document), _shares(document), *path]


def _agreement(document: Document) -> Drawn:
    with figure(300) as (sheet, (axes,)):
        known = [run for run in document["runs"] if run["value"] is not None]
        # A run that was stopped early is of another number of steps.
        known = [run for run in known if run["step"] == document["steps"]]
        x = [run["predicted"] for run in known]
        y = [run["value"] for run in known]
        axes.plot(x, y, "o", color=MUTED, markersize=3.5, label="small runs (fitted)")
        for at, (role, row) in enumerate(document["verified"].items()):
            if row["measured"]["mean"] is not None:
                _verified_point(axes, role, row, at)
                x, y = [*x, row["predicted"]["value"]], [*y, row["measured"]["mean"]]
        low, high = min([*x, *y]), max([*x, *y])
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, zorder=1)
        axes.set_xlabel("predicted, nats per token")
        axes.set_ylabel("measured, nats per token")
        axes.legend(
            frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1)
        )
        svg = to_svg(sheet, "tune-agreement")
    caption = (
        "On the line, prediction and measurement agree. Bars: 95 % interval of the prediction, "
        "least and most over seeds of the measurement."
    )
    return "Predicted against measured", svg, caption


def _verified_point(axes: Axes, role: str, row: Document, at: int) -> None:
    told, measured = row["predicted"], row["measured"]
    values = floats(list(measured["by_seed"].values()))
    mean = measured["mean"]
    value, low, high = told["value"], told["low"], told["high"]
    wide = None if low is None else [[value - low], [high - value]]
    axes.errorbar(
        [value],
        [mean],
        xerr=wide,
        yerr=[[mean - values.min()], [values.max() - mean]],
        marker=_MARKERS[at % len(_MARKERS)],
        markersize=5,
        color=COLOURS[at % len(COLOURS)],
        linewidth=1,
        linestyle="none",
        label=role,
        zorder=3,
    )


def _shares(document: Document) -> Drawn:
    """Return the shares of the verified mixtures, a row per domain."""
    roles = document["verified"]
    optimum = roles["optimum"]["shares"]
    names = sorted(document["domains"], key=lambda name: -optimum[name])[:_MOST_DOMAINS]
    with figure(60 + 18 * len(names)) as (sheet, (axes,)):
        rows = np.arange(len(names))
        for at, (role, row) in enumerate(roles.items()):
            axes.plot(
                [100 * row["shares"][name] for name in names],
                rows,
                _MARKERS[at % len(_MARKERS)],
                color=COLOURS[at % len(COLOURS)],
                markersize=6 if at == 0 else 4,
                alpha=1.0 if at == 0 else 0.75,
                label=role,
            )
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("share of tokens, %")
        axes.legend(
            frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1)
        )
        svg = to_svg(sheet, "tune-shares")
    left = len(document["domains"]) - len(names)
    rest = f"; {left} further domains are in tune.json" if left else ""
    return "Shares", svg, f"Domains in order of the optimum's shares{rest}."


def _path(document: Document) -> Drawn:
    """Return the optimum as the horizon grows, one band per domain."""
    path, last = document["path"], document["path"][-1]["shares"]
    names = sorted(last, key=lambda name: -last[name])
    most = len(BAND_COLOURS) if len(names) <= len(BAND_COLOURS) else len(BAND_COLOURS) - 1
    shown, others = names[:most], names[most:]
    share_DH = np.array([[100 * spot["shares"][name] for spot in path] for name in shown])
    if others:
        rest = [100 * sum(spot["shares"][name] for name in others) for spot in path]
        share_DH, shown = np.vstack([share_DH, [rest]]), [*shown, f"{len(others)} others"]
    steps = floats([spot["step"] for spot in path])
    measured = [spot["step"] for spot in path if spot["measured"]]
    with figure(280) as (sheet, (axes,)):
        axes.stackplot(
            steps,
            share_DH,
            colors=BAND_COLOURS[: len(shown)],
            edgecolor=PAPER,
            linewidth=0.6,
            labels=shown,
        )
        if measured:
            axes.axvline(max(measured), color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_xscale("log")
        _plain_ticks(axes)
        axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 100))
        axes.set_xlabel("steps of the run that the shares are for")
        axes.set_ylabel("share of tokens, %")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        svg = to_svg(sheet, "tune-path")
    caption = "Right of the dashed line nothing was measured: there the law extrapolates."
    return "The optimum as the run grows longer", svg, caption


def _plain_ticks(axes: Axes) -> None:
    """Mark 1, 2 and 5 times the powers of ten, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def slice_panels(document: Document) -> list[tuple[str, str]]:
    """Return by domain the value predicted as its share changes: name and picture."""
    optimum = document["optimum"]["shares"]
    drawn: list[tuple[str, str]] = []
    for name, curve in document["slices"].items():
        with panel() as (sheet, axes):
            x, y = 100 * floats(curve["share"]), floats(curve["value"])
            axes.plot(x, y, color=COLOURS[0], linewidth=1.3)
            at = 100 * optimum[name]
            axes.plot([at], [np.interp(at, x, y)], "o", color=COLOURS[1], markersize=4)
            axes.set_xlabel("share, %", fontsize=9)
            axes.set_ylabel("nats per token", fontsize=9)
            axes.locator_params(nbins=4)
            drawn.append((name, to_svg(sheet, f"tune-slice-{name}")))
    return drawn


def coefficient_panels(document: Document) -> list[tuple[str, str]]:
    """Return by loss the law's coefficients with their intervals: name and picture."""
    drawn: list[tuple[str, str]] = []
    for target, found in document["report"]["coefficients"].items():
        if not found:
            continue
        names = list(found)
        value, low, high = (floats([found[name][i] for name in names]) for i in range(3))
        with panel() as (sheet, axes):
            rows = np.arange(len(names))
            axes.hlines(rows, low, high, color=MUTED, linewidth=2)
            axes.plot(value, rows, "o", color=COLOURS[0], markersize=3.5)
            axes.axvline(0, color=MUTED, linewidth=0.8)
            axes.set_yticks(rows, names, fontsize=7)
            axes.set_ylim(len(names) - 0.5, -0.5)
            drawn.append((target, to_svg(sheet, f"tune-coefficients-{target}")))
    return drawn
