"""The pictures of a report, each drawn from the data that `summary` made and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raymix.report.data.steps import Document, Floats
from raymix.report.data.summary import MOST_PANELS
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One drawn figure."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class XAxis:
    """What all pictures of progress have along the bottom."""

    label: str
    of: Callable[[Document], Floats]
    """Maps a series with `step` and `tokens` to positions."""


def x_axis(runs: Sequence[Document]) -> XAxis:
    """Return steps where all runs have equal steps, else tokens."""
    sizes = {_step_tokens(run) for run in runs}
    if len(runs) > 1 and (len(sizes) > 1 or None in sizes):
        return XAxis("tokens, millions", lambda series: floats(series["tokens"]) / 1e6)
    size = sizes.pop()
    label = f"step ({size:,} tokens each)" if size else "step"
    return XAxis(label, lambda series: floats(series["step"]))


def floats(values: Sequence[Any]) -> Floats:
    """Return JSON numbers as an array, NaN for null."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def training_loss(runs: Sequence[Document], axis: XAxis) -> Picture | None:
    """Return the training loss, raw and smoothed, above the learning rate."""
    with figure(280, ratios=(3, 1)) as (drawn, (top, bottom)):
        for run, colour in zip(runs, _colours(runs), strict=True):
            series = run["training"]
            x = axis.of(series)
            if not x.size:
                continue
            top.plot(x, floats(series["loss"]), color=colour, alpha=0.3, linewidth=0.8)
            top.plot(x, floats(series["loss_smooth"]), color=colour)
            bottom.plot(x, floats(series["lr"]), color=colour)
        if not top.lines:
            return None
        _focus(top, runs)
        top.set_ylabel("loss, nats per token")
        bottom.set_ylabel("learning rate")
        bottom.set_ylim(bottom=0)
        bottom.yaxis.set_major_locator(few_ticks(3))
        bottom.yaxis.set_major_formatter("{x:g}")
        bottom.set_xlabel(axis.label)
        drawn.align_ylabels()
        window = runs[0]["training"]["smoothing_steps"]
        caption = f"Thin: every step. Bold: mean of {window:,} steps."
        return Picture(
            title="Training loss and learning rate", caption=caption, svg=to_svg(drawn, "loss")
        )


