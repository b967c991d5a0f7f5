"""Helpers that know nothing of data mixing: YAML, JSON, private Ray clusters, BLAS threads."""
