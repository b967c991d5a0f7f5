"""The mixture controller: one actor per run that owns the mixture log.

Read `leases` and `windows` (the two rules that make the log final before it is read), `state`
(both joined, without Ray), `journal` (its files), `actor` (the state with waiting) and `client`
(the ranks' side).
"""
