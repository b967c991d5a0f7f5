"""Training: from a recipe to a run directory with checkpoints, metrics and a report.

Read in this order: `api` (the function `raymix.train`), `plan/preflight` (dry run and checks),
`launch/` (this process or Ray), `setup` (builds a rank's components), `loop` (the training loop),
`step/` (the parts of one step). `run/` owns the run directory, `model/` the model on its ranks,
`evaluate/` held-out loss and export, `host/` the machine, `calibrate/` measured costs.
"""
