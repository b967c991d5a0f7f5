"""Optimal shares under a fitted law.

Read `objective` (user-facing objective and optimum), `feasible` (validation and the polytope of
allowed shares), then `minimize`, which dispatches: `separable` solves BiMix in closed form,
`descent` any other law, with `balance` for the dual of a minimax step.
"""
