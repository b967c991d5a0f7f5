"""Reports: runs, searches and comparisons as one HTML page each, from their files alone.

Read `data/` first (`read` and `steps` parse a run, `summary` is the JSON twin, `losses` says which
loss is which, `live` follows a run for `watch`), then `figures/` (`theme`, `chart`, then one module
per kind of page), then `pages/` (`run`, `render`, the templates, the style sheet and the script).
`write` joins the three; nothing here needs the cluster, the model or the corpus' text.
"""

from raymix.report.write import write_report

__all__ = ["write_report"]
