"""Gradient probes: statistics of the domains' gradients at the end of a window.

A probe is a fixed number of passes. Each pass has two independent halves of each domain, so its
statistics are unbiased, and the passes are divided among the ranks: the result does not depend on
the number of ranks. The rows come from the train split in an order of their own, so a domain with
a share near zero is measured like any other.

Legend: D domains, N groups, B rows of a pass, L tokens per row, K the groups and targets of one
pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from raymix.recipe.training import ProbeConfig
from raymix.sampling import CorpusOrder
from raymix.signals import GradientProbe, GradientStats, Preconditioner, statistics
from raymix.store import Corpus
from raymix.streaming.blocks.geometry import row_geometry
from raymix.training.host.device import seed_everything
from raymix.training.model.parallel import World
from raymix.training.step.batches import micro_batches, row_loss_mask

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_HALVES = 2
# Makes the probes' order independent of the training order: "probe" in ASCII.
_SEED_MASK = 0x70726F6265


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """Rows of a pass; see `raymix.training.step.batches.RowBatch`."""

    tokens: npt.NDArray[np.unsignedinteger]
    """Token ids, shape (B, L)."""
    row_starts: tuple[Ints, Ints]
    """Offsets, shape (B + 1,), into the in-row positions at which documents begin."""
    loss_mask: npt.NDArray[np.bool_] | None
    """Whether a token is predicted, shape (B, L); None: all but the first of each document."""


class ProbeReader:
    """Reads rows of the domains' train splits, in the order of probes.

    Attributes:
        seed: Seed of that order.
    """

    def __init__(self, corpus: Corpus, *, sequence_length: int, seed: int) -> None:
        """Read rows of `sequence_length` tokens."""
        self._corpus = corpus
        self._length = sequence_length
        self.seed = seed ^ _SEED_MASK
        geometries = row_geometry(corpus, sequence_length)
        self._units_D = np.array([geometry.units for geometry in geometries], dtype=np.int64)
        # Window 1: probes read few rows, so a wider shuffle would only read more blocks.
        self._order = CorpusOrder(geometries, seed=self.seed, window=1)

    def row_numbers(self, domain_B: Ints, number: int, half_B: Ints) -> Ints:
        """Return the row numbers of pass `number`, shape (B,)."""
        # The halves of a domain are two rows of one epoch and so never the same row, which would
        # make their gradients dependent and the statistics biased.
        units_B = self._units_D[domain_B]
        epoch_B, pair_B = np.divmod(number, np.maximum(1, units_B // _HALVES))
        return epoch_B * units_B + _HALVES * pair_B + half_B

    def rows(self, domain_B: Ints, number_B: Ints) -> ProbeRows:
        """Return the rows numbered `number_B` of the domains `domain_B`, both of shape (B,)."""
        _, block_B, unit_B = self._order.locate(domain_B, number_B)
        tokens: list[npt.NDArray[np.unsignedinteger]] = []
        starts: list[Ints] = []
        for domain, number, unit in zip(
            domain_B.tolist(), block_B.tolist(), unit_B.tolist(), strict=True
        ):
            block = self._corpus.read_block(self._corpus.domain_names[domain], "train", number)
            first = unit * self._length
            in_row = (block.starts >= first) & (block.starts < first + self._length)
            tokens.append(block.tokens[first : first + self._length])
            starts.append(block.starts[in_row].astype(np.int64) - first)
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in starts])])
        split_offset_B = block_B * self._corpus.manifest.block_tokens + unit_B * self._length
        loss_mask = row_loss_mask(self._corpus, "train", domain_B, split_offset_B, self._length)
        row_starts = offsets.astype(np.int64), np.concatenate(starts)
        return ProbeRows(np.stack(tokens), row_starts, loss_mask)

    def draw_domains(self, group_ND: Floats, group_B: Ints, number_B: Ints) -> Ints:
        """Return a domain for each row, drawn from its group's distribution, shape (B,)."""
        domain_B = np.empty(len(group_B), dtype=np.int64)
        for row, (group, number) in enumerate(zip(group_B, number_B, strict=True)):
            # A generator per row: the draw does not depend on the rank or the pass around it.
            generator = np.random.default_rng((self.seed, int(group), int(number)))
            domain_B[row] = generator.choice(group_ND.shape[1], p=group_ND[group])
        return domain_B


