"""Sections of a recipe that a module of their own describes, beside those of every run."""
