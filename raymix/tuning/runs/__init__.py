"""Runs of one recipe side by side as Ray Tune trials.

Read in this order: `variants` (mixer name and seed -> recipe of one run), `planning` (resources
per run, preflight, stage of each run directory), `trial_task` (one run inside its trial), `trials`
(the Tune driver) with `progress`, `results` (metrics of a run), `group` (the steps above joined).
"""