def throughput(runs: Sequence[Document], axis: XAxis) -> Picture | None:
    """Return tokens per second above the share of time spent waiting for data."""
    with figure(280, ratios=(3, 2)) as (drawn, (top, bottom)):
        for run, colour in zip(runs, _colours(runs), strict=True):
            series = run["training"]
            x = axis.of(series)
            for axes, key, scale in ((top, "tokens_per_s", 1e-3), (bottom, "data_wait", 100)):
                if not np.isfinite(floats(series[key])).any():
                    continue
                axes.plot(x, scale * floats(series[key]), color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(x, scale * floats(series[f"{key}_smooth"]), color=colour)
        if not top.lines:
            return None
        top.set_ylabel("thousand tokens per s")
        bottom.set_ylabel("waiting, % of time")
        top.set_ylim(bottom=0)
        waits = np.concatenate([100 * floats(run["training"]["data_wait"]) for run in runs])
        highest = np.nanmax(waits, initial=0.0)
        usual = max(1.0, 1.3 * np.nanquantile(np.append(waits, 0.0), 0.98))
        bottom.set_ylim(0, min(usual, max(1.0, 1.1 * highest)))
        bottom.set_xlabel(axis.label)
        drawn.align_ylabels()
        beyond = f" Off the scale: waits up to {highest:.0f} %." if highest > usual else ""
        caption = f"All workers together. Thin: every step. Bold: smoothed.{beyond}"
        svg = to_svg(drawn, "throughput")
        return Picture(title="Throughput and waiting for data", caption=caption, svg=svg)


def weights(run: Document) -> Picture | None:
    """Return the shares asked over time, one band per domain with its name at its end."""
    series = run["weights"]
    if not series["step"]:
        return None
    names = list(series["shares"])
    end = max(series["until"], series["step"][-1] + 1)
    x = np.append(floats(series["step"]), end)
    share_DV = np.array([floats(series["shares"][name]) for name in names])
    share_DV = 100 * np.concatenate([share_DV, share_DV[:, -1:]], axis=1)
    with figure(280) as (drawn, (axes,)):
        stack = axes.stackplot(
            x,
            share_DV,
            colors=band_colours(run, names),
            edgecolor=PAPER,
            linewidth=0.6,
            step="post",
        )
        for band in stack:
            band.set_zorder(2)
        axes.set(xlim=(0, end), ylim=(0, 100), ylabel="share of tokens asked, %")
        axes.set_xlabel("step")
        edges = np.concatenate([[0.0], np.cumsum(share_DV[:, -1])])
        middles = (edges[:-1] + edges[1:]) / 2
        labels = [_label(name, share) for name, share in zip(names, share_DV[:, -1], strict=True)]
        _label_right(axes, middles, labels)
        changes = len(series["step"]) - 1
        mixer = run["header"].get("mixer")
        caption = f"{f'Mixer: {mixer}. ' if mixer else ''}" + (
            f"The shares changed {changes:,} time{'s' * (changes != 1)}; right: at the end."
            if changes
            else "The shares never changed."
        )
        name = f"weights-{run['name']}"
        return Picture(title="Mixture over time", caption=caption, svg=to_svg(drawn, name))


def exactness(run: Document) -> Picture | None:
    """Return how far reading ran ahead of or behind what was asked, between the proved bounds."""
    series = run["exactness"]
    if series is None:
        return None
    unit = series["unit"]
    with figure(220) as (drawn, (axes,)):
        x = floats(series["step"])
        ahead, behind = floats(series["ahead"]), floats(series["behind"])
        axes.fill_between(x, behind, ahead, color=COLOURS[0], alpha=0.35, linewidth=0)
        axes.plot(x, ahead, color=COLOURS[0], linewidth=0.9)
        axes.plot(x, behind, color=COLOURS[0], linewidth=0.9)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        for value in (series["bound_ahead"], series["bound_behind"]):
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
        axes.margins(x=0, y=0.22)
        axes.set_ylabel(f"read minus asked, {unit}")
        axes.set_xlabel("step")
        caption = (
            f"The domain furthest ahead and the one furthest behind after each step: at most "
            f"{_signed(series['most_ahead'])} and {_signed(series['most_behind'])} {unit} in the "
            f"whole run. The bound is that of {series['because']}."
        )
        name = f"exactness-{run['name']}"
        return Picture(title="Read against asked", caption=caption, svg=to_svg(drawn, name))


def amounts(run: Document) -> Picture | None:
    """Return the tokens read per domain as bars, with the passes over its data at their ends."""
    rows = [(name, row) for name, row in run["domains"].items() if row["tokens"] is not None]
    if not rows:
        return None
    rows.sort(key=lambda item: -item[1]["tokens"])
    shown, rest = rows[:MOST_PANELS], rows[MOST_PANELS:]
    bars = [(name, row["tokens"], row["epochs"]) for name, row in shown]
    if rest:
        bars.append((f"{len(rest):,} others", sum(row["tokens"] for _, row in rest), None))
    bars.reverse()
    scale, unit = _scale(max(tokens for _, tokens, _ in bars))
    with figure(46 + 17.0 * len(bars)) as (drawn, (axes,)):
        lengths = [tokens / scale for _, tokens, _ in bars]
        drawn_bars = axes.barh([name for name, _, _ in bars], lengths, color=COLOURS[0], height=0.7)
        ends = [_passes(tokens, epochs) for _, tokens, epochs in bars]
        axes.bar_label(drawn_bars, ends, padding=3, fontsize=9)
        axes.set_xlabel(f"{unit}tokens read".strip())
        axes.margins(x=0.24, y=0.01)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        longest = max(len(name) for name, _, _ in bars)
        if longest > 24:
            axes.tick_params(axis="y", labelsize=7)
        caption = "At each bar's end: passes over the domain's training text."
        name = f"amounts-{run['name']}"
        title = "Tokens and epochs per domain"
        return Picture(title=title, caption=caption, svg=to_svg(drawn, name))


def heldout(runs: Sequence[Document], axis: XAxis) -> list[Picture]:
    """Return one small panel per domain: held-out loss, and the unigram entropy dotted."""
    names = list(dict.fromkeys(name for run in runs for name in run["heldout"]["loss"]))
    return [_heldout_panel(name, runs, axis) for name in names]


def _heldout_panel(name: str, runs: Sequence[Document], axis: XAxis) -> Picture:
    last: list[float] = []
    with panel() as (drawn, axes):
        for run, colour in zip(runs, _colours(runs), strict=True):
            loss = floats(run["heldout"]["loss"].get(name, []))
            if not np.isfinite(loss).any():
                continue
            x = axis.of(run["heldout"])
            axes.plot(x, loss, color=colour, marker="o", markersize=2.2, linewidth=1.3)
            last.append(loss[np.isfinite(loss)][-1])
            law = run["law"] or {"loss": {}}
            if name in law["loss"]:
                foretold = floats(law["loss"][name])
                axes.plot(axis.of(law), foretold, color=colour, dashes=(4, 2), linewidth=1.1)
        entropies = {(run["domains"].get(name) or {}).get("unigram_entropy") for run in runs}
        for entropy in sorted(value for value in entropies if value is not None):
            axes.axhline(entropy, color=INK, linestyle=(0, (1, 1.6)), linewidth=1.4)
        axes.xaxis.set_major_locator(few_ticks(4))
        axes.yaxis.set_major_locator(few_ticks(4))
        axes.set_xlabel(axis.label.split(" (")[0], fontsize=9)
        axes.set_ylabel("nats per token", fontsize=9)
        svg = to_svg(drawn, f"heldout-{name}")
    return Picture(title=name, caption=", ".join(f"{value:.2f}" for value in last), svg=svg)


def few_ticks(most: int) -> Any:
    """Return a locator of at most `most` ticks at round values."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10])


def _colours(runs: Sequence[Document]) -> list[str]:
    return [COLOURS[at % len(COLOURS)] for at in range(len(runs))]


def band_colours(run: Document, names: Sequence[str]) -> list[str]:
    """Return a colour per band: by domain where there are few, so that runs can be compared."""
    known = list(run["domains"])
    if len(known) > len(BAND_COLOURS):
        return [*BAND_COLOURS[: len(names) - 1], BAND_COLOURS[-1]]
    return [BAND_COLOURS[known.index(name)] for name in names]


def _step_tokens(run: Document) -> int | None:
    tokens = floats(run["training"]["tokens"])
    step = floats(run["training"]["step"])
    if not tokens.size or not step[0] or not np.isfinite(tokens).all():
        return None
    size = tokens / step
    return int(size[0]) if np.ptp(size) == 0 else None


def _focus(axes: Axes, runs: Sequence[Document]) -> None:
    """Let the y axis end at the smoothed losses, so that a few spikes do not flatten the rest."""
    smooth = np.concatenate([floats(run["training"]["loss_smooth"]) for run in runs])
    raw = np.concatenate([floats(run["training"]["loss"]) for run in runs])
    if not np.isfinite(smooth).any():
        return
    low, high = np.nanmin(raw), np.nanmax(smooth)
    room = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)


def _label_right(axes: Axes, heights: Floats, labels: Sequence[str]) -> None:
    """Write labels beside the right edge at `heights` (in %), moved apart where they touch."""
    gap = 5.2
    places = spread(heights, gap)
    for height, place, label in zip(heights, places, labels, strict=True):
        axes.annotate(
            label,
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


def spread(heights: Floats, gap: float, low: float = 0.0, high: float = 100.0) -> Floats:
    """Return `heights` (ascending) moved as little as needed to lie `gap` apart in [low, high]."""
    places = np.array(heights, dtype=np.float64)
    gap = min(gap, (high - low) / max(len(places), 1))
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
    name = name if len(name) <= 12 else f"{name[:11]}…"
    return f"{name} {share:.1f} %" if share < 99.95 else f"{name} 100 %"


def _signed(value: float) -> str:
    form = "+,.0f" if abs(value) >= 100 else "+.3g"
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _passes(tokens: float, epochs: float | None) -> str:
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
