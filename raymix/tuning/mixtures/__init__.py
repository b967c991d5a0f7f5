"""`raymix.tune`: proxy runs of many mixtures, a law of their losses, its optimum, verified.

Read in this order: `candidates` (limits on shares, designs, recipes of the runs), `search_log`
(the mixtures on disk), `proxy_runs` with `searchers` (fixed designs, sequential proposals), `learn`
(table, law, optimum), `verify` (predicted against measured), `tune` (the command).
"""
