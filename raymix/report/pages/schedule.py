"""The page of a comparison of planners, drawn from it and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymix.report.figures.schedule import (
    SCHEDULE_SERIES,
    communication_chart,
    memory_chart,
    planner_charts,
)
from raymix.report.figures.theme import require_matplotlib
from raymix.report.pages.render import render
from raymix.report.pages.tables import DataTable, TableHead, text_row
from raymix.schedule import Schedule

Document = Mapping[str, Any]

_COLUMNS = (
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
        document: `Comparison.document()`, with its `source`.
        schedules: The last schedule of each planner.
        twin: Name of the JSON file with the data behind the table.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    return render(
        "schedule",
        title=f"Planning {document['source']}: {len(document['planners'])} planners compared",
        facts=_facts(document),
        page_legend=SCHEDULE_SERIES,
        planners=_planners(document),
        left_out=[f"{name} is left out: {reason}" for name, reason in document["left_out"].items()],
        timelines=planner_charts(document, schedules),
        figures=[memory_chart(document, schedules), communication_chart(document)],
        twin=twin,
    )


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


def _planners(document: Document) -> DataTable:
    return DataTable(
        title="Planners",
        heads=[TableHead("planner"), *(TableHead(text) for _, text, _ in _COLUMNS)],
        rows=[
            text_row(name, [form.format(row[key]) for key, _, form in _COLUMNS])
            for name, row in document["planners"].items()
        ],
    )
