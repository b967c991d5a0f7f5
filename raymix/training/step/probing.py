"""Gradient statistics of a window: which rows are probed, on which rank, and what comes of it.

A probe is a number of passes, fixed by the recipe. Each pass holds two halves of every domain,
so it gives unbiased statistics by itself, and the passes are dealt out over the ranks: what is
measured does not depend on how many ranks there are. The rows are drawn from the train split by
an order of their own, so a domain with next to no share is measured like any other.

Letters: D domains, N groups, B rows of a pass, L tokens per row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raymix.recipe.training import ProbeConfig
from raymix.sampling import CorpusOrder
from raymix.signals import GradientProbe, GradientStats, Preconditioner, statistics
from raymix.store import Corpus
from raymix.streaming.blocks.geometry import row_geometry
from raymix.training.host.device import seed_everything
from raymix.training.model.parallel import Replica
from raymix.training.step.batches import micro_batches, row_loss_mask

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_HALVES = 2
# Keeps the probes' order apart from that of training, and from the held-out rows.
_ORDER = 0x70726F6265


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """Rows of a pass; see `raymix.training.step.batches.RowBatch`."""

    tokens: npt.NDArray[np.unsignedinteger]
    """Token ids, shape (B, L)."""
    row_starts: tuple[Ints, Ints]
    """Offsets, shape (B + 1,), into the in-row positions at which documents begin."""
    loss_mask: npt.NDArray[np.bool_] | None
    """Which tokens are to be predicted, shape (B, L); None: all that something precedes."""


class ProbeReader:
    """Rows of any domain's train split, in an order that only probes follow.

    Attributes:
        seed: Keys that order.
    """

    def __init__(self, corpus: Corpus, *, sequence_length: int, seed: int) -> None:
        """Read rows of `sequence_length` tokens."""
        self._corpus = corpus
        self._length = sequence_length
        self.seed = seed ^ _ORDER
        geometries = row_geometry(corpus, sequence_length)
        self._units_D = np.array([geometry.units for geometry in geometries], dtype=np.int64)
        self._order = CorpusOrder(geometries, seed=self.seed, window=1)

    def numbers(self, domain_B: Ints, number: int, half_B: Ints) -> Ints:
        """Return the numbers of the rows of pass `number`, shape (B,).

        The halves of a domain are two rows of the same epoch, so never the same row.
        """
        units_B = self._units_D[domain_B]
        epoch_B, pair_B = np.divmod(number, np.maximum(1, units_B // _HALVES))
        return epoch_B * units_B + _HALVES * pair_B + half_B

    def rows(self, domain_B: Ints, number_B: Ints) -> ProbeRows:
        """Return the rows with the numbers `number_B` of the domains `domain_B`, shapes (B,)."""
        _, block_B, unit_B = self._order.locate(domain_B, number_B)
        tokens: list[npt.NDArray[np.unsignedinteger]] = []
        starts: list[Ints] = []
        for domain, block, unit in zip(
            domain_B.tolist(), block_B.tolist(), unit_B.tolist(), strict=True
        ):
            found = self._corpus.read_block(self._corpus.domain_names[domain], "train", block)
            first = unit * self._length
            inside = found.starts[(found.starts >= first) & (found.starts < first + self._length)]
            tokens.append(found.tokens[first : first + self._length])
            starts.append(inside.astype(np.int64) - first)
        offsets = np.concatenate([[0], np.cumsum([len(begun) for begun in starts])])
        place_B = block_B * self._corpus.manifest.block_tokens + unit_B * self._length
        loss_mask = row_loss_mask(self._corpus, "train", domain_B, place_B, self._length)
        row_starts = offsets.astype(np.int64), np.concatenate(starts)
        return ProbeRows(np.stack(tokens), row_starts, loss_mask)

    def draw(self, group_ND: Floats, group_B: Ints, number_B: Ints) -> Ints:
        """Return a domain for each row, drawn from its group's distribution, shape (B,)."""
        domain_B = np.empty(len(group_B), dtype=np.int64)
        for at, (group, number) in enumerate(zip(group_B, number_B, strict=True)):
            generator = np.random.default_rng((self.seed, int(group), int(number)))
            domain_B[at] = generator.choice(group_ND.shape[1], p=group_ND[group])
        return domain_B


