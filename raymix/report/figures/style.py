"""How figures look: one size that reads on a phone, colours that the page's theme decides.

Figures are drawn by matplotlib in stand-in colours; in the SVG each stand-in becomes a CSS
variable, so one picture serves the light and the dark theme. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from raymix.errors import RecipeError, problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_PT = 340.0
"""Width of a figure in points, one CSS pixel each on a phone."""

PANEL_PT = (165.0, 125.0)
"""Width and height of one of many small figures."""

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"

# Okabe and Ito's palette, told apart under the common kinds of colour blindness; each with a
# darker tone for light paper and a lighter one for dark paper.
SERIES = {
    "#0a0001": ("#0072b2", "#56a5e8"),
    "#0a0002": ("#c25200", "#f08a3c"),
    "#0a0003": ("#00805c", "#2fc197"),
    "#0a0004": ("#a8497f", "#dd8fbd"),
    "#0a0005": ("#8a7400", "#d9c64a"),
    "#0a0006": ("#3a8fbf", "#8fd0f5"),
}
COLOURS = tuple(SERIES)

# Bands that lie on each other: told apart by their neighbours and a direct label (Tol's muted).
BANDS = {
    "#0b0001": ("#88ccee", "#3f86a8"),
    "#0b0002": ("#cc6677", "#a34556"),
    "#0b0003": ("#ddcc77", "#97883a"),
    "#0b0004": ("#44aa99", "#2a7d70"),
    "#0b0005": ("#aa4499", "#8d3a80"),
    "#0b0006": ("#999933", "#6f6f25"),
    "#0b0007": ("#6f7fd0", "#4a56a0"),
    "#0b0008": ("#e0a58a", "#a0694f"),
    "#0b0009": ("#66aa55", "#447a38"),
    "#0b000a": ("#bbbbbb", "#666666"),
}
BAND_COLOURS = tuple(BANDS)

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"c{colour[1:]}" for colour in (*SERIES, *BANDS)
}


def css_variables(theme: int) -> str:
    """Return the CSS declarations of all data colours; theme 0 is light, 1 is dark."""
    return "".join(
        f"--{_VARIABLES[stand_in]}:{shades[theme]};"
        for stand_in, shades in (SERIES | BANDS).items()
    )


def css_colour(stand_in: str) -> str:
    """Return the CSS value of a stand-in colour."""
    return f"var(--{_VARIABLES[stand_in]})"


def require_matplotlib() -> None:
    """Raise RecipeError that names the extra if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        wrong = "drawing needs this package and it is not installed"
        raise RecipeError(problem("report", "matplotlib", wrong, "Run `pip install raymix[plots]`"))


@contextmanager
def figure(
    height_pt: float, *, ratios: Sequence[float] = (1.0,)
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure and its axes, one above the other, with a common x axis."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72, hspace=0.04)
    with mpl.rc_context(_rc()):
        drawn = Figure(figsize=(WIDTH_PT / 72, height_pt / 72), layout=engine)
        axes = drawn.subplots(
            len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
        )
        yield drawn, [row[0] for row in axes]


@contextmanager
def panel() -> Iterator[tuple[Figure, Axes]]:
    """Yield a small figure, one of many, and its axes; fixed margins, as they line up so."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    width, height = PANEL_PT
    with mpl.rc_context(_rc()):
        drawn = Figure(figsize=(width / 72, height / 72))
        # Left, bottom, width and height as parts of the figure: room for labels of 9 points.
        yield drawn, drawn.add_axes((0.235, 0.265, 0.735, 0.695))


def to_svg(drawn: Figure, name: str) -> str:
    """Return the figure as an `<svg>` element for a page; `name` keeps its ids apart."""
    import matplotlib as mpl

    out = io.StringIO()
    # matplotlib names clip paths by a salted hash: the salt makes pages the same each time.
    with mpl.rc_context({**_rc(), "svg.hashsalt": name}):
        drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda hit: hit[0] if hit[1] in used else "", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', _root, svg, count=1, flags=re.DOTALL)
    svg = re.sub("|".join(_VARIABLES), lambda hit: css_colour(hit[0]), svg)
    return svg.replace("'DejaVu Sans'", "system-ui, sans-serif")


def _root(match: re.Match[str]) -> str:
    return (
        f'<svg viewBox="{match[1]}" role="img" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )


def _rc() -> dict[str, Any]:
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "svg.fonttype": "none",
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.labelsize": 10,
        "axes.formatter.limits": (-3, 5),
        "axes.prop_cycle": _cycler(),
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
    }


def _cycler() -> Any:
    from cycler import cycler

    return cycler(color=list(COLOURS))
