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
from typing import TYPE_CHECKING

from raymix.errors import RaymixError, RecipeError, problem
from raymix.jsontext import parse_json
from raymix.report.data.read import METRICS, read_run
from raymix.report.data.steps import Document
from raymix.report.data.summary import summarise
from raymix.store import atomic_write_text
from raymix.store.trouble import is_remote

if TYPE_CHECKING:
    from raymix.report.figures.progress import Picture

__all__ = ["write_report"]

FORMAT = 1
AnyPath = str | os.PathLike[str]


def write_report(run_dirs: AnyPath | Sequence[AnyPath], out: AnyPath | None = None) -> Path:
    """Return the path of the page drawn from `run_dirs`; its data lie beside it as `.json`.

    Args:
        run_dirs: A run directory or its URL, or several to be drawn side by side. Runs may still
            go on. Or the directory of one search or comparison, with its law and what that is
            worth.
        out: The page, `*.html`, or a directory for it. Left out, `report.html` in the run
            directory, or in the working directory where there are several or it is a URL.

    Raises:
        RecipeError: If a directory is no run or holds no step yet, or matplotlib is absent.
    """
    from raymix.report.figures import style

    paths = [run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else list(run_dirs)
    if not paths:
        raise RecipeError(problem("run", [], "no run directory", "Name at least one"))
    page = _page_path(paths, out)
    style.require_matplotlib()
    if len(paths) == 1 and (found := _search_page(Path(paths[0]), page)):
        return found
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
    from raymix.report.figures import progress as figures
    from raymix.report.figures import signals
    from raymix.report.pages import run as page
    from raymix.report.pages import schedule

    axis = figures.x_axis(runs)
    pictures = [figures.training_loss(runs, axis), figures.throughput(runs, axis)]
    for draw in (figures.weights, signals.picture, figures.exactness, figures.amounts):
        for run in runs:
            pictures += _of_run([draw(run)], run, several=len(runs) > 1)
    for run in runs:
        pictures += _of_run(schedule.planned_pictures(run), run, several=len(runs) > 1)
    drawn = [picture for picture in pictures if picture is not None]
    return page.render(runs, drawn, figures.heldout(runs, axis), twin=twin)


def _of_run(
    drawn: Sequence[Picture | None], run: Document, *, several: bool
) -> list[Picture | None]:
    """Return the pictures, titled by their run where several are drawn."""
    if not several:
        return list(drawn)
    return [found and replace(found, title=f"{found.title}: {run['name']}") for found in drawn]


def _search_page(folder: Path, page: Path) -> Path | None:
    """Return the page of a search or a comparison that lies in `folder`, None if none does.

    Raises:
        RecipeError: If its document is damaged.
    """
    from raymix.report.pages.comparison import comparison_page
    from raymix.report.pages.tuning import tuning_page

    for name, draw in (("tune.json", tuning_page), ("compare.json", comparison_page)):
        file = folder / name
        if not file.is_file() or (folder / METRICS).exists():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            html = draw(parse_json(text))
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, RaymixError):
                raise
            wrong = f"{name} is damaged ({type(error).__name__}: {error})"
            advice = "Run the search again: finished runs are not repeated"
            raise RecipeError(problem("run", str(folder), wrong, advice)) from error
        atomic_write_text(str(page.with_suffix(".json")), text)
        atomic_write_text(str(page), html)
        return page
    return None