class Prober:
    """Measures the statistics that a mixer needs, on this rank.

    Args of the constructor:
        reader: Gives the rows.
        replica: The model.
        config: The recipe's `train.probe`.
        needs: What the mixer reads.
        n_domains: D.
        targets: Domains whose gradients the others are aligned with.
        group_ND: Distributions over domains to measure in place of single domains, if any.
        rows_at_once: Rows per forward pass that fit.
        precision: Makes the context of a forward pass.
        metric: AdamW's metric, for `precondition: adam`.
    """

    def __init__(
        self,
        reader: ProbeReader,
        replica: Replica,
        config: ProbeConfig,
        *,
        needs: frozenset[str],
        n_domains: int,
        targets: Sequence[int] = (),
        group_ND: Floats | None = None,
        rows_at_once: int,
        precision: Callable[[], contextlib.AbstractContextManager[object]],
        metric: Preconditioner | None = None,
    ) -> None:
        self._reader = reader
        self._replica = replica
        self._config = config
        self._n_domains = n_domains
        self._targets = list(targets)
        self._group_ND = group_ND
        self._precision = precision
        others = [domain for domain in range(n_domains) if domain not in targets]
        others = others if group_ND is None else list(range(len(group_ND)))
        # Products of all with all need all of them in one pass.
        self._whole = bool({"gram", "group_gram"} & needs)
        width = len(others)
        if not self._whole:
            width = max(1, min(width, rows_at_once // _HALVES - len(targets)))
        self._chunks = [others[at : at + width] for at in range(0, len(others), width)]
        self._n_groups = width + len(targets)
        self._probe = GradientProbe(
            replica.model,
            n_groups=self._n_groups,
            halves=_HALVES,
            mode=config.mode,
            precondition=metric,
        )

    def measure(self, window: int) -> dict[str, Any]:
        """Return the gradient fields of `DomainStats` as far as this rank measured them.

        All ranks call it, as often: those without a pass of their own do one that counts nothing.
        """
        world = self._replica.world
        passes = self._config.rows // _HALVES
        sums: dict[str, Floats] = {}
        done = 0
        for turn in range(-(-passes // world.size)):
            number = turn * world.size + world.rank
            mine = number < passes
            for chunk in self._chunks:
                found = self._pass(window * passes + (number if mine else 0), chunk)
                if mine:
                    self._add(sums, chunk, found)
            done += mine
        return {"probe_passes": float(done), **{name: part / done for name, part in sums.items()}}

    def _pass(self, number: int, chunk: list[int]) -> GradientStats:
        """Return the statistics of one pass over the groups of `chunk` and the targets."""
        members = [*chunk, *self._targets]
        half_B = np.repeat(np.arange(_HALVES), len(members))
        member_B = np.tile(np.arange(len(members)), _HALVES)
        domain_B = np.array(members, dtype=np.int64)[member_B]
        if self._group_ND is not None:
            drawn = member_B < len(chunk)
            domain_B[drawn] = self._reader.draw(
                self._group_ND, domain_B[drawn], number * _HALVES + half_B[drawn]
            )
        rows = self._reader.rows(domain_B, self._reader.numbers(domain_B, number, half_B))
        device = self._replica.world.device
        (batch,) = micro_batches(rows, 1, device, loss_mask_BL=rows.loss_mask)
        piece_B = torch.from_numpy(half_B * self._n_groups + member_B)
        # Dropout draws the same whoever makes the pass.
        seed_everything(self._reader.seed, number, 0, device)
        with self._precision():
            pieces = self._probe.measure(
                batch.tokens_BL, batch.positions_BL, batch.labels_BL, piece_B
            )
        return statistics(pieces)

    def _add(self, sums: dict[str, Floats], chunk: list[int], found: GradientStats) -> None:
        """Add what a pass found to `sums`, by the names of `DomainStats`' fields."""
        size, targets = len(chunk), slice(len(chunk), len(chunk) + len(self._targets))
        if self._group_ND is not None:
            groups = len(self._group_ND)
            alignment_N = found.gram_KK[:size, targets].mean(axis=1)
            _sum(sums, "group_alignment_N", groups)[chunk] += alignment_N
            if self._whole:
                _sum(sums, "group_gram_NN", groups, groups)[:] += found.gram_KK[:size, :size]
            return
        if self._targets:
            alignment_K = found.gram_KK[:size, targets].mean(axis=1)
            _sum(sums, "alignment_D", self._n_domains)[chunk] += alignment_K
        # Every chunk measures the targets again: the first one's count.
        members = [*chunk, *self._targets] if chunk is self._chunks[0] else chunk
        count = len(members)
        _sum(sums, "grad_norm2_D", self._n_domains)[members] += found.norm2_K[:count]
        _sum(sums, "grad_noise_D", self._n_domains)[members] += found.noise_K[:count]
        if self._whole:
            gram_DD = _sum(sums, "gram_DD", self._n_domains, self._n_domains)
            gram_DD[np.ix_(members, members)] += found.gram_KK[:count, :count]


def _sum(sums: dict[str, Floats], name: str, *shape: int) -> Floats:
    return sums.setdefault(name, np.zeros(shape))
