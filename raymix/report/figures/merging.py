"""The figures of a merge: per tensor, what was made of the tasks; of a search, what was tried."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymix.errors import RecipeError, problem
from raymix.jsontext import parse_json
from raymix.report.figures.style import COLOURS, css_variables, figure, require_matplotlib, to_svg
from raymix.store import atomic_write_text

NAME = "merge_report.svg"
"""The picture's file name."""

_THEME = (
    "<style>:root{--ink:#1b1b1b;--muted:#6b6b6b;--grid:#e3e3e3;--paper:#ffffff;%s}"
    "@media (prefers-color-scheme:dark){:root{--ink:#ececec;--muted:#9a9a9a;--grid:#333333;"
    "--paper:#161616;%s}}svg{background:var(--paper)}</style>"
)
# From this ratio of its ends on, an option's axis is logarithmic.
_WIDE = 10.0
_PANELS = {
    "delta norm / tasks' mean": "relative_norm",
    "alignment of tasks": "alignment",
    "sign agreement": "sign_agreement",
    "kept": "kept",
}


def draw_merge(out: str | os.PathLike[str]) -> Path:
    """Draw `merge_report.svg` into a merged model's directory and return its path.

    One dot per tensor, in the order of the file; colours are kinds of tensors. Panels: the merged
    delta's norm against the mean of the tasks' norms, the mean cosine between two tasks, the
    agreement of their signs, and the kept part of their entries, where the method has them.

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
        wrong = f"not a merge report: {error}"
        raise RecipeError(problem("out", str(path), wrong, "Name a merged model")) from None
    panels = [
        (label, [(at, name, tensors[name].get(key)) for at, name in enumerate(tensors)])
        for label, key in _PANELS.items()
    ]
    shown = [(label, rows) for label, rows in panels if any(v is not None for _, _, v in rows)]
    svg = _drawn(shown or panels[:1], _kinds(tensors))
    target = Path(out, NAME)
    atomic_write_text(str(target), _themed(svg))
    return target


def _drawn(
    panels: list[tuple[str, list[tuple[int, str, float | None]]]], kinds: Mapping[str, str]
) -> str:
    with figure(40 + 95.0 * len(panels), ratios=[1.0] * len(panels)) as (drawn, axes):
        for axis, (label, rows) in zip(axes, panels, strict=True):
            for kind in dict.fromkeys(kinds.values()):
                own = [(at, v) for at, name, v in rows if kinds[name] == kind and v is not None]
                colour = COLOURS[list(dict.fromkeys(kinds.values())).index(kind)]
                axis.plot(
                    [at for at, _ in own], [value for _, value in own],
                    linestyle="none", marker="o", markersize=2.5, color=colour, label=kind,
                )  # fmt: skip
            axis.set_title(label, loc="left", fontsize=10)
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.15), ncols=3, frameon=False)
        axes[-1].set_xlabel("tensor, in the order of the file")
        return to_svg(drawn, "merge")


def _kinds(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return the kind of each tensor: attention, MLP, embeddings, or other."""
    patterns = (
        ("attention", r"attn|attention"),
        ("mlp", r"mlp|ffn|feed_forward|experts|\bfc\d?\b"),
        ("embeddings", r"embed|lm_head|wte|wpe"),
    )
    return {
        name: next((kind for kind, found in patterns if re.search(found, name)), "other")
        for name in tensors
    }


def _relative_norm(tensor: Mapping[str, Any]) -> float | None:
    norms = [norm for norm in tensor.get("task_norms", []) if norm is not None]
    mean = sum(norms) / len(norms) if norms else 0.0
    norm = tensor.get("delta_norm")
    return norm / mean if mean and norm is not None else None


def draw_search(document: Mapping[str, Any]) -> str:
    """Return the picture of a search as SVG: the loss of every point, a panel per option.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    names, points = list(document["search"]), document["points"]
    usable = [point for point in points if point["loss"] is not None]
    with figure(60 + 170.0 * len(names), ratios=[1.0] * len(names)) as (drawn, axes):
        for axis, name in zip(axes, names, strict=True):
            axis.plot(
                [point["options"][name] for point in usable], [point["loss"] for point in usable],
                linestyle="none", marker="o", markersize=3.5, color=COLOURS[0], label="tried",
            )  # fmt: skip
            for at, label, colour in ((0, "as given", COLOURS[1]), (None, "chosen", COLOURS[2])):
                options = points[0]["options"] if at == 0 else document["best"]
                loss = document["loss"][label]
                if loss is not None:
                    axis.plot(
                        [options[name]], [loss], linestyle="none", marker="D", markersize=6,
                        color=colour, label=label,
                    )  # fmt: skip
            low, high = document["search"][name]
            if low > 0 and high / low > _WIDE:
                axis.set_xscale("log")
            axis.set_xlabel(name)
            axis.set_ylabel("nats per token")
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, frameon=False)
        svg = to_svg(drawn, "search")
    return _themed(svg)


def _themed(svg: str) -> str:
    """Return a whole SVG file that follows the viewer's light or dark theme."""
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    theme = _THEME % (css_variables(0), css_variables(1))
    return head + svg.replace(">", ">" + theme, 1) + "\n"
