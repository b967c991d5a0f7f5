"""Streaming: the mixture decided and the tokens delivered while a model trains.

Read in this order: `controller` (the actor that owns the mixture log: shares, leases, windows of
statistics), `blocks` (the block plane, an actor that caches blocks in Ray's object store, and the
sources that a rank reads blocks from), `batches` (`MixtureStream`, a rank's loop from leases to
batches) and `sequences` (the actor that assigns documents to ranks, some steps ahead).

The invariant of the package: the content of step t is a function of (seed, corpus, mixture log).
Caches, restarts and the number of ranks change when a batch is ready, never what is in it.
"""
