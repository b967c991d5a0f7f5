"""The page of a comparison of planners, drawn from it and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from raymix.report.data.predictions import schedule_of
from raymix.report.figures.progress import Picture
from raymix.report.figures.style import (
    BAND_COLOURS,
    COLOURS,
    GRID,
    INK,
    MUTED,
    css_colour,
    figure,
    require_matplotlib,
    to_svg,
)
from raymix.report.pages.run import whole_page
from raymix.schedule.plan import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = Mapping[str, Any]

# Ranks and planners drawn over time: more cannot be told apart.
_MOST_RANKS = 64
_DRAWN = 4
_LOCAL, _SHARDED, _WAITING = BAND_COLOURS[0], BAND_COLOURS[1], BAND_COLOURS[2]
_HEADINGS = (
    ("speedup_over_default", "over default", "{:.2f}x"),
    ("speedup_over_packed", "over packed", "{:.2f}x"),
    ("share_of_bound", "of the bound", "{:.0%}"),
    ("memory_violations", "memory violations", "{:,}"),
    ("most_tokens", "most tokens on a rank", "{:,}"),
    ("gathered_tokens", "tokens gathered per rank", "{:,.0f}"),
    ("busy_share", "ranks at work", "{:.0%}"),
    ("micro_steps", "micro-steps", "{:.1f}"),
    ("step_s", "step, s", "{:.4g}"),
    ("plan_ms", "planning, ms", "{:.1f}"),
)


def schedule_page(document: Document, schedules: Mapping[str, Schedule], *, twin: str) -> str:
    """Return the page as HTML: a table, ranks over time, memory and communication.

    Args:
        document: What `Comparison.document()` says, with its `source`.
        schedules: The last schedule of each planner.
        twin: Name of the JSON file with the data behind the table.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    title = f"Planning {document['source']}: {len(document['planners'])} planners compared"
    shown = _shown(document)
    end = max(schedules[name].seconds for name in shown)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_facts(document))}</p>',
        _table(document),
        f'<h2>Ranks over time, last step</h2>{gantt_legend()}<div class="grid">',
        *(_card(name, gantt(schedules[name], end, f"gantt-{name}")) for name in shown),
        '</div><h2>Memory and communication</h2><div class="grid">',
        _card("Most tokens per rank, last step", _memory(document, schedules)),
        _card("Tokens gathered per rank and step", _gathered(document)),
        "</div>",
        f'<p class="quiet">raymix {escape(version("raymix"))}. The data of the table is in '
        f"{escape(twin)}, beside this page.</p>",
    ]
    return whole_page(title, parts)


def _shown(document: Document) -> list[str]:
    """Return the planners drawn over time: the fastest, and the baselines."""
    names = list(document["planners"])
    wanted = [names[0], "refine", "packed", "skrull", "default", *names]
    return list(dict.fromkeys(name for name in wanted if name in names))[:_DRAWN]


def _facts(document: Document) -> str:
    layout, cost = document["layout"], document["cost"]
    words = [
        f"{document['sequences']:,} sequences a step, {document['steps']:,} steps",
        f"{layout['groups']} groups of {layout['context']} ranks, barrier: {layout['barrier']}",
        f"widths {', '.join(map(str, layout['widths']))}",
        f"{cost['memory_tokens']:,} tokens fit on a rank",
        f"times by the cost model of {cost['hardware'] or 'unnamed hardware'}",
    ]
    return "; ".join(words)


def _table(document: Document) -> str:
    heads = "".join(f"<th>{escape(text)}</th>" for _, text, _ in _HEADINGS)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{form.format(row[key])}</td>" for key, _, form in _HEADINGS)
        + "</tr>"
        for name, row in document["planners"].items()
    )
    left = "".join(
        f'<p class="quiet">{escape(name)} is left out: {escape(why)}</p>'
        for name, why in document["left_out"].items()
    )
    table = f"<table><tr><th>planner</th>{heads}</tr>{rows}</table>"
    return f'<div class="card scroll">{table}</div>{left}'


def _key(colour: str) -> str:
    style = f"background:{css_colour(colour)}"
    return f'<span class="key" style="{style}"></span>'


def _card(title: str, svg: str) -> str:
    return f'<figure class="card"><h3>{escape(title)}</h3>{svg}</figure>'


def gantt_legend() -> str:
    """Return what the colours of `gantt` mean, as HTML."""
    return (
        f'<p class="legend"><span>{_key(_LOCAL)}local sequences</span>'
        f"<span>{_key(_SHARDED)}sharded sequences and the layers they share</span>"
        f"<span>{_key(_WAITING)}communication that is waited for</span></p>"
    )


