"""Kinds of laws.

Read `fitted_law` first: it defines the solver protocol and scores any solver. The parametric laws
are `least_squares` (batched fit), `curves` (formulas) and `parametric` (solver); the law `gp` is
`gaussian_process` (model) and `gp_law` (solver). `regression` has ridge and boosted trees, `auto`
selects among all by cross-validation.
"""
