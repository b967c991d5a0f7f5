"""Look of figures: sizes that read on a phone, and colors that the page's theme decides.

matplotlib draws in stand-in colors; in the SVG each becomes a CSS variable of `theme.css`, so one
figure serves the light and the dark theme.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from raymix.errors import RecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_PT = 340.0
"""Width of a figure in points, one CSS pixel each on a phone."""

PANEL_PT = (165.0, 125.0)
"""Width and height of a small figure, one of many, in points."""

# Colors that no figure draws by chance, so that replacing them in the SVG's text is safe.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"

SERIES_COLORS = tuple(f"#0a00{n:02x}" for n in range(1, 7))
"""Lines and markers of runs, mixers and merges."""

BAND_COLORS = tuple(f"#0b00{n:02x}" for n in range(1, 11))
"""Areas of domains."""

LINE_COLORS = tuple(f"#0c00{n:02x}" for n in range(1, 11))
"""Lines of domains, in the hues of their areas."""

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    stand_in: f"{kind}-{n}"
    for kind, colors in (("series", SERIES_COLORS), ("band", BAND_COLORS), ("line", LINE_COLORS))
    for n, stand_in in enumerate(colors, start=1)
}


@cache
def theme_css() -> str:
    """Return the style sheet that defines every color of figures and pages."""
    return (files("raymix.report.figures") / "theme.css").read_text("utf-8")


def css_color(stand_in: str) -> str:
    """Return the CSS value of a stand-in color."""
    return f"var(--{_VARIABLES[stand_in]})"


def themed(svg: str) -> str:
    """Return `svg` with every stand-in color replaced by its CSS variable."""
    # In the text, as matplotlib accepts no CSS variables for colors.
    return re.sub("|".join(_VARIABLES), lambda match: css_color(match[0]), svg)


def require_matplotlib() -> None:
    """Raise RecipeError that names the extra if matplotlib is not installed."""
    # Looked up, not imported: commands check this before hours of work.
    if find_spec("matplotlib") is None:
        raise RecipeError.at(
            "report",
            "matplotlib",
            "drawing needs this package and it is not installed",
            fix="Run `pip install raymix[plots]`",
        )


@contextmanager
def figure(
    height_pt: float, *, ratios: Sequence[float] = (1.0,)
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure and its axes, stacked with a common x axis.

    Args:
        height_pt: Height in points.
        ratios: Relative height of each of the axes, from the top.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72, hspace=0.04)
    with mpl.rc_context(rc_settings()):
        # Not pyplot: it keeps every figure alive and would choose a display backend.
        drawn = Figure(figsize=(WIDTH_PT / 72, height_pt / 72), layout=engine)
        axes = drawn.subplots(
            len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
        )
        yield drawn, [row[0] for row in axes]


@contextmanager
def panel() -> Iterator[tuple[Figure, Axes]]:
    """Yield a small figure, one of many, and its axes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    width, height = PANEL_PT
    with mpl.rc_context(rc_settings()):
        drawn = Figure(figsize=(width / 72, height / 72))
        # Left, bottom, width and height as parts of the figure: room for labels of 9 points. A
        # layout engine would give every panel margins of its own, and rows would not line up.
        yield drawn, drawn.add_axes((0.235, 0.265, 0.735, 0.695))


def few_ticks(most: int) -> Any:
    """Return a locator of at most `most` ticks at round values."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10])


def rc_settings() -> dict[str, Any]:
    """Return the matplotlib settings of all figures."""
    from cycler import cycler

    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        # Text as text: it can be searched and read aloud, and takes the page's font.
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
        "axes.prop_cycle": cycler(color=list(SERIES_COLORS)),
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
