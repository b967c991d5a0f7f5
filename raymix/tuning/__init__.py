"""Groups of runs of one recipe, executed as Ray Tune trials.

Read in this order: `runs/` (variants of a recipe, planning and preflight, trials, results),
`compare/` (mixers compared with paired statistics), `mixtures/` (`raymix.tune`: proxy runs, a
mixing law, its optimum, verification), `merges/` (searches over merge options, specialists). Only
`runs/trials` and the modules built on it load Ray, so nothing is imported here.
"""
