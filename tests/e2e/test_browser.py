"""Every page that raymix writes, in a real browser: phone and desk, light and dark."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymix.merging.run.engine import merge
from raymix.report import write_report
from raymix.report.figures.merging import draw_merge
from raymix.report.pages.comparison import comparison_page
from raymix.report.pages.schedule import schedule_page
from raymix.report.pages.specialists import specialists_page
from raymix.report.pages.tuning import tuning_page
from raymix.schedule import Layout, compare_planners
from raymix.tuning.merges.specialist_stats import SpecialistLosses, specialist_stats
from tests.integration.report.test_planned import law_file, scheduled
from tests.integration.tuning.test_comparison import result, whole
from tests.integration.tuning.test_specialist_stats import FACTS, SEEDS, merged
from tests.integration.tuning.test_specialist_stats import runs as trained
from tests.support import chromium
from tests.support.chromium import Page
from tests.support.loops import train_corpus
from tests.support.merging import write_family
from tests.support.runs import write_run
from tests.support.scheduling import PLAIN
from tests.support.searches import search_document

pytestmark = pytest.mark.skipif(
    chromium.installed_browser() is None, reason="no Chromium is installed"
)

WIDTHS = (420, 1280)

# Contrast by WCAG 2 of every text with what lies behind it, and what sticks out or is cut.
LOOK = """(() => {
  const channels = text => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return numbers.length < 4 ? [...numbers, 1] : numbers;
  };
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const color = channels(getComputedStyle(at).backgroundColor);
      if (color[3] > 0.5) return color;
    }
    return [255, 255, 255, 1];
  };
  const faint = [], cut = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].filter(n => n.nodeType == 3 && n.data.trim());
    if (!own.length || node.closest('style,title,defs')) continue;
    const style = getComputedStyle(node), svg = node.closest('svg');
    const color = channels(svg ? style.fill : style.color);
    const [a, b] = [light(color), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const text = own.map(n => n.data.trim()).join(' ').slice(0, 60);
    if (ratio < 3.9) faint.push(`${text}: ${ratio.toFixed(2)}`);
    if (svg) {
      const inner = node.getBoundingClientRect(), outer = svg.getBoundingClientRect();
      if (inner.left < outer.left - 2 || inner.right > outer.right + 2 ||
          inner.top < outer.top - 2 || inner.bottom > outer.bottom + 2) cut.push(text);
    }
  }
  // Every column can be brought into view beside the first, which stays.
  const lost = [];
  for (const box of document.querySelectorAll('.scroll')) {
    box.scrollLeft = box.scrollWidth;
    const outer = box.getBoundingClientRect();
    for (const row of box.querySelectorAll('tr')) {
      const first = row.cells[0].getBoundingClientRect();
      const last = row.cells[row.cells.length - 1].getBoundingClientRect();
      if (Math.abs(first.left - outer.left) > 2) lost.push(`not sticky: ${row.innerText}`);
      if (first.width > outer.width / 2) lost.push(`too wide: ${row.innerText}`);
      if (last.right > outer.right + 2 || last.left < first.right - 2)
        lost.push(`out of sight: ${row.innerText}`);
    }
    box.scrollLeft = 0;
  }
  const white = [...document.querySelectorAll('svg rect, svg path')]
    .filter(n => getComputedStyle(n).fill == 'rgb(255, 255, 255)').length;
  const scrolling = [...document.querySelectorAll('.scroll')]
    .filter(n => n.scrollWidth > n.clientWidth + 1).length;
  return {scrolling, faint, cut, lost, white,
          wide: document.documentElement.scrollWidth, inner: innerWidth,
          back: light(channels(getComputedStyle(document.body).backgroundColor))};
})()"""


def a_run(folder: Path) -> Path:
    names = ("books", "code", "maths", "a-domain-with-quite-a-long-name")
    pieces = [(0, [0.4, 0.3, 0.2, 0.1]), (30, [0.1, 0.2, 0.3, 0.4])]
    run = write_run(folder / "run", domains=names, pieces=pieces)
    scheduled(run, [5, 9, 2, 7, 40], [3] * 30, list(range(1, 40)))
    return write_report(run)


def a_comparison_of_runs(folder: Path) -> Path:
    law_file(folder)
    runs = [write_run(folder / name, seed=at) for at, name in enumerate(("one", "two", "three"))]
    scheduled(runs[0], [5, 9, 2, 7, 40])
    return write_report(runs, folder / "both.html")


def a_search(folder: Path) -> Path:
    sizes = {"a": 9000, "b": 6000, "c": 3000}
    document = search_document(train_corpus(folder / "corpus", sizes))
    (folder / "tune.html").write_text(tuning_page(document))
    return folder / "tune.html"


def a_simulation(folder: Path) -> Path:
    lengths = np.array([5, 9, 2, 7, 40, 3, 3, 8, 12, 30] * 8)
    comparison = compare_planners(lengths, Layout(2, 4), PLAIN, batch=20, steps=2, seed=0)
    document = {"source": "lengths.csv", **comparison.document()}
    totals = comparison.totals.items()
    last = {name: total.last_schedule for name, total in totals if total.last_schedule}
    page = schedule_page(document, last, twin="schedule.json")
    (folder / "schedule.html").write_text(page)
    return folder / "schedule.html"


def a_comparison_of_mixers(folder: Path) -> Path:
    mixers = ("uniform", "pike", "balanced-by-something", "doge", "odm", "ado", "rb", "aioli")
    runs = [
        result(mixer, seed, [1 + at / 10 + seed / 7, 3, 2 + at / 5], extra=at / 10)
        for at, mixer in enumerate(mixers)
        for seed in range(3)
    ]
    runs.append(result("failing", 0, [1, 1, 1], state="failed"))
    (folder / "compare.html").write_text(comparison_page(whole(runs, targets="c")))
    return folder / "compare.html"


def specialists(folder: Path) -> Path:
    methods = ("drm-h", "task_arithmetic", "ties", "tsv", "dare_linear", "della")
    merges = {
        (name, seed): merged(5.0 + seed / 10, 4.2 + at / 20 + seed / 10, 0.5)
        for at, name in enumerate(methods)
        for seed in SEEDS
    }
    stats = specialist_stats(
        SpecialistLosses(("a", "b"), SEEDS, methods, trained(), merges), {"x": "went wrong"}
    )
    (folder / "specialists.html").write_text(specialists_page(stats | FACTS))
    return folder / "specialists.html"


def a_merge(folder: Path) -> Path:
    """The picture of a merge, in a page as its model card shows it."""
    merge({"merge_method": "drm", **write_family(folder, tasks=3)}, folder / "out")
    svg = draw_merge(folder / "out").read_text().split("?>", 1)[1]
    head = (
        '<!doctype html><meta name="color-scheme" content="light dark"><title>merge</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
    )
    (folder / "merge.html").write_text(f'{head}<body style="background:var(--paper)">{svg}')
    return folder / "merge.html"


PAGES: dict[str, Callable[[Path], Path]] = {
    "run": a_run,
    "runs": a_comparison_of_runs,
    "search": a_search,
    "simulation": a_simulation,
    "compare": a_comparison_of_mixers,
    "specialists": specialists,
    "merge": a_merge,
}


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_reads_in_a_browser(kind: str, tmp_path: Path) -> None:
    file = PAGES[kind](tmp_path)
    shots = Path(os.environ.get("RAYMIX_SCREENSHOTS", tmp_path))
    seen: dict[str, dict[str, Any]] = {}

    async def look(page: Page) -> list[str]:
        for width in WIDTHS:
            for dark in (False, True):
                name = f"{kind}-{width}-{'dark' if dark else 'light'}"
                await page.show(file, width=width, dark=dark)
                seen[name] = await page.value(LOOK)
                await page.picture(shots / f"{name}.png")
        return page.complaints

    assert chromium.browse(tmp_path / "profile", look) == []
    assert len(seen) == 2 * len(WIDTHS)
    for name, observed in seen.items():
        message = f"{name}: {json.dumps(observed)[:2000]}"
        assert observed["wide"] <= observed["inner"], message
        assert observed["white"] == 0, message
        assert observed["faint"] == [], message
        assert observed["cut"] == [], message
        assert observed["lost"] == [], message
        assert observed["scrolling"] == 0 or observed["inner"] < 600 or kind == "compare", message
        assert (observed["back"] < 0.1) == name.endswith("dark"), message
        assert (shots / f"{name}.png").stat().st_size > 10_000


# Legends. A figure is found by its title, a series by the key that legend and SVG share.


def figure(title: str) -> str:
    return f"[...document.querySelectorAll('figure')].find(f => f.innerText.startsWith('{title}'))"


def toggle(title: str, key: str) -> str:
    return f"{figure(title)}.querySelector('[data-toggle={key}]')"


def displayed(root: str, key: str) -> str:
    groups = f"[...{root}.querySelectorAll('[data-series={key}]')]"
    return f"{groups}.map(g => getComputedStyle(g).display != 'none').join()"


def opacity(root: str, key: str) -> str:
    return f"getComputedStyle({root}.querySelector('[data-series={key}]')).opacity"


DOMAINS = "Training loss per domain"
MIXTURE = "Mixture over time"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_legend_hides_and_highlights_series(width: int, tmp_path: Path) -> None:
    file = a_run(tmp_path)

    async def use(page: Page) -> list[str]:
        await page.show(file, width=width, dark=False)
        entry = toggle(DOMAINS, "domain-0")
        await page.click(entry)
        await page.becomes(displayed(figure(DOMAINS), "domain-0"), "false")
        await page.becomes(f"{entry}.getAttribute('aria-pressed')", "false")
        # The legend of a figure rules no other one.
        await page.becomes(displayed(figure(MIXTURE), "domain-0"), "true")
        await page.becomes(displayed(figure(DOMAINS), "domain-1"), "true")
        await page.click(entry)
        await page.becomes(displayed(figure(DOMAINS), "domain-0"), "true")
        await page.leave()
        await page.becomes(opacity(figure(DOMAINS), "domain-1"), "1")
        await page.hover(entry)
        await page.becomes(opacity(figure(DOMAINS), "domain-1"), "0.15")
        await page.becomes(opacity(figure(DOMAINS), "domain-0"), "1")
        await page.leave()
        await page.becomes(opacity(figure(DOMAINS), "domain-1"), "1")
        # A series highlights itself, and its entry in the legend.
        band = f"{figure(MIXTURE)}.querySelector('[data-series=domain-3] use')"
        await page.hover(band)
        await page.becomes(opacity(figure(MIXTURE), "domain-1"), "0.15")
        await page.becomes(f"{toggle(MIXTURE, 'domain-3')}.classList.contains('lit')", True)
        return page.complaints

    assert chromium.browse(tmp_path / "profile", use) == []


def test_a_legend_is_used_by_keyboard(tmp_path: Path) -> None:
    file = a_run(tmp_path)

    async def use(page: Page) -> list[str]:
        await page.show(file, width=1280, dark=False)
        # The names beside the bands are a legend, too.
        for title, key, text in ((DOMAINS, "Enter", "\r"), (MIXTURE, " ", " ")):
            entry = toggle(title, "domain-2")
            assert await page.value(f"{entry}.getAttribute('role')") == "button"
            assert (await page.value(f"{entry}.getAttribute('aria-label')")).startswith("Show ")
            await page.value(f"{entry}.focus()")
            await page.becomes(opacity(figure(title), "domain-0"), "0.15")
            before = await page.value("scrollY")
            await page.press(key, text)
            await page.becomes(displayed(figure(title), "domain-2"), "false")
            assert await page.value("scrollY") == before
            await page.press(key, text)
            await page.becomes(displayed(figure(title), "domain-2"), "true")
        order = "document.querySelectorAll('[data-toggle]:not([tabindex=\"0\"])').length"
        assert await page.value(order) == 0
        return page.complaints

    assert chromium.browse(tmp_path / "profile", use) == []


def test_the_legend_of_a_page_rules_all_its_figures(tmp_path: Path) -> None:
    file = a_comparison_of_runs(tmp_path)

    async def use(page: Page) -> list[str]:
        await page.show(file, width=1280, dark=True)
        entry = "document.querySelector('.legend [data-toggle=run-1]')"
        shown = await page.value(displayed("document", "run-1"))
        # Loss, rate, throughput, waiting, gradient norm, and a panel per domain.
        assert len(shown.split(",")) >= 5 + 3
        await page.click(entry)
        await page.becomes(displayed("document", "run-1"), shown.replace("true", "false"))
        assert "false" not in await page.value(displayed("document", "run-0"))
        await page.click(entry)
        await page.becomes(displayed("document", "run-1"), shown)
        # Figures without the run are not dimmed with the others.
        await page.hover(entry)
        await page.becomes(opacity("document", "run-0"), "0.15")
        assert await page.value(opacity(figure(MIXTURE), "domain-0")) == "1"
        return page.complaints

    assert chromium.browse(tmp_path / "profile", use) == []


def test_a_page_reads_without_its_script(tmp_path: Path) -> None:
    file = a_run(tmp_path)

    async def use(page: Page) -> list[str]:
        await page.call("Emulation.setScriptExecutionDisabled", value=True)
        await page.show(file, width=420, dark=False)
        tree = await page.call("DOM.getDocument", depth=-1)
        html = await page.call("DOM.getOuterHTML", nodeId=tree["root"]["nodeId"])
        assert 'role="button"' not in html["outerHTML"]
        assert html["outerHTML"].count("<svg") >= 10
        return page.complaints

    assert chromium.browse(tmp_path / "profile", use) == []


def test_a_page_lets_no_other_script_run(tmp_path: Path) -> None:
    file = a_run(tmp_path)
    attack = """(() => {
      const script = document.createElement('script');
      script.textContent = 'window.injected = 1';
      document.body.append(script);
      document.body.insertAdjacentHTML('beforeend', '<img src="x" onerror="window.injected = 2">');
      return fetch('https://example.org').then(() => 'sent', () => 'refused');
    })()"""

    async def use(page: Page) -> list[str]:
        await page.show(file, width=1280, dark=False)
        answer = await page.call("Runtime.evaluate", expression=attack, awaitPromise=True)
        assert answer["result"]["value"] == "refused"
        assert await page.value("typeof window.injected") == "undefined"
        return page.complaints

    complaints = chromium.browse(tmp_path / "profile", use)
    assert any("Content Security Policy" in complaint for complaint in complaints)
    assert not any("asks the network" in complaint for complaint in complaints)
