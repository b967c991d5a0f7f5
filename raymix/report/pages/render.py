"""Pages from templates: one self-contained HTML file each.

Jinja2 escapes everything but the charts' SVG, and refuses names that a page does not define. A
content security policy lets the page run its own script, by its hash, and load nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from raymix.report.figures.theme import theme_css

_PACKAGE = "raymix.report.pages"


def render(template: str, **context: Any) -> str:
    """Return the page of `template` as HTML.

    Args:
        template: Name without `.html.jinja`.
        context: The names that it uses.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(f"{template}.html.jinja")
        .render(
            # The package's own files, not a run's: safe to insert as they are.
            style=Markup(theme_css() + _asset("style.css")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            version=version("raymix"),
            **context,
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(_PACKAGE, "templates"),
        autoescape=True,
        # A misspelled name would otherwise render as nothing, unnoticed.
        undefined=StrictUndefined,
        # Lines that hold a statement alone leave no blank line behind.
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@cache
def _asset(name: str) -> str:
    return (files(_PACKAGE) / name).read_text("utf-8")
