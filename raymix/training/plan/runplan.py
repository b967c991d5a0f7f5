"""What a run would do, as data: the result of `preflight`, drawn by `raymix plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from raymix.training.host.machine import Resources
from raymix.training.model.memory import MemoryPart
from raymix.training.plan.domain_sizes import DomainSizes
from raymix.training.plan.forecast import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPlan:
    """What a run would read of one domain."""

    supply: DomainSizes
    share: float
    """Mean share of tokens asked over the run."""
    read: int
    """Tokens that would be read."""
    epochs: float
    """Passes over what the domain has to give."""
    max_epochs: float | None
    """The cap on that, if there is one."""
    capped_at: int | None
    """Step at which the cap is reached and the others take over; None if it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run would do."""

    name: str
    run_dir: str
    steps: int
    tokens: int
    tokens_per_step: int
    sequence_length: int
    packed: bool
    """Rows are filled to the brim; else a step has whole documents, about as much as its rows."""
    row_tokens: int
    """Tokens of a row on one worker; of a document that workers share, a part."""
    sharing: int
    """Workers that may share a document."""
    rows_per_step: int
    """Rows of a global batch."""
    workers: int
    rows_per_worker: tuple[int, int]
    """Fewest and most rows of a worker in a step."""
    micro_batch_rows: int
    on_gpu: bool
    """Each worker has a GPU."""
    estimated: bool
    """The corpus is not prepared: tokens are estimated from the sizes of the sources."""
    corpus_path: str
    domains: tuple[DomainPlan, ...]
    mixer: str
    pieces: tuple[Segment, ...]
    """The mixtures asked for, in order of steps."""
    parameters: int
    flops_per_token: float
    worker_memory: tuple[MemoryPart, ...]
    cache_bytes: int
    """Object store that prefetched blocks may fill."""
    checkpoint_bytes: int
    keep_checkpoints: int
    disk_free: int | None
    resources: Resources
    notes: tuple[str, ...] = ()
    """What works, but may not be what was meant."""

    @property
    def accumulation(self) -> int:
        """Return the forward passes per step of the worker with most rows."""
        return -(-self.rows_per_worker[1] // self.micro_batch_rows)

    @property
    def micro_batch_tokens(self) -> int:
        """Return the most tokens that a worker holds at once."""
        return self.micro_batch_rows * self.row_tokens

    @property
    def memory_bytes(self) -> int:
        """Return the memory of all workers and the block cache together."""
        per_worker = sum(part.bytes for part in self.worker_memory)
        return per_worker * max(1, self.workers) + self.cache_bytes

    def document(self) -> dict[str, Any]:
        """Return the plan in JSON types; the keys are stable."""
        return {
            "name": self.name,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_step": self.tokens_per_step,
            "estimated": self.estimated,
            "domains": {domain.supply.name: _row(domain) for domain in self.domains},
            "mixer": self.mixer,
            "pieces": [
                {"step": piece.start, "shares": self._by_name(piece)} for piece in self.pieces
            ],
            "sequence_length": self.sequence_length,
            "rows_per_step": self.rows_per_step,
            "workers": self.workers,
            "rows_per_worker": list(self.rows_per_worker),
            "micro_batch_rows": self.micro_batch_rows,
            "micro_batch_tokens": self.micro_batch_tokens,
            "sharing": self.sharing,
            "accumulation": self.accumulation,
            "parameters": self.parameters,
            "flops": self.flops_per_token * self.tokens,
            "memory_bytes": self.memory_bytes,
            "worker_memory_bytes": {part.name: part.bytes for part in self.worker_memory},
            "cache_bytes": self.cache_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_free_bytes": self.disk_free,
            "resources": asdict(self.resources),
            "notes": list(self.notes),
        }

    def _by_name(self, piece: Segment) -> dict[str, float]:
        names = [domain.supply.name for domain in self.domains]
        return dict(zip(names, piece.share_D.tolist(), strict=True))


def _row(domain: DomainPlan) -> dict[str, Any]:
    supply = domain.supply
    return {
        "tokens": supply.tokens,
        "share": domain.share,
        "epochs": domain.epochs,
        "tokens_read": domain.read,
        "max_epochs": domain.max_epochs,
        "capped_at": domain.capped_at,
        "documents": supply.documents,
        "bytes_per_token": supply.bytes_per_token,
        "unigram_entropy": supply.unigram_entropy,
        "dropped_tokens": supply.dropped,
        "valid_tokens": supply.valid_tokens,
    }
