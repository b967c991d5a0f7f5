"""Cost models: seconds and memory of a rank's work.

Read in this order: `model` (the formulas), `presets` (assumed coefficients), `fit` (coefficients
from measurements), `timing` (times of a placement, and a lower bound on all of them).
"""
