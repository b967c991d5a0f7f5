"""Batches of one rank, from leases and blocks.

Read `stream` (the entry: `MixtureStream`) and `builder` (its interface to the two modes), then
packed mode (`packed`, `packed_rows`) or document mode (`documents`, `document_labels`, `assign`).
Both use `upcoming_samples`, `prefetch` and `table` (samples located, blocks requested, blocks in
memory) and return the classes of `step_batch`; `background` is the stream's thread.
"""
