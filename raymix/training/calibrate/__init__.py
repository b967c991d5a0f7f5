"""Measured costs of a model on the devices at hand, for the planners of `raymix.schedule`."""
