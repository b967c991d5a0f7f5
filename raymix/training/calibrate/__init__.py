"""Measured costs of a model on this machine's devices, for the planners of `raymix.schedule`.

Read in this order: `calibrate` (attention, linear layers and memory, and the fit of the cost
model), `collective_benchmark` (all-gather and reduce-scatter, in processes of their own).
"""
