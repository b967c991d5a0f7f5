"""The order of the data: which domains a step reads, which samples, in which order.

Everything here is a pure function of (seed, mixture log, state {step, carry, count}) in integer
arithmetic: no clock, no worker count, no platform. Read `allocate` (which domains, and a proof of
how close every prefix is to the requested shares), `order` (the n-th sample of a domain),
`mixture_log` (which shares held when), then `packed` and `documents`, which plan steps from them.
"""

from raymix.sampling.allocate import NO_LIMIT, Allocator
from raymix.sampling.documents import DocumentPlanner, DocumentStep, carry_bits
from raymix.sampling.mixture_log import DOMAINS_CHANGE, MixtureEntry, MixtureLog
from raymix.sampling.order import CorpusOrder, DomainGeometry, DomainOrder, domain_key
from raymix.sampling.packed import PackedPlanner, PlanChunk
from raymix.sampling.planner_state import batch_hash, change_domains
from raymix.sampling.shares import (
    SHARE_BITS,
    epochs_implied,
    fixed_point,
    realized_error_bound,
    realized_shares,
)

__all__ = [
    "DOMAINS_CHANGE",
    "NO_LIMIT",
    "SHARE_BITS",
    "Allocator",
    "CorpusOrder",
    "DocumentPlanner",
    "DocumentStep",
    "DomainGeometry",
    "DomainOrder",
    "MixtureEntry",
    "MixtureLog",
    "PackedPlanner",
    "PlanChunk",
    "batch_hash",
    "carry_bits",
    "change_domains",
    "domain_key",
    "epochs_implied",
    "fixed_point",
    "realized_error_bound",
    "realized_shares",
]
