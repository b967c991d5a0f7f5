"""Runs of one recipe side by side as Ray Tune trials: variants, planning, results."""
