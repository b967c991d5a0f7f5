"""Where the repository and its data lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "pipelines"
QUICKSTART = PIPELINES / "quickstart"
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Larger real corpora and public mixture tables; only on machines that have them."""
