"""Write the report of runs, or of the directory of a search or comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raymix._utils.json import parse_json
from raymix.errors import RaymixError, RecipeError
from raymix.report.data.read import METRICS, read_run
from raymix.report.data.summary import summarize
from raymix.report.data.training_curves import training_curves
from raymix.report.figures.theme import require_matplotlib
from raymix.store import atomic_write_text
from raymix.store.remote.errors import is_remote

FORMAT = 1
"""Version of the JSON twin."""

AnyPath = str | os.PathLike[str]


def write_report(run_dirs: AnyPath | Sequence[AnyPath], out: AnyPath | None = None) -> Path:
    """Return the path of the page drawn from `run_dirs`; its data lie beside it as `.json`.

    Args:
        run_dirs: A run directory or its URL, or several to be drawn side by side. Runs may still
            go on. Or the directory of one search or comparison, with its law and scores.
        out: The page, `*.html`, or a directory for it. Left out, `report.html` in the run
            directory, or in the working directory where there are several or it is a URL.

    Raises:
        RecipeError: If a directory is no run or holds no step yet, or matplotlib is absent.
    """
    paths = [run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else list(run_dirs)
    if not paths:
        raise RecipeError.at("run", [], "no run directory", fix="Name at least one")
    page = _page_path(paths, out)
    require_matplotlib()
    if len(paths) == 1 and _write_search_page(Path(paths[0]), page):
        return page
    # Templates and figures take a quarter of a second to import: after all that can be refused.
    from raymix.report.pages.run import run_page

    records = [read_run(os.fspath(path)) for path in paths]
    runs = [summarize(record) for record in records]
    if len({run["name"] for run in runs}) < len(runs):
        runs = [run | {"name": run["path"]} for run in runs]
    drawn = [
        run | {"curves": training_curves(record, run)}
        for run, record in zip(runs, records, strict=True)
    ]
    html = run_page(drawn, twin=page.with_suffix(".json").name)
    twin = json.dumps({"format": FORMAT, "runs": runs}, ensure_ascii=False, allow_nan=False)
    atomic_write_text(str(page.with_suffix(".json")), twin + "\n")
    atomic_write_text(str(page), html)
    return page


def _page_path(paths: Sequence[AnyPath], out: AnyPath | None) -> Path:
    if out is None:
        alone = len(paths) == 1 and not is_remote(os.fspath(paths[0]))
        return Path(paths[0] if alone else ".") / "report.html"
    path = Path(out)
    if path.is_dir():
        return path / "report.html"
    if path.suffix not in {".html", ".htm"}:
        raise RecipeError.at(
            "out",
            str(out),
            "neither a directory nor an HTML file",
            fix="Give a name that ends in .html, or a directory",
        )
    return path


def _write_search_page(folder: Path, page: Path) -> bool:
    """Write the page of a search or comparison in `folder`; return whether there is one.

    Raises:
        RecipeError: If its document is damaged.
    """
    from raymix.report.pages.comparison import comparison_page
    from raymix.report.pages.tuning import tuning_page

    kinds: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "tune.json": tuning_page,
        "compare.json": comparison_page,
    }
    for name, draw in kinds.items():
        file = folder / name
        # A run may lie in the directory of the search that it belongs to.
        if not file.is_file() or (folder / METRICS).exists():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            html = draw(parse_json(text))
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, RaymixError):
                raise
            raise RecipeError.at(
                "run",
                str(folder),
                f"{name} is damaged ({type(error).__name__}: {error})",
                fix="Run the search again: finished runs are not repeated",
            ) from error
        atomic_write_text(str(page.with_suffix(".json")), text)
        atomic_write_text(str(page), html)
        return True
    return False
