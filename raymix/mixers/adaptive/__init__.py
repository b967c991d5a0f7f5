"""Mixers that learn from the run: a `Rule` proposes shares, `guardrails` limits the change."""
