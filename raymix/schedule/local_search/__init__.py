"""The search of `refine`: partitions into micro-batches, assignments to slots, improving moves.

Read in this order: `assignment` (costs and LPT for many micro-batches at once), `rules` (the width
of each sequence), `moves` (moves and swaps in a micro-batch), `partitions` (of a group),
`cross_group_moves` (exchanges between micro-batches), `anneal` (simulated annealing).
"""
