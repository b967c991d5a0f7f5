"""Sphinx's configuration: `make docs` builds the pages, warnings being errors."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from recipe_reference import write_reference  # noqa: E402 - likewise

import raymix  # noqa: E402 - found by the path above

project = "raymix"
release = version = raymix.__version__
copyright = "the raymix authors"
extensions = ["myst_parser", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {"description": raymix.__doc__.splitlines()[0], "page_width": "1000px"}
html_sidebars = {"**": ["about.html", "navigation.html", "searchfield.html"]}
exclude_patterns = ["_build"]
nitpicky = True

write_reference(DOCS / "recipes.md")
