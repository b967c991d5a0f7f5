"""Sequence scheduling: documents of a step assigned to ranks, some steps ahead.

Read `step_plans` (plans from lengths alone, without Ray), then `actor` (the actor that makes them
for all ranks, and the ranks' side of it). `raymix.streaming.batches.assign` has the interface.
"""
