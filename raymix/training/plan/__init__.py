"""The plan of a run before it starts: preflight checks, tokens, epochs, memory.

Read in this order: `preflight` (recipe to `RunPlan`), `runplan` (the result as data), `checks` (one
function per reason why a run cannot work), `domain_sizes` (tokens of each domain), `forecast`
(tokens read of each domain), `mixer_context` (the run as mixers see it), `target_counts` (nearest
domains of target documents, for the importance mixer).
"""
