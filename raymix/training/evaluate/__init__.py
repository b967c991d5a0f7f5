"""Held-out loss, scoring a checkpoint outside a run, and exporting it."""
