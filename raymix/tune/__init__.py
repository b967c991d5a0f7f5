"""Several runs of one recipe: `compare` trains it under several mixers and says what came of it.

`variants` makes the recipes, `plan` refuses what cannot work before anything starts, `trials` runs
them through Ray Tune, `results` reads the run directories and `comparison` does the statistics.
"""

from raymix.tune.compare import compare

__all__ = ["compare"]
