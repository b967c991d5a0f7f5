"""Chart of the gradient signals that an adaptive mixer measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raymix.report.data.steps import Document, Floats
from raymix.report.figures.chart import Chart, Series, floats, mark, to_svg
from raymix.report.figures.mixture import line_series
from raymix.report.figures.theme import MUTED, few_ticks, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Per kind of signal: the axis label, and whether the axis is logarithmic.
_KINDS = {
    "grad_norm2": ("squared norm", True),
    "grad_noise": ("noise", True),
    "alignment": ("alignment", False),
}


def gradient_signals(run: Document) -> Chart | None:
    """Return the signals, a row per kind and a line per domain, None where none were measured."""
    signals = run["signals"]
    if signals is None:
        return None
    kinds = list(signals["values"])
    legend = line_series(run, list(signals["values"][kinds[0]]))
    x = floats(signals["step"])
    with figure(80 + 110.0 * len(kinds), ratios=[1] * len(kinds)) as (drawn, rows):
        for axes, kind in zip(rows, kinds, strict=True):
            _draw_kind(axes, x, signals["values"][kind], legend, kind)
        rows[-1].set_xlabel("step")
        drawn.align_ylabels()
        left_out = signals["left_out"]
        more = f" {left_out:,} other domains are not drawn." if left_out else ""
        caption = (
            "Each point: one window, at the step from which its shares applied. The estimates are "
            f"unbiased and may be negative; a logarithmic axis leaves those out.{more}"
        )
        title = "Gradient signals"
        svg = to_svg(drawn, f"signals-{run['name']}", title=title)
        return Chart(title=title, caption=caption, svg=svg, legend=tuple(legend))


def _draw_kind(
    axes: Axes, x: Floats, values: dict[str, Any], legend: Sequence[Series], kind: str
) -> None:
    label, logarithmic = _KINDS[kind]
    any_drawn = False
    for series, measured in zip(legend, values.values(), strict=True):
        y = floats(measured)
        if logarithmic:
            y = np.where(y > 0, y, np.nan)
        any_drawn = any_drawn or bool(np.isfinite(y).any())
        lines = axes.plot(x, y, color=series.color, marker="o", markersize=2, linewidth=1.2)
        mark(lines, series)
    # matplotlib warns of a logarithmic axis without a positive value.
    if logarithmic and any_drawn:
        axes.set_yscale("log")
    else:
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.yaxis.set_major_locator(few_ticks(4))
    axes.set_ylabel(label)
