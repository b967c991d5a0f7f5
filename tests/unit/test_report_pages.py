"""Templates, theme and charts of reports: what a page may hold, and what it must not."""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

import raymix.report
from raymix.report.figures import theme
from raymix.report.figures.chart import Chart, Series, mark, mark_toggle, named_series, to_svg
from raymix.report.pages.render import render
from raymix.report.pages.tables import DataTable, TableCell, TableHead, TableRow, text_row

ROOM = Path(raymix.report.__file__).parent
MODULES = sorted(ROOM.rglob("*.py"))

# A tag with an attribute or a closing tag: `<name>` alone may stand for a placeholder.
TAG = re.compile(r"</?(?:div|p|span|table|t[hdr]|h[1-6]|dl|d[td]|figure|style|script)\b[^>]*>")
STANDALONE_SVG = {"figures/merging.py"}
"""Writes whole SVG files, which hold their theme in a style element."""


@pytest.mark.parametrize("module", MODULES, ids=[str(m.relative_to(ROOM)) for m in MODULES])
def test_python_holds_no_html(module: Path) -> None:
    if str(module.relative_to(ROOM)) in STANDALONE_SVG:
        return
    strings = [
        node.value
        for node in ast.walk(ast.parse(module.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert not [text for text in strings if TAG.search(text)]


def test_data_know_neither_pages_nor_figures() -> None:
    for module in (ROOM / "data").glob("*.py"):
        text = module.read_text("utf-8")
        assert not re.search(r"matplotlib|jinja2|markupsafe|report\.(figures|pages)", text[200:])


def test_every_color_is_defined_for_both_themes() -> None:
    css = theme.theme_css()
    light, dark = css.split("@media (prefers-color-scheme: dark)")
    stand_ins = (theme.INK, theme.MUTED, theme.GRID, theme.PAPER)
    stand_ins += theme.SERIES_COLORS + theme.BAND_COLORS + theme.LINE_COLORS
    assert len(set(stand_ins)) == 30
    for stand_in in stand_ins:
        name = re.fullmatch(r"var\((--[\w-]+)\)", theme.css_color(stand_in))
        assert name is not None
        assert f"{name[1]}:" in light
        assert f"{name[1]}:" in dark
    used = re.findall(
        r"var\((--[\w-]+)\)", (files("raymix.report.pages") / "style.css").read_text()
    )
    assert {name for name in used if f"{name}:" not in css} == {"--swatch"}


@pytest.mark.parametrize("name", ["style.css", "page.js", "templates/base.html.jinja"])
def test_files_of_the_package_are_found_as_resources(name: str) -> None:
    assert (files("raymix.report.pages") / name).is_file()


def page(table: DataTable, *charts: Chart, title: str = "t", **context: object) -> str:
    facts = {"facts": "", "page_legend": [], "left_out": [], "timelines": [], "twin": "x.json"}
    return render("schedule", title=title, planners=table, figures=charts, **(facts | context))


EMPTY = DataTable(title="none", heads=[], rows=[])


def test_what_a_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="left_out"):
        render("schedule", title="t", facts="", page_legend=[], planners=EMPTY)


def test_text_is_escaped_and_charts_are_not() -> None:
    hostile = "<script>alert('x')</script>"
    series = named_series("run", [hostile])
    table = DataTable(
        title=hostile,
        heads=[TableHead(hostile, hostile, series[0])],
        rows=[text_row(hostile, [hostile])],
        note=hostile,
    )
    chart = Chart(title=hostile, caption=hostile, value=hostile, svg=Markup("<svg></svg>"))
    html = page(table, chart, title=hostile, page_legend=series, twin=hostile)
    assert html.count("<script>") == 1
    assert html.count("<svg></svg>") == 1
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 12


def test_tables_mark_headings_and_emphasis() -> None:
    rows = [TableRow(TableHead("a"), [TableCell("1.0", "best"), TableCell("2.0")])]
    table = DataTable(title="T", heads=[TableHead("x", "unit"), TableHead("y")], rows=rows)
    html = page(table)
    assert '<th scope="col">x<small>unit</small></th><th scope="col">y</th>' in html
    row = '<th scope="row"><span class="name">a</span></th><td class="best">1.0</td><td>2.0</td>'
    assert f"<tr>{row}</tr>" in html
    # A box that scrolls can be reached without a pointer.
    assert '<div class="scroll" tabindex="0" role="region" aria-label="T">' in html


def test_series_keep_their_key_and_name_in_the_svg() -> None:
    series = Series(key="domain-7", label="a \"b\" <c> & 'd'", color=theme.LINE_COLORS[0])
    with theme.figure(100) as (drawn, (axes,)):
        mark(axes.plot([0, 1], [1, 2], color=series.color), series)
        mark([axes.fill_between([0, 1], [1, 2])], series)
        mark_toggle(axes.annotate("here", (0, 1)), series)
        svg = to_svg(drawn, "name", title=series.label)
    assert svg.count('<g data-series="domain-7"><title>') == 2
    assert svg.count('<g data-toggle="domain-7" data-label="') == 1
    escaped = "a &quot;b&quot; &lt;c&gt; &amp; &#x27;d&#x27;"
    assert svg.count(escaped) == 4
    assert f"stroke: {series.css}" in svg
    assert "series|" not in svg


def test_more_series_than_colors_differ_by_their_dash() -> None:
    looks = [(series.color, series.dash) for series in named_series("run", map(str, range(18)))]
    assert len(set(looks)) == 18
    assert looks[0][1] == "solid"
