"""Context-parallel attention: documents that one rank holds, and documents sharded over several.

Read in this order: `groups` (process groups), `local_shards` (the row of one rank), `segments` and
`kernels` (causal attention on one device), `exchange` (the communication), `attention` (the
differentiable operation) and `register` (the hook into Hugging Face models).

    groups = ContextParallelGroups.of(layout)             # once, on all ranks
    shards = LocalShards(parts, rank, groups)             # one micro-batch of this rank
    with attending(shards): ...                           # forward and backward pass of the model
"""

from raymix.context_parallel.attention import attention
from raymix.context_parallel.exchange import heads_fit
from raymix.context_parallel.groups import ContextParallelGroups
from raymix.context_parallel.local_shards import DocumentPart, LocalShards, local_positions
from raymix.context_parallel.register import attending, register

__all__ = [
    "ContextParallelGroups",
    "DocumentPart",
    "LocalShards",
    "attending",
    "attention",
    "heads_fit",
    "local_positions",
    "register",
]