def planned_pictures(run: Mapping[str, Any]) -> list[Picture]:
    """Return ranks over time in some steps of a run, as its schedules planned them."""
    drawn: list[Picture] = []
    for planned in run["schedules"]:
        schedule = schedule_of(planned)
        step, took = planned["step"], planned["measured_s"]
        assumed = " (assumed)" if planned["cost"]["hardware"] == "assumed" else ""
        measured = "" if took is None else f"; the whole step took {1e3 * took:.4g} ms"
        plural = "s" * (planned["micro_steps"] != 1)
        caption = (
            f"{planned['documents']:,} documents, {planned['shared']:,} of them shared, "
            f"{planned['tokens']:,} tokens, {planned['micro_steps']} micro-step{plural}; "
            f"ranks at work {planned['busy_share']:.0%} of the time. "
            f"Planned by the cost model{assumed}: "
            f"{1e3 * planned['planned_s']:.4g} ms{measured}."
        )
        name = f"gantt-{run['name']}-{step}"
        svg = gantt(schedule, schedule.seconds, name, legend=True)
        title = f"Schedule of step {step:,}, by {planned['planner']}"
        drawn.append(Picture(title=title, caption=caption, svg=svg))
    return drawn


def gantt(schedule: Schedule, end: float, name: str, *, legend: bool = False) -> str:
    """Return ranks against time as SVG: one bar per rank and micro-step, by what fills it.

    Args:
        schedule: What is drawn.
        end: Where the axis of time ends, in seconds.
        name: Keeps the picture's ids apart.
        legend: Say below it what the colours mean.
    """
    ranks = min(schedule.layout.ranks, _MOST_RANKS)
    height = (90 if legend else 70) + 5.0 * ranks
    local_MR, wait_MR = _split(schedule)
    timing = schedule.timing
    with figure(height) as (drawn, (axes,)):
        for micro in range(schedule.micro_steps):
            begin = 1e3 * timing.start_MR[micro, :ranks]
            for colour, part in (
                (_WAITING, wait_MR),
                (_LOCAL, local_MR),
                (_SHARDED, timing.busy_MR - local_MR - wait_MR),
            ):
                width = 1e3 * part[micro, :ranks]
                axes.barh(np.arange(ranks), width, left=begin, height=0.8, color=colour)
                begin = begin + width
            if micro:
                starts = 1e3 * timing.start_MR[micro, :ranks]
                axes.vlines(
                    starts, np.arange(ranks) - 0.5, np.arange(ranks) + 0.5, color=INK, lw=0.4
                )
        _group_lines(axes, schedule, ranks)
        axes.set(xlim=(0, 1e3 * end), ylim=(ranks - 0.5, -0.5), ylabel="rank")
        axes.set_xlabel(f"ms; done after {1e3 * schedule.seconds:.4g}")
        if legend:
            _key_below(drawn)
        return to_svg(drawn, name)


def _key_below(drawn: Figure) -> None:
    from matplotlib.patches import Patch

    colours = {"local": _LOCAL, "shared": _SHARDED, "waiting for others' part": _WAITING}
    patches = [Patch(color=colour, label=label) for label, colour in colours.items()]
    drawn.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _group_lines(axes: Axes, schedule: Schedule, ranks: int) -> None:
    axes.grid(visible=False, axis="y")
    for edge in range(schedule.layout.context, ranks, schedule.layout.context):
        axes.axhline(edge - 0.5, color=MUTED, linewidth=0.6)


def _split(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Return time on local sequences, layers by their tokens included, and time waited, (M, R)."""
    timing, placed = schedule.timing, schedule.placed
    alone = placed.width_K == 1
    cells = (placed.micro_K[alone], placed.first_K[alone])
    tokens_MR = np.zeros(timing.busy_MR.shape)
    np.add.at(tokens_MR, cells, schedule.length_K[alone])
    wait_MR = np.maximum(timing.gather_MR - timing.local_MR, 0.0)
    share_MR = tokens_MR / np.maximum(timing.tokens_MR, 1)
    return timing.local_MR + share_MR * timing.linear_MR, wait_MR


def _memory(document: Document, schedules: Mapping[str, Schedule]) -> str:
    names = list(document["planners"])
    limit = document["cost"]["memory_tokens"]
    with figure(60 + 20.0 * len(names)) as (drawn, (axes,)):
        for at, name in enumerate(names):
            memory_R = np.sort(schedules[name].memory_R)
            axes.plot(memory_R, np.full(memory_R.size, at), "|", color=COLOURS[0], markersize=9)
        axes.axvline(limit, color=INK, linestyle=(0, (1, 1.6)))
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1.05 * max(limit, 1)), ylim=(len(names) - 0.5, -0.5))
        axes.set_xlabel("tokens, one mark per rank; dotted: what fits")
        return to_svg(drawn, "memory")


def _gathered(document: Document) -> str:
    rows = document["planners"]
    names: Sequence[str] = list(rows)
    with figure(60 + 20.0 * len(names)) as (drawn, (axes,)):
        amounts = [rows[name]["gathered_tokens"] for name in names]
        axes.barh(list(names), amounts, color=COLOURS[1], height=0.7, edgecolor=GRID)
        axes.invert_yaxis()
        axes.set_xlabel("tokens whose keys and values pass through a rank")
        return to_svg(drawn, "gathered")
