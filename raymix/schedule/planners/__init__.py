"""The planners; each module registers its functions by name with `base.planner`.

Read in this order: `baselines` (default, sorted, packed), `hdp`, `skrull`, `integer_program` and
the two that solve one (`flexsp`, `exact`), then `refine`, the default, which uses the first two.
"""
