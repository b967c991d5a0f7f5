"""The best shares under a fitted law: objective and limits, exact and descent solvers."""
