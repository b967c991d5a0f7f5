"""Charts of a merge and of a merge search, each a whole SVG file for a model card."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from raymix._utils.json import parse_json
from raymix.errors import RecipeError
from raymix.report.figures.chart import to_svg
from raymix.report.figures.theme import SERIES_COLORS, figure, require_matplotlib, theme_css
from raymix.store import atomic_write_text

NAME = "merge_report.svg"
"""File name of the chart of a merge."""

# Ratio of the ends of an option's range from which on its axis is logarithmic.
_LOGARITHMIC_FROM = 10.0
_PANELS = {
    "delta norm / tasks' mean": "relative_norm",
    "alignment of tasks": "alignment",
    "sign agreement": "sign_agreement",
    "kept": "kept",
}


def draw_merge(out: str | os.PathLike[str]) -> Path:
    """Draw `merge_report.svg` into a merged model's directory and return its path.

    One dot per tensor, in the order of the file; colors are kinds of tensors. Panels: the merged
    delta's norm against the mean of the tasks' norms, the mean cosine between two tasks, the
    agreement of their signs, and the retained part of their entries, where the method has them.

    Raises:
        RecipeError: If there is no report, or matplotlib is not installed.
    """
    require_matplotlib()
    path = Path(out, "merge_report.json")
    try:
        tensors: dict[str, Any] = parse_json(path.read_text("utf-8"))["tensors"]
        for tensor in tensors.values():
            tensor["relative_norm"] = _relative_norm(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError.at(
            "out", str(path), f"not a merge report: {error}", fix="Name a merged model"
        ) from None
    panels = [
        (label, [(at, name, tensors[name].get(key)) for at, name in enumerate(tensors)])
        for label, key in _PANELS.items()
    ]
    shown = [(label, rows) for label, rows in panels if any(v is not None for _, _, v in rows)]
    svg = _merge_svg(shown or panels[:1], _kinds(tensors))
    target = Path(out, NAME)
    atomic_write_text(str(target), _svg_file(svg))
    return target


def _merge_svg(
    panels: list[tuple[str, list[tuple[int, str, float | None]]]], kinds: Mapping[str, str]
) -> Markup:
    color_of = dict(zip(dict.fromkeys(kinds.values()), SERIES_COLORS, strict=False))
    with figure(40 + 95.0 * len(panels), ratios=[1.0] * len(panels)) as (drawn, axes):
        for axis, (label, rows) in zip(axes, panels, strict=True):
            for kind, color in color_of.items():
                own = [(at, v) for at, name, v in rows if kinds[name] == kind and v is not None]
                axis.plot(
                    [at for at, _ in own], [value for _, value in own],
                    linestyle="none", marker="o", markersize=2.5, color=color, label=kind,
                )  # fmt: skip
            axis.set_title(label, loc="left", fontsize=10)
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.15), ncols=3, frameon=False)
        axes[-1].set_xlabel("tensor, in the order of the file")
        return to_svg(drawn, "merge", title="Statistics of every merged tensor")


def _kinds(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return the kind of each tensor: attention, MLP, embeddings, or other."""
    patterns = (
        ("attention", r"attn|attention"),
        ("mlp", r"mlp|ffn|feed_forward|experts|\bfc\d?\b"),
        ("embeddings", r"embed|lm_head|wte|wpe"),
    )
    return {
        name: next((kind for kind, pattern in patterns if re.search(pattern, name)), "other")
        for name in tensors
    }


def _relative_norm(tensor: Mapping[str, Any]) -> float | None:
    norms = [norm for norm in tensor.get("task_norms", []) if norm is not None]
    mean = sum(norms) / len(norms) if norms else 0.0
    norm = tensor.get("delta_norm")
    return norm / mean if mean and norm is not None else None


def draw_search(document: Mapping[str, Any]) -> str:
    """Return the chart of a merge search as SVG: the loss of every trial, a panel per option.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    names, points = list(document["search"]), document["points"]
    usable = [point for point in points if point["loss"] is not None]
    marks = ((0, "as given", SERIES_COLORS[1]), (None, "chosen", SERIES_COLORS[2]))
    with figure(60 + 170.0 * len(names), ratios=[1.0] * len(names)) as (drawn, axes):
        for axis, name in zip(axes, names, strict=True):
            axis.plot(
                [point["options"][name] for point in usable], [point["loss"] for point in usable],
                linestyle="none", marker="o", markersize=3.5, color=SERIES_COLORS[0],
                label="tried",
            )  # fmt: skip
            for at, label, color in marks:
                options = points[0]["options"] if at == 0 else document["best"]
                loss = document["loss"][label]
                if loss is not None:
                    axis.plot(
                        [options[name]], [loss], linestyle="none", marker="D", markersize=6,
                        color=color, label=label,
                    )  # fmt: skip
            low, high = document["search"][name]
            if low > 0 and high / low > _LOGARITHMIC_FROM:
                axis.set_xscale("log")
            axis.set_xlabel(name)
            axis.set_ylabel("nats per token")
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, frameon=False)
        svg = to_svg(drawn, "search", title="Held-out loss of every merge tried")
    return _svg_file(svg)


def _svg_file(svg: Markup) -> str:
    """Return a whole SVG file that follows the viewer's light or dark theme."""
    # An image of a model card has no page around it whose style sheet could define the colors.
    style = f"<style>{theme_css()}svg {{ background: var(--paper) }}</style>"
    # Markup would escape what is added to it.
    element = str(svg).replace(">", f">{style}", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{element}\n'
