"""Charts of sequence schedules: ranks over time, memory, communication.

Shapes: M micro-steps, R ranks, K sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from raymix.report.data.predictions import schedule_of
from raymix.report.data.steps import Floats
from raymix.report.figures.chart import Chart, Series, mark, to_svg
from raymix.report.figures.theme import (
    BAND_COLORS,
    GRID,
    INK,
    MUTED,
    SERIES_COLORS,
    figure,
)
from raymix.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]

# More bars than this are thinner than a pixel.
_MAX_RANKS = 64
# Planners drawn over time: the fastest and the baselines.
_MAX_PLANNERS = 4

_LOCAL = Series(key="local", label="local sequences", color=BAND_COLORS[0], area=True)
_SHARDED = Series(
    key="sharded",
    label="sharded sequences and the layers they share",
    color=BAND_COLORS[1],
    area=True,
)
_WAITING = Series(
    key="waiting", label="communication that is waited for", color=BAND_COLORS[2], area=True
)
SCHEDULE_SERIES = (_LOCAL, _SHARDED, _WAITING)
"""Parts of a rank's time in a micro-step."""


def planned_charts(run: Mapping[str, Any]) -> list[Chart]:
    """Return ranks over time in some steps of a run, as its schedules planned them."""
    charts: list[Chart] = []
    for planned in run["schedules"]:
        schedule = schedule_of(planned)
        step, measured_s = planned["step"], planned["measured_s"]
        assumed = " (assumed)" if planned["cost"]["hardware"] == "assumed" else ""
        measured = "" if measured_s is None else f"; the whole step took {1e3 * measured_s:.4g} ms"
        plural = "s" * (planned["micro_steps"] != 1)
        caption = (
            f"{planned['documents']:,} documents, {planned['shared']:,} of them sharded, "
            f"{planned['tokens']:,} tokens, {planned['micro_steps']} micro-step{plural}; "
            f"ranks at work {planned['busy_share']:.0%} of the time. "
            f"Planned by the cost model{assumed}: "
            f"{1e3 * planned['planned_s']:.4g} ms{measured}."
        )
        title = f"Schedule of step {step:,}, by {planned['planner']}"
        svg = gantt(schedule, schedule.seconds, f"gantt-{run['name']}-{step}", title=title)
        charts.append(Chart(title=title, caption=caption, svg=svg, legend=SCHEDULE_SERIES))
    return charts


def planner_charts(document: Document, schedules: Mapping[str, Schedule]) -> list[Chart]:
    """Return ranks over time in the last step, for the fastest planner and the baselines."""
    names = list(document["planners"])
    candidates = [names[0], "refine", "packed", "skrull", "default", *names]
    shown = list(dict.fromkeys(name for name in candidates if name in names))[:_MAX_PLANNERS]
    # One time axis for all, so that lengths of bars can be compared between charts.
    end = max(schedules[name].seconds for name in shown)
    return [
        Chart(title=name, svg=gantt(schedules[name], end, f"gantt-{name}", title=name))
        for name in shown
    ]


def gantt(schedule: Schedule, end: float, name: str, *, title: str) -> Markup:
    """Return ranks against time as SVG: one bar per rank and micro-step, by what fills it.

    Args:
        schedule: The schedule to draw.
        end: End of the time axis, seconds.
        name: Keeps the ids of the figures of a page apart.
        title: Accessible name of the figure.
    """
    ranks = min(schedule.layout.ranks, _MAX_RANKS)
    local_MR, wait_MR = _local_and_waiting(schedule)
    timing = schedule.timing
    parts = (
        (_WAITING, wait_MR),
        (_LOCAL, local_MR),
        (_SHARDED, timing.busy_MR - local_MR - wait_MR),
    )
    with figure(70 + 5.0 * ranks) as (drawn, (axes,)):
        for micro in range(schedule.micro_steps):
            start = 1e3 * timing.start_MR[micro, :ranks]
            left = start
            for series, part_MR in parts:
                width = 1e3 * part_MR[micro, :ranks]
                bars = axes.barh(np.arange(ranks), width, left=left, height=0.8, color=series.color)
                mark(bars, series)
                left = left + width
            if micro:
                rows = np.arange(ranks)
                axes.vlines(start, rows - 0.5, rows + 0.5, color=INK, lw=0.4)
        _group_lines(axes, schedule, ranks)
        axes.set(xlim=(0, 1e3 * end), ylim=(ranks - 0.5, -0.5), ylabel="rank")
        # Ranks are whole numbers, which matplotlib does not know.
        axes.set_yticks(range(0, ranks, max(1, ranks // 4)))
        axes.set_xlabel(f"ms; done after {1e3 * schedule.seconds:.4g}")
        return to_svg(drawn, name, title=title)


def _group_lines(axes: Axes, schedule: Schedule, ranks: int) -> None:
    """Separate context-parallel groups."""
    axes.grid(visible=False, axis="y")
    for edge in range(schedule.layout.context, ranks, schedule.layout.context):
        axes.axhline(edge - 0.5, color=MUTED, linewidth=0.6)


def _local_and_waiting(schedule: Schedule) -> tuple[Floats, Floats]:
    """Return seconds on local sequences and seconds waited for communication, (M, R) each.

    Layers that work on each token alone take time by tokens, so local sequences get their share.
    """
    timing, placement = schedule.timing, schedule.placement
    is_local_K = placement.width_K == 1
    cells = (placement.micro_K[is_local_K], placement.first_K[is_local_K])
    tokens_MR = np.zeros(timing.busy_MR.shape)
    # `+=` with repeated indices adds once; several sequences share a rank and micro-step.
    np.add.at(tokens_MR, cells, schedule.length_K[is_local_K])
    wait_MR = np.maximum(timing.gather_MR - timing.local_MR, 0.0)
    share_MR = tokens_MR / np.maximum(timing.tokens_MR, 1)
    return timing.local_MR + share_MR * timing.linear_MR, wait_MR


def memory_chart(document: Document, schedules: Mapping[str, Schedule]) -> Chart:
    """Return the most tokens on each rank in the last step, a row per planner."""
    names = list(document["planners"])
    limit = document["cost"]["memory_tokens"]
    title = "Most tokens per rank, last step"
    with figure(60 + 20.0 * len(names)) as (drawn, (axes,)):
        for at, name in enumerate(names):
            memory_R = np.sort(schedules[name].memory_R)
            axes.plot(
                memory_R, np.full(memory_R.size, at), "|", color=SERIES_COLORS[0], markersize=9
            )
        axes.axvline(limit, color=INK, linestyle=(0, (1, 1.6)))
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1.05 * max(limit, 1)), ylim=(len(names) - 0.5, -0.5))
        axes.set_xlabel("tokens, one mark per rank; dotted: what fits")
        return Chart(title=title, svg=to_svg(drawn, "memory", title=title))


def communication_chart(document: Document) -> Chart:
    """Return the tokens gathered per rank and step, a bar per planner."""
    rows = document["planners"]
    names: Sequence[str] = list(rows)
    title = "Tokens gathered per rank and step"
    with figure(60 + 20.0 * len(names)) as (drawn, (axes,)):
        amounts = [rows[name]["gathered_tokens"] for name in names]
        axes.barh(names, amounts, color=SERIES_COLORS[1], height=0.7, edgecolor=GRID)
        axes.invert_yaxis()
        axes.set_xlabel("tokens whose keys and values pass through a rank")
        return Chart(title=title, svg=to_svg(drawn, "gathered", title=title))
