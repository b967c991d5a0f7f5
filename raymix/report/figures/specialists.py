"""Charts of merged specialists: the loss of every merge, and the loss by scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymix.report.figures.chart import Chart, Series, mark, named_series, to_svg
from raymix.report.figures.theme import SERIES_COLORS, figure

Document = Mapping[str, Any]

_AT_SCALE = {
    "given": Series(key="scale-1", label="scale 1", color=SERIES_COLORS[1], marker="s"),
    "best": Series(key="best-scale", label="best scale", color=SERIES_COLORS[0], marker="o"),
}
_REFERENCES = (
    Series(key="base", label="base", color=SERIES_COLORS[2]),
    Series(key="joint", label="joint", color=SERIES_COLORS[2], dash="dashed"),
    Series(key="specialists", label="specialists", color=SERIES_COLORS[2], dash="dotted"),
)


def specialist_charts(document: Document) -> list[Chart]:
    """Return the charts of all merges that were made."""
    return [chart for chart in (_losses(document), _loss_by_scale(document)) if chart is not None]


def _losses(document: Document) -> Chart | None:
    """Return a dot per merge and seed; base, joint training and specialists as lines."""
    merges, rows = document["merges"], document["rows"]
    if not merges:
        return None
    with figure(80 + 22.0 * len(merges)) as (sheet, (axes,)):
        for at, row in enumerate(merges.values()):
            for which, lift in (("given", -0.15), ("best", 0.15)):
                series = _AT_SCALE[which]
                values = list(row[which]["mean"]["by_seed"].values())
                dots = axes.plot(
                    values,
                    [at + lift] * len(values),
                    linestyle="none",
                    marker=series.marker,
                    markersize=4,
                    color=series.color,
                )
                mark(dots, series)
        for series in _REFERENCES:
            line = axes.axvline(
                rows[series.label]["mean"]["mean"],
                color=series.color,
                linestyle=series.line_style,
                linewidth=1.2,
            )
            mark([line], series)
        axes.set_yticks(range(len(merges)), list(merges))
        axes.invert_yaxis()
        # A merge that diverged would squeeze all others into a corner.
        axes.set_xlim(right=_largest_loss(document))
        axes.set_xlabel("nats per token")
        title = "Mean loss of every merge"
        svg = to_svg(sheet, "specialists-models", title=title)
    caption = "A dot per seed. Losses far above the base's are beyond the right edge."
    return Chart(title=title, svg=svg, caption=caption, legend=(*_AT_SCALE.values(), *_REFERENCES))


def _largest_loss(document: Document) -> float:
    """Return the largest loss shown: the base's, plus half of what joint training gained."""
    base, joint = (document["rows"][name]["mean"]["mean"] for name in ("base", "joint"))
    return float(base + 0.5 * abs(base - joint))


def _loss_by_scale(document: Document) -> Chart | None:
    """Return the search of the first seed, None where no method has a scale to search."""
    seed = str(document["seeds"][0])
    curves = {
        name: row["curves"][seed]
        for name, row in document["merges"].items()
        if len(row["curves"].get(seed, ())) > 1
    }
    if not curves:
        return None
    legend = named_series("method", curves)
    with figure(300) as (sheet, (axes,)):
        for series, points in zip(legend, curves.values(), strict=True):
            # A merge whose loss was not finite has none.
            usable = [point for point in points if point["loss"] is not None]
            lines = axes.plot(
                [point["scale"] for point in usable],
                [point["loss"] for point in usable],
                color=series.color,
                linestyle=series.line_style,
                linewidth=1.2,
                marker="o",
                markersize=2.5,
            )
            mark(lines, series)
        lowest = min(p["loss"] for points in curves.values() for p in points if p["loss"])
        # Scales far from the best lose by orders of magnitude, and are not of interest.
        axes.set_ylim(lowest - 0.05, lowest + 1.5 * (_largest_loss(document) - lowest))
        axes.set_xscale("log")
        axes.set_xlabel("scale")
        axes.set_ylabel("nats per token")
        title = "Loss by scale"
        svg = to_svg(sheet, "specialists-curves", title=title)
    caption = f"Seed {seed}, on the validation rows; every point is a merge that was made."
    return Chart(title=title, svg=svg, caption=caption, legend=tuple(legend))
