"""`raymix compare`: one recipe under several mixers and seeds.

Read `statistics` first (paired differences over seeds, one JSON-able document), then `compare`
(the command: plan, run, read, write). The runs themselves are `raymix.tuning.runs`.
"""
