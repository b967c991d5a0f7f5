"""Several runs of one recipe side by side, through Ray Tune.

Read in this order: `runs/` (variants of a recipe, a plan that refuses what cannot work, trials,
results), `compare/` (mixers against each other, paired statistics), `mixtures/` (`raymix.tune`:
proxy runs, a law, its optimum, verified), `merges/` (searches of merges, specialists). Only
`runs/trials` and what is built on it load Ray, so nothing is imported here.
"""