class Prober:
    """Measures the statistics that a mixer needs, on this rank.

    Args of the constructor:
        reader: Reads the rows.
        model: Loss module, as `GradientProbe` takes it, unwrapped.
        world: This rank; the device is the model's.
        config: The recipe's `train.probe`.
        needs: Statistics that the mixer reads.
        n_domains: D.
        targets: Domains with whose gradients those of the others are compared.
        group_ND: Distributions over domains to measure instead of single domains, shape (N, D).
        micro_batch_rows: Rows of a forward pass that fit into memory.
        precision: Factory of the autocast context of a forward pass.
        metric: AdamW's preconditioner, for `precondition: adam`.
    """

    def __init__(
        self,
        reader: ProbeReader,
        model: nn.Module,
        world: World,
        config: ProbeConfig,
        *,
        needs: frozenset[str],
        n_domains: int,
        targets: Sequence[int] = (),
        group_ND: Floats | None = None,
        micro_batch_rows: int,
        precision: Callable[[], contextlib.AbstractContextManager[object]],
        metric: Preconditioner | None = None,
    ) -> None:
        self._reader = reader
        self._world = world
        self._config = config
        self._n_domains = n_domains
        self._targets = list(targets)
        self._group_ND = group_ND
        self._precision = precision
        measured = [domain for domain in range(n_domains) if domain not in targets]
        measured = measured if group_ND is None else list(range(len(group_ND)))
        # A Gram matrix needs the gradients of all domains in one pass; norms and alignments do not,
        # so for these the domains are divided into chunks that fit into memory.
        self._needs_gram = bool({"gram", "group_gram"} & needs)
        width = len(measured)
        if not self._needs_gram:
            width = max(1, min(width, micro_batch_rows // _HALVES - len(targets)))
        self._chunks = [measured[at : at + width] for at in range(0, len(measured), width)]
        self._n_groups = width + len(targets)
        self._probe = GradientProbe(
            model,
            n_groups=self._n_groups,
            halves=_HALVES,
            mode=config.mode,
            precondition=metric,
        )

    def measure(self, window: int) -> dict[str, Any]:
        """Return the gradient fields of `DomainStats`, means over this rank's passes.

        A collective: ranks without a pass of their own repeat the first one and discard it, as a
        forward pass under FSDP2 gathers parameters from all ranks.
        """
        world = self._world
        passes = self._config.rows // _HALVES
        sums: dict[str, Floats] = {}
        passes_done = 0
        for turn in range(-(-passes // world.size)):
            number = turn * world.size + world.rank
            counts = number < passes
            for chunk in self._chunks:
                stats = self._pass(window * passes + (number if counts else 0), chunk)
                if counts:
                    self._add(sums, chunk, stats)
            passes_done += counts
        # The controller averages over ranks with `probe_passes` as weights.
        means = {name: total / passes_done for name, total in sums.items()}
        return {"probe_passes": float(passes_done), **means}

    def _pass(self, number: int, chunk: list[int]) -> GradientStats:
        """Return the statistics of one pass over the groups of `chunk` and the targets."""
        members = [*chunk, *self._targets]
        half_B = np.repeat(np.arange(_HALVES), len(members))
        member_B = np.tile(np.arange(len(members)), _HALVES)
        domain_B = np.array(members, dtype=np.int64)[member_B]
        if self._group_ND is not None:
            # Targets are domains; only the groups of the chunk are distributions.
            drawn = member_B < len(chunk)
            domain_B[drawn] = self._reader.draw_domains(
                self._group_ND, domain_B[drawn], number * _HALVES + half_B[drawn]
            )
        rows = self._reader.rows(domain_B, self._reader.row_numbers(domain_B, number, half_B))
        device = self._world.device
        (batch,) = micro_batches(rows, 1, device, loss_mask_BL=rows.loss_mask)
        piece_B = torch.from_numpy(half_B * self._n_groups + member_B)
        # Rank 0 always: dropout must be the same on whichever rank the pass runs.
        seed_everything(self._reader.seed, number, 0, device)
        with self._precision():
            pieces = self._probe.measure(
                batch.tokens_BL, batch.positions_BL, batch.labels_BL, piece_B
            )
        return statistics(pieces)

    def _add(self, sums: dict[str, Floats], chunk: list[int], stats: GradientStats) -> None:
        """Add the statistics of a pass to `sums`, by the names of `DomainStats`' fields."""
        size, targets = len(chunk), slice(len(chunk), len(chunk) + len(self._targets))
        if self._group_ND is not None:
            groups = len(self._group_ND)
            alignment_N = stats.gram_KK[:size, targets].mean(axis=1)
            _sum(sums, "group_alignment_N", groups)[chunk] += alignment_N
            if self._needs_gram:
                _sum(sums, "group_gram_NN", groups, groups)[:] += stats.gram_KK[:size, :size]
            return
        if self._targets:
            alignment_K = stats.gram_KK[:size, targets].mean(axis=1)
            _sum(sums, "alignment_D", self._n_domains)[chunk] += alignment_K
        # Each chunk measures the targets again; only those of the first chunk count.
        members = [*chunk, *self._targets] if chunk is self._chunks[0] else chunk
        count = len(members)
        _sum(sums, "grad_norm2_D", self._n_domains)[members] += stats.norm2_K[:count]
        _sum(sums, "grad_noise_D", self._n_domains)[members] += stats.noise_K[:count]
        if self._needs_gram:
            gram_DD = _sum(sums, "gram_DD", self._n_domains, self._n_domains)
            gram_DD[np.ix_(members, members)] += stats.gram_KK[:count, :count]


def _sum(sums: dict[str, Floats], name: str, *shape: int) -> Floats:
    return sums.setdefault(name, np.zeros(shape))
