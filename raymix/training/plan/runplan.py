"""The plan of a run as data: the result of `preflight`, printed by `raymix plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from raymix.training.host.machine import Resources
from raymix.training.model.facts import MemoryPart
from raymix.training.plan.domain_sizes import DomainSizes
from raymix.training.plan.forecast import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPlan:
    """The plan of one domain."""

    sizes: DomainSizes
    share: float
    """Mean requested share of tokens over the run."""
    read: int
    """Tokens that the run would read."""
    epochs: float
    """Passes over the domain's usable tokens."""
    max_epochs: float | None
    """Cap on the epochs; None for no cap."""
    capped_at: int | None
    """Step at which the cap is reached and the other domains take over; None if it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The plan of a run."""

    name: str
    run_dir: str
    steps: int
    tokens: int
    tokens_per_step: int
    sequence_length: int
    packed: bool
    """Documents are packed into full rows; else a step has whole documents of about its tokens."""
    row_tokens: int
    """Tokens of a row on one worker: the sequence length over the context-parallel size."""
    context_parallel: int
    """Workers in a context-parallel group, which may share a document."""
    rows_per_step: int
    """Rows of a global batch."""
    workers: int
    rows_per_worker: tuple[int, int]
    """Minimum and maximum rows of a worker in a step."""
    micro_batch_rows: int
    on_gpu: bool
    """Whether each worker has a GPU."""
    estimated: bool
    """Whether tokens are estimated from the sizes of the sources: the corpus is not prepared."""
    corpus_path: str
    domains: tuple[DomainPlan, ...]
    mixer: str
    segments: tuple[Segment, ...]
    """The requested shares, in order of steps."""
    parameters: int
    trainable: int
    """Parameters that are trained: those of the adapters with `model.lora`, else all."""
    flops_per_token: float
    worker_memory: tuple[MemoryPart, ...]
    cache_bytes: int
    """Capacity of the block cache in the object store."""
    checkpoint_bytes: int
    keep_checkpoints: int
    disk_free: int | None
    resources: Resources
    notes: tuple[str, ...] = ()
    """Warnings: settings that work but may not be intended."""

    @property
    def accumulation(self) -> int:
        """Return the forward passes per step of the worker with the most rows."""
        return -(-self.rows_per_worker[1] // self.micro_batch_rows)

    @property
    def micro_batch_tokens(self) -> int:
        """Return the maximum tokens of a worker's forward pass."""
        return self.micro_batch_rows * self.row_tokens

    @property
    def memory_bytes(self) -> int:
        """Return the memory of all workers and the block cache together."""
        # Without Ray the one training process counts as a worker.
        per_worker = sum(part.bytes for part in self.worker_memory)
        return per_worker * max(1, self.workers) + self.cache_bytes

    def document(self) -> dict[str, Any]:
        """Return the plan in JSON types; the keys are stable."""
        # Keys are a promise to scripts, so they keep their names where fields were renamed
        # (`pieces`, `sharing`).
        return {
            "name": self.name,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_step": self.tokens_per_step,
            "estimated": self.estimated,
            "domains": {domain.sizes.name: _row(domain) for domain in self.domains},
            "mixer": self.mixer,
            "pieces": [
                {"step": segment.start, "shares": self._by_name(segment)}
                for segment in self.segments
            ],
            "sequence_length": self.sequence_length,
            "rows_per_step": self.rows_per_step,
            "workers": self.workers,
            "rows_per_worker": list(self.rows_per_worker),
            "micro_batch_rows": self.micro_batch_rows,
            "micro_batch_tokens": self.micro_batch_tokens,
            "sharing": self.context_parallel,
            "accumulation": self.accumulation,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "flops": self.flops_per_token * self.tokens,
            "memory_bytes": self.memory_bytes,
            "worker_memory_bytes": {part.name: part.bytes for part in self.worker_memory},
            "cache_bytes": self.cache_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_free_bytes": self.disk_free,
            "resources": asdict(self.resources),
            "notes": list(self.notes),
        }

    def _by_name(self, segment: Segment) -> dict[str, float]:
        names = [domain.sizes.name for domain in self.domains]
        return dict(zip(names, segment.share_D.tolist(), strict=True))


def _row(domain: DomainPlan) -> dict[str, Any]:
    sizes = domain.sizes
    return {
        "tokens": sizes.tokens,
        "share": domain.share,
        "epochs": domain.epochs,
        "tokens_read": domain.read,
        "max_epochs": domain.max_epochs,
        "capped_at": domain.capped_at,
        "documents": sizes.documents,
        "bytes_per_token": sizes.bytes_per_token,
        "unigram_entropy": sizes.unigram_entropy,
        "dropped_tokens": sizes.dropped,
        "valid_tokens": sizes.valid_tokens,
    }
