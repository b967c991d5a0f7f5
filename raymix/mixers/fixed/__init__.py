"""Mixers whose shares are known before the run: fixed, scheduled and replayed."""
