"""Charts as inline SVG whose series a page can highlight and hide.

A series is a run, a domain, a mixer: whatever the legend names. matplotlib carries its key into the
SVG as the group id of each artist; `to_svg` turns these into `data-series` attributes, which,
unlike ids, may occur any number of times in a page, and adds the name as a tooltip.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape, unescape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup

from raymix.report.data.steps import Floats
from raymix.report.figures.theme import SERIES_COLORS, css_color, rc_settings, themed

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

Dash = Literal["solid", "dashed", "dotted"]

LINE_STYLES: dict[Dash, Any] = {"solid": "-", "dashed": (0, (5, 1.5)), "dotted": (0, (1, 1.2))}
"""matplotlib's line style of each dash."""

# A legend in HTML has no markers of matplotlib's: these characters look like them.
_GLYPHS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼"}
_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted")
_GROUP = re.compile(r'<g id="(series|toggle)\|([\w-]+)\|([^"]*)">')


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A series of a chart and its entry in a legend."""

    key: str
    """Joins the legend entry with the series' groups in the SVG."""
    label: str
    color: str
    """A stand-in color of the theme."""
    dash: Dash = "solid"
    area: bool = False
    """Drawn as an area, not as a line."""
    marker: str = ""
    """matplotlib's marker, where the series is drawn as points."""

    @property
    def css(self) -> str:
        """Return the color as a CSS value."""
        return css_color(self.color)

    @property
    def glyph(self) -> str:
        """Return the marker as a character, empty where there is none."""
        return _GLYPHS.get(self.marker, "")

    @property
    def line_style(self) -> Any:
        """Return matplotlib's line style."""
        return LINE_STYLES[self.dash]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One drawn figure."""

    title: str
    svg: Markup
    caption: str = ""
    legend: tuple[Series, ...] = ()
    """Series that this figure names itself; those of a legend of the whole page are left out."""
    value: str = ""
    """Final value, shown beside the title of a small figure."""


def named_series(kind: str, names: Iterable[str]) -> list[Series]:
    """Return a series per name: six colors, first solid, then dashed, then dotted.

    Args:
        kind: Prefix of the keys, so that runs and domains of one page stay apart.
        names: Labels, in the order of the legend.
    """
    return [
        Series(
            key=f"{kind}-{at}",
            label=name,
            color=SERIES_COLORS[at % len(SERIES_COLORS)],
            dash=_DASHES[at // len(SERIES_COLORS) % len(_DASHES)],
        )
        for at, name in enumerate(names)
    ]


def mark(artists: Iterable[Artist], series: Series) -> None:
    """Make `artists` part of `series` in the SVG."""
    for artist in artists:
        artist.set_gid(f"series|{series.key}|{series.label}")


def mark_toggle(artist: Artist, series: Series) -> None:
    """Make the text `artist` a label that acts like the legend entry of `series`."""
    artist.set_gid(f"toggle|{series.key}|{series.label}")


def shortened(name: str, length: int = 12) -> str:
    """Return a name cut to `length` characters for a label in a figure."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def floats(values: Sequence[Any]) -> Floats:
    """Return JSON numbers as an array, NaN for null."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def to_svg(drawn: Figure, name: str, *, title: str = "") -> Markup:
    """Return a figure as an `<svg>` element, safe to insert into a page.

    Args:
        drawn: The figure.
        name: Keeps the ids of the figures of a page apart.
        title: Accessible name of the figure.
    """
    import matplotlib as mpl

    out = io.StringIO()
    # matplotlib names clip paths by a salted hash: a fixed salt makes pages reproducible.
    with mpl.rc_context({**rc_settings(), "svg.hashsalt": name}):
        drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    # The XML declaration and document type may not occur inside HTML.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = _GROUP.sub(_series_group, svg)
    # matplotlib numbers groups afresh in each figure, but ids must be unique in a page.
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    root = _root(re.search(r'viewBox="([^"]*)"', svg), title)
    svg = re.sub(r"<svg [^>]*>", lambda match: root, svg, count=1, flags=re.DOTALL)
    svg = themed(svg).replace("'DejaVu Sans'", "system-ui, sans-serif")
    # matplotlib escapes all text that it is given, so the element holds no markup of others.
    return Markup(svg)


def _series_group(match: re.Match[str]) -> str:
    kind, key, label = match.groups()
    name = escape(unescape(label))
    # A label needs no tooltip: it is the name, and its accessible name is the script's to set.
    if kind == "toggle":
        return f'<g data-toggle="{key}" data-label="{name}">'
    return f'<g data-series="{key}"><title>{name}</title>'


def _root(view: re.Match[str] | None, title: str) -> str:
    assert view is not None  # matplotlib always writes it
    # Without width and height the element fills its card, at any size of screen.
    label = f' aria-label="{escape(title)}"' if title else ""
    return (
        f'<svg viewBox="{view[1]}" role="img"{label} xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
