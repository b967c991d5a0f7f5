"""Gradient signals over time: what an adaptive mixer measured, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raymix.report.data.steps import Document, Floats
from raymix.report.figures.progress import Picture, band_colours, few_ticks, floats
from raymix.report.figures.style import MUTED, figure, to_svg

# What the statistics may hold per domain: its name here, and whether its scale is one of powers.
_DRAWN = {
    "grad_norm2": ("squared norm", True),
    "grad_noise": ("noise", True),
    "alignment": ("alignment", False),
}


def picture(run: Document) -> Picture | None:
    """Return the signals drawn, a row per kind and a line per domain."""
    series = run["signals"]
    if series is None:
        return None
    kinds = list(series["values"])
    names = list(series["values"][kinds[0]])
    x = floats(series["step"])
    with figure(110 + 110.0 * len(kinds), ratios=[1] * len(kinds)) as (drawn, rows):
        colours = band_colours(run, names)
        values = series["values"]
        lines, *_ = [
            _draw(axes, x, values[k], colours, k) for axes, k in zip(rows, kinds, strict=True)
        ]
        rows[-1].set_xlabel("step")
        drawn.align_ylabels()
        shown = [name if len(name) <= 12 else f"{name[:11]}…" for name in names]
        drawn.legend(lines, shown, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
        more = f" {series['left_out']:,} other domains are not drawn." if series["left_out"] else ""
        caption = (
            "Each point: one window, by the step from which its shares held. The estimates are "
            f"unbiased and may be negative; a scale of powers leaves those out.{more}"
        )
        svg = to_svg(drawn, f"signals-{run['name']}")
        return Picture(title="Gradient signals", caption=caption, svg=svg)


def _draw(
    axes: Any, x: Floats, values: dict[str, Any], colours: Sequence[str], kind: str
) -> list[Any]:
    label, powers = _DRAWN[kind]
    lines: list[Any] = []
    for colour, found in zip(colours, values.values(), strict=True):
        y = floats(found)
        if powers:
            y = np.where(y > 0, y, np.nan)
        lines += axes.plot(x, y, color=colour, marker="o", markersize=2, linewidth=1.2)
    if powers and any(np.isfinite(line.get_ydata()).any() for line in lines):
        axes.set_yscale("log")
    else:
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.yaxis.set_major_locator(few_ticks(4))
    axes.set_ylabel(label)
    return lines
