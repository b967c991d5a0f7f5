"""Charts of a run's mixture: shares over time, read against asked, tokens per domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from raymix.report.data.steps import Document, Floats
from raymix.report.data.summary import MAX_PANELS
from raymix.report.figures.chart import (
    Chart,
    Series,
    floats,
    mark,
    mark_toggle,
    shortened,
    to_svg,
)
from raymix.report.figures.theme import (
    BAND_COLORS,
    INK,
    LINE_COLORS,
    MUTED,
    PAPER,
    SERIES_COLORS,
    figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Names longer than this leave too little room for bars at the usual size of labels.
_LONG_NAME = 24
# Height of a line of labels, in percent of the axis of a chart of shares.
_LABEL_GAP = 5.2


def mixture_over_time(run: Document) -> Chart | None:
    """Return the requested shares over time, one band per domain with its name at its end."""
    weights = run["weights"]
    if not weights["step"]:
        return None
    names = list(weights["shares"])
    end = max(weights["until"], weights["step"][-1] + 1)
    x = np.append(floats(weights["step"]), end)
    share_DV = np.array([floats(weights["shares"][name]) for name in names])
    # A step plot needs the last share again at the end of the run.
    share_DV = 100 * np.concatenate([share_DV, share_DV[:, -1:]], axis=1)
    bands = band_series(run, names)
    with figure(280) as (drawn, (axes,)):
        colors = [series.color for series in bands]
        stack = axes.stackplot(
            x, share_DV, colors=colors, edgecolor=PAPER, linewidth=0.6, step="post"
        )
        for band, series in zip(stack, bands, strict=True):
            # Above the grid, which would show through where bands touch.
            band.set_zorder(2)
            mark([band], series)
        axes.set(xlim=(0, end), ylim=(0, 100), ylabel="share of tokens asked, %")
        axes.set_xlabel("step")
        edges = np.concatenate([[0.0], np.cumsum(share_DV[:, -1])])
        _label_right(axes, (edges[:-1] + edges[1:]) / 2, bands, share_DV[:, -1])
        changes = len(weights["step"]) - 1
        mixer = run["header"].get("mixer")
        caption = f"{f'Mixer: {mixer}. ' if mixer else ''}" + (
            f"The shares changed {changes:,} time{'s' * (changes != 1)}; right: at the end."
            if changes
            else "The shares never changed."
        )
        title = "Mixture over time"
        svg = to_svg(drawn, f"weights-{run['name']}", title=title)
        return Chart(title=title, caption=caption, svg=svg)


def read_against_asked(run: Document) -> Chart | None:
    """Return the error of the realized mixture after each step, between its proved bounds."""
    errors = run["exactness"]
    if errors is None:
        return None
    unit = errors["unit"]
    with figure(220) as (drawn, (axes,)):
        x = floats(errors["step"])
        ahead, behind = floats(errors["ahead"]), floats(errors["behind"])
        axes.fill_between(x, behind, ahead, color=SERIES_COLORS[0], alpha=0.35, linewidth=0)
        axes.plot(x, ahead, color=SERIES_COLORS[0], linewidth=0.9)
        axes.plot(x, behind, color=SERIES_COLORS[0], linewidth=0.9)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        for value in (errors["bound_ahead"], errors["bound_behind"]):
            axes.axhline(value, color=INK, linestyle=(0, (1, 1.6)), linewidth=1.4)
            above = value > 0
            axes.annotate(
                f"proved bound: {_signed(value)}",
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3 if above else -3),
                textcoords="offset points",
                ha="right",
                va="bottom" if above else "top",
                fontsize=9,
            )
        # Room for the bounds' labels beyond the outermost lines.
        axes.margins(x=0, y=0.22)
        axes.set_ylabel(f"read minus asked, {unit}")
        axes.set_xlabel("step")
        caption = (
            f"The domain furthest ahead and the one furthest behind after each step: at most "
            f"{_signed(errors['most_ahead'])} and {_signed(errors['most_behind'])} {unit} in the "
            f"whole run. The bound is that of {errors['because']}."
        )
        title = "Read against asked"
        svg = to_svg(drawn, f"exactness-{run['name']}", title=title)
        return Chart(title=title, caption=caption, svg=svg)


def domain_tokens(run: Document) -> Chart | None:
    """Return the tokens read per domain as bars, with the epochs over its text at their ends."""
    rows = [(name, row) for name, row in run["domains"].items() if row["tokens"] is not None]
    if not rows:
        return None
    rows.sort(key=lambda item: -item[1]["tokens"])
    shown, rest = rows[:MAX_PANELS], rows[MAX_PANELS:]
    bars = [(name, row["tokens"], row["epochs"]) for name, row in shown]
    if rest:
        bars.append((f"{len(rest):,} others", sum(row["tokens"] for _, row in rest), None))
    # matplotlib stacks horizontal bars from the bottom.
    bars.reverse()
    scale, unit = _scale(max(tokens for _, tokens, _ in bars))
    with figure(46 + 17.0 * len(bars)) as (drawn, (axes,)):
        lengths = [tokens / scale for _, tokens, _ in bars]
        names = [name for name, _, _ in bars]
        drawn_bars = axes.barh(names, lengths, color=SERIES_COLORS[0], height=0.7)
        ends = [_epochs(tokens, epochs) for _, tokens, epochs in bars]
        axes.bar_label(drawn_bars, ends, padding=3, fontsize=9)
        axes.set_xlabel(f"{unit}tokens read".strip())
        # Room for the text at the bars' ends, which matplotlib leaves out of its limits.
        axes.margins(x=0.24, y=0.01)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        if max(map(len, names)) > _LONG_NAME:
            axes.tick_params(axis="y", labelsize=7)
        title = "Tokens and epochs per domain"
        caption = "At each bar's end: epochs over the domain's training text."
        svg = to_svg(drawn, f"amounts-{run['name']}", title=title)
        return Chart(title=title, caption=caption, svg=svg)


def band_series(run: Document, names: Sequence[str]) -> list[Series]:
    """Return a series per band of a chart of domains.

    Where domains are few, each has one color in all charts of all runs. The last of many names may
    stand for the rest, in gray.
    """
    domains = list(run["domains"])
    if len(domains) <= len(BAND_COLORS):
        colors = [BAND_COLORS[domains.index(name)] for name in names]
    else:
        colors = [*BAND_COLORS[: len(names) - 1], BAND_COLORS[-1]]
    at = {name: index for index, name in enumerate(domains)}
    return [
        Series(key=f"domain-{at.get(name, 'rest')}", label=name, color=color, area=True)
        for name, color in zip(names, colors, strict=True)
    ]


def line_series(run: Document, names: Sequence[str]) -> list[Series]:
    """Return a series per line of a chart of domains, in the hues of their bands."""
    return [
        replace(series, color=LINE_COLORS[BAND_COLORS.index(series.color)], area=False)
        for series in band_series(run, names)
    ]


def _label_right(axes: Axes, heights: Floats, bands: Sequence[Series], share_D: Floats) -> None:
    """Write names and final shares (in %) right of the axes, at `heights` or as near as fits."""
    places = spread(heights, _LABEL_GAP)
    for height, place, series, share in zip(heights, places, bands, share_D, strict=True):
        label = axes.annotate(
            _label(series.label, share),
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(1.045, place),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 0,
                        "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip
        mark_toggle(label, series)


def spread(heights: Floats, gap: float, low: float = 0.0, high: float = 100.0) -> Floats:
    """Return `heights` (ascending) moved as little as needed to lie `gap` apart in [low, high]."""
    places = np.array(heights, dtype=np.float64)
    gap = min(gap, (high - low) / max(len(places), 1))
    # Neighbors push each other apart by halves until none overlap; the limits may push back, so
    # the rounds are bounded.
    for _ in range(100):
        moved = False
        for at in range(len(places) - 1):
            short = gap - (places[at + 1] - places[at])
            if short > 1e-9:
                places[at] -= short / 2
                places[at + 1] += short / 2
                moved = True
        places = np.clip(places, low, high)
        if not moved:
            break
    return places


def _label(name: str, share: float) -> str:
    return f"{shortened(name)} {share:.1f} %" if share < 99.95 else f"{shortened(name)} 100 %"


def _signed(value: float) -> str:
    form = "+,.0f" if abs(value) >= 100 else "+.3g"
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _epochs(tokens: float, epochs: float | None) -> str:
    if not tokens:
        return "not read"
    if epochs is None:
        return ""
    return f"{epochs:.2f} epochs" if epochs < 10 else f"{epochs:,.0f} epochs"


def _scale(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if largest >= scale:
            return scale, unit
    return 1.0, ""
