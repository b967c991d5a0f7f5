"""Searches over the options of a merge by held-out loss; specialists and their merges.

Read in this order: `scoring` (one point: merge, score, store), `trials` (points and searches as
Tune trials), `search` (`raymix merge --search`), `specialists` (the command of that name) with
`specialist_stats`.
"""
