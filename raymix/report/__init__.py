"""Reports: a run directory's files drawn as one HTML page, with a JSON twin of its data.

`read` takes the files as they are, `summary` and `exactness` make the data, `figures` and `page`
draw it. Nothing here needs the cluster, the model or the corpus' text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raymix.errors import RecipeError, problem
from raymix.report.read import Document, read_run
from raymix.report.summary import summarise
from raymix.store import atomic_write_text
from raymix.store.trouble import is_remote

__all__ = ["write_report"]

FORMAT = 1
AnyPath = str | os.PathLike[str]


def write_report(run_dirs: AnyPath | Sequence[AnyPath], out: AnyPath | None = None) -> Path:
    """Return the path of the page drawn from `run_dirs`; its data lie beside it as `.json`.

    Args:
        run_dirs: A run directory or its URL, or several to be drawn side by side. Runs may still
            go on.
        out: The page, `*.html`, or a directory for it. Left out, `report.html` in the run
            directory, or in the working directory where there are several or it is a URL.

    Raises:
        RecipeError: If a directory is no run or holds no step yet, or matplotlib is absent.
    """
    from raymix.report import style

    paths = [run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else list(run_dirs)
    if not paths:
        raise RecipeError(problem("run", [], "no run directory", "Name at least one"))
    page = _page_path(paths, out)
    style.require_matplotlib()
    runs = [summarise(read_run(os.fspath(path))) for path in paths]
    if len({run["name"] for run in runs}) < len(runs):
        runs = [run | {"name": run["path"]} for run in runs]
    html = _draw(runs, page.with_suffix(".json").name)
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
        advice = "Give a name that ends in .html, or a directory"
        raise RecipeError(problem("out", str(out), "neither a directory nor an HTML file", advice))
    return path


def _draw(runs: Sequence[Document], twin: str) -> str:
    from raymix.report import figures, page, signals

    axis = figures.x_axis(runs)
    pictures = [figures.training_loss(runs, axis), figures.throughput(runs, axis)]
    for draw in (figures.weights, signals.picture, figures.exactness, figures.amounts):
        for run in runs:
            picture = draw(run)
            if picture is not None and len(runs) > 1:
                picture = replace(picture, title=f"{picture.title}: {run['name']}")
            pictures.append(picture)
    drawn = [picture for picture in pictures if picture is not None]
    return page.render(runs, drawn, figures.heldout(runs, axis), twin=twin)
