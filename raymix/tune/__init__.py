"""Several runs of one recipe, side by side: `compare.compare` trains it under several mixers.

`variants` makes the recipes, `planning` refuses what cannot work before anything starts, `trials`
runs them through Ray Tune, `results` reads the run directories and `comparison` does the
statistics. Only `trials` and `compare` load Ray, so nothing is imported here.
"""
