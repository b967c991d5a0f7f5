"""The mixture controller: one per run, which owns the mixture log.

Read `leases` and `windows` (the two rules that make the log final before it is read), `state`
(both joined, without Ray; `decisions` chooses between the mixer and `requests`; `journal` and
`request_files` are its files; `build` makes it from a recipe's mixer), `base` (a controller as the
stream uses it), `local` (in the rank's own process), `actor` (the state with waiting) and `client`
(the ranks' side of the actor).
"""
