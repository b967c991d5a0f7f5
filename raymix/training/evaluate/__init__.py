"""Held-out loss, scoring of checkpoints outside a run, and their export.

Read in this order: `held_out` (rows and `Evaluator`, used by the loop), `checkpoint_ref` (a run or
checkpoint that the user names), `score` (`raymix eval`), `export` (`raymix export`).
"""
