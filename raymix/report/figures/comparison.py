"""Charts of a comparison of mixers: held-out losses against tokens and operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raymix.report.figures.chart import Chart, Series, floats, mark, named_series, to_svg
from raymix.report.figures.theme import figure, panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS = 24
MEASURES = {"mean": "mean over domains", "worst": "worst domain", "target": "targets"}
"""The measures of a run, and their names."""

Document = Mapping[str, Any]


def measures_of(document: Document) -> list[str]:
    """Return the measures that some mixer has."""
    return [m for m in MEASURES if any(m in row for row in document["mixers"].values())]


def mixer_series(document: Document) -> list[Series]:
    """Return a series per mixer, for all charts of the page."""
    return named_series("mixer", document["mixers"])


def loss_charts(document: Document) -> list[Chart]:
    """Return the held-out loss over the run by each measure, by tokens and by operations."""
    _, unit = _operations_unit(document)
    labels = {
        "tokens": "tokens, millions",
        "flops": f"operations of training and measuring, {unit}",
    }
    charts: list[Chart] = []
    for measure in measures_of(document):
        for axis, label in labels.items():
            against = "tokens" if axis == "tokens" else "operations"
            title = f"Held-out loss, {MEASURES[measure]}, against {against}"
            with figure(260) as (sheet, (axes,)):
                _draw_mixers(axes, document, (measure,), axis)
                axes.set_ylabel("nats per token")
                axes.set_xlabel(label)
                svg = to_svg(sheet, f"compare-{measure}-{axis}", title=title)
            caption = "Line: mean over seeds. Band: least and most."
            charts.append(Chart(title=title, svg=svg, caption=caption))
    return charts


def domain_panels(document: Document) -> list[Chart]:
    """Return the held-out loss of each domain against operations, targets first."""
    charts: list[Chart] = []
    for name in [*document["targets"], *document["domains"]][:MAX_PANELS]:
        with panel() as (sheet, axes):
            _draw_mixers(axes, document, ("domains", name), "flops")
            axes.set_xlabel(_operations_unit(document)[1], fontsize=9)
            axes.set_ylabel("nats per token", fontsize=9)
            axes.locator_params(nbins=4)
            title = f"Held-out loss of {name} against operations"
            svg = to_svg(sheet, f"compare-domain-{name}", title=title)
        value = "target" if name in document["targets"] else ""
        charts.append(Chart(title=name, svg=svg, value=value))
    return charts


def _operations_unit(document: Document) -> tuple[float, str]:
    """Return the size and the name of a unit that suits the operations of a run."""
    last = [max(row["curve"]["flops"], default=0.0) for row in document["mixers"].values()]
    # One unit for all mixers, or their axes could not be compared.
    for scale, name in ((1e18, "exaflop"), (1e15, "petaflop"), (1e12, "teraflop")):
        if max(last, default=0.0) >= scale:
            return scale, name
    return 1e9, "gigaflop"


def _draw_mixers(axes: Axes, document: Document, path: Sequence[str], axis: str) -> None:
    """Draw every mixer's curve, with the steep beginning above the chart.

    Args:
        axes: Where to draw.
        document: The comparison.
        path: Keys of the measure in a mixer's curve.
        axis: Key of the x positions, `tokens` or `flops`.
    """
    scale, _ = _operations_unit(document)
    low: list[float] = []
    high: list[float] = []
    for series, row in zip(mixer_series(document), document["mixers"].values(), strict=True):
        curve: Any = row["curve"]
        band = curve
        for key in path:
            band = band.get(key) or {}
        mean = floats(band.get("mean", []))
        if not mean.size:
            continue
        x = floats(curve[axis]) / (1e6 if axis == "tokens" else scale)
        area = axes.fill_between(
            x,
            floats(band["low"]),
            floats(band["high"]),
            color=series.color,
            alpha=0.15,
            linewidth=0,
        )
        lines = axes.plot(x, mean, color=series.color, linestyle=series.line_style, linewidth=1.3)
        mark([area, *lines], series)
        low.append(float(floats(band["low"]).min()))
        # After the first fifth of the evaluations mixers differ by little: that is what to show.
        high.append(float(mean[min(len(mean) - 1, max(1, len(mean) // 5))]))
    if low and max(high) > min(low):
        room = 0.06 * (max(high) - min(low))
        axes.set_ylim(min(low) - room, max(high) + room)
