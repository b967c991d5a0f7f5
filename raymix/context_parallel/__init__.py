"""Attention over documents of which some are whole on a rank and some are spread over several.

`attention` is one differentiable operation over any process groups: local documents cost no
communication, and what the shared ones send travels meanwhile. `register` makes it known to
transformers, so that unmodified causal language models run it; `attending` tells them what the
micro-batch at hand holds.

    teams = Teams.of(layout)                                  # once, on every rank
    held = Held(parts, rank, teams)                           # what this rank has
    with attending(held): ...
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
