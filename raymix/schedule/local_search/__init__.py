"""The search of `refine`: partitions into micro-batches, assignments to slots, exchanges.

Read in this order: `assignment` (costs and LPT for many micro-batches at once), `rules` (the width
of each sequence), `partitions` (of a group), `exchanges` (between groups), `anneal` (simulated
annealing). `make bench-refine` measures what each is worth.
"""
