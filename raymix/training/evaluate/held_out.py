"""Held-out loss per domain, on rows from the beginning of each domain's valid split.

The rows are cut and packed as in training, so the loss is that of the same task. Letters: D
domains, B rows, L tokens per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raymix.context_parallel import ContextParallelGroups, DocumentPart, LocalShards, attending
from raymix.errors import CorpusError, format_problem
from raymix.store import Block, Corpus
from raymix.training.model.loss import IGNORED
from raymix.training.model.parallel import PendingSum, Replica, World
from raymix.training.step.batches import (
    MicroBatchTensors,
    count_micro_batches,
    micro_batches,
    row_loss_mask,
)

LossTable = dict[str, dict[str, float | int | None]]


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """Rows of all domains, one domain after the other."""

    tokens: npt.NDArray[np.unsignedinteger]
    """Token ids, shape (B, L)."""
    row_starts: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    """Offsets, shape (B + 1,), into the in-row positions at which documents begin."""
    domain_B: npt.NDArray[np.int64]
    """Domain of each row."""
    length_B: npt.NDArray[np.int64]
    """Tokens of each row; what follows them is padding."""
    loss_mask: npt.NDArray[np.bool_] | None
    """Which tokens are to be predicted, shape (B, L); None: all that something precedes."""

    def part(self, rank: int, world_size: int) -> HeldOutRows:
        """Return the rows of one rank."""
        rows = len(self.tokens)
        first, last = rows * rank // world_size, rows * (rank + 1) // world_size
        offsets, positions = self.row_starts
        own = offsets[first : last + 1]
        starts = own - own[0], positions[own[0] : own[-1]]
        part = slice(first, last)
        loss_mask = self.loss_mask if self.loss_mask is None else self.loss_mask[part]
        own_B = self.domain_B[part], self.length_B[part]
        return HeldOutRows(self.tokens[part], starts, *own_B, loss_mask)


_Row = tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64], int]
"""Tokens of a row, the places in it at which documents begin, and its place in the split."""


def held_out_rows(
    corpus: Corpus,
    *,
    sequence_length: int,
    rows_per_domain: int,
    domains: Sequence[str] | None = None,
) -> HeldOutRows:
    """Return the first rows of the valid split of `domains`, or of all, in stream order.

    A split shorter than one row gives one padded row; an empty one gives none. Rows do not
    straddle blocks, as in training.

    Raises:
        CorpusError: If a shard is corrupt.
    """
    return _stacked(
        corpus,
        sequence_length,
        {
            name: _domain_rows(corpus, name, sequence_length, rows_per_domain)
            for name in (corpus.domain_names if domains is None else domains)
        },
    )


def search_rows(
    corpus: Corpus,
    *,
    sequence_length: int,
    rows_per_domain: int,
    test_rows: int,
    domains: Sequence[str],
) -> tuple[HeldOutRows, tuple[str, ...]]:
    """Return rows to choose by, and the domains whose rows are of a document that is tested on.

    The rows are the last ones of the valid split of each of `domains`: none is among the first
    `test_rows`, which `held_out_rows` gives, nor of a document that those have a part of, unless
    there are no others (one long document is all that is held out).

    Raises:
        CorpusError: If a domain has none, with a message each, or a shard is corrupt.
    """
    problems: list[str] = []
    shared: list[str] = []
    rows: dict[str, list[_Row]] = {}
    for name in domains:
        per_block = corpus.manifest.block_tokens // sequence_length
        end = divmod(test_rows, per_block) if per_block else (0, 0)
        tested = end[0], end[1] * sequence_length
        free = _first_start(corpus, name, *tested)
        rows[name] = _rows_behind(corpus, name, sequence_length, rows_per_domain, free)
        if not rows[name]:
            rows[name] = _rows_behind(corpus, name, sequence_length, rows_per_domain, tested)
            shared.append(name)
        if not rows[name]:
            tokens = corpus.split(name, "valid").tokens
            problems.append(
                format_problem(
                    "corpus.domains",
                    name,
                    (
                        f"its {tokens:,} held-out tokens leave nothing to choose by behind the "
                        f"first "
                        f"{test_rows} rows of {sequence_length:,}"
                    ),
                    fix="Lower eval.rows_per_domain, or hold out more text",
                )
            )
    if problems:
        raise CorpusError(*problems)
    return _stacked(corpus, sequence_length, rows), tuple(shared)


def _stacked(
    corpus: Corpus, sequence_length: int, rows_of: Mapping[str, Sequence[_Row]]
) -> HeldOutRows:
    rows: list[npt.NDArray[np.unsignedinteger]] = []
    starts: list[npt.NDArray[np.int64]] = []
    domains: list[int] = []
    places: list[int] = []
    for domain, name in enumerate(corpus.domain_names):
        for tokens, begun, place in rows_of.get(name, ()):
            rows.append(tokens)
            starts.append(begun)
            domains.append(domain)
            places.append(place)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens_BL = np.zeros((len(rows), sequence_length), dtype=corpus.dtype)
    for index, row in enumerate(rows):
        tokens_BL[index, : len(row)] = row
    offsets = np.concatenate([[0], np.cumsum([len(begun) for begun in starts])]).astype(np.int64)
    positions = np.concatenate(starts).astype(np.int64) if starts else np.empty(0, np.int64)
    domain_B = np.array(domains, dtype=np.int64)
    loss_mask = row_loss_mask(
        corpus, "valid", domain_B, np.array(places, np.int64), sequence_length
    )
    return HeldOutRows(tokens_BL, (offsets, positions), domain_B, lengths, loss_mask)


def _domain_rows(corpus: Corpus, name: str, length: int, wanted: int) -> list[_Row]:
    info = corpus.split(name, "valid")
    rows: list[_Row] = []
    for number in range(info.blocks):
        if len(rows) >= wanted:
            break
        block = corpus.read_block(name, "valid", number)
        # A tail shorter than a row counts only where the whole split is that short.
        last = len(block.tokens) if info.tokens < length else len(block.tokens) // length * length
        begin = number * corpus.manifest.block_tokens
        rows += [_row(block, at, min(at + length, last), begin) for at in range(0, last, length)]
    return rows[:wanted]


def _rows_behind(
    corpus: Corpus, name: str, length: int, wanted: int, first: tuple[int, int] | None
) -> list[_Row]:
    """Return the last `wanted` rows that begin at or after a block and a place in it."""
    rows: list[_Row] = []
    for number in range(corpus.split(name, "valid").blocks - 1, -1, -1):
        if first is None or number < first[0] or len(rows) >= wanted:
            break
        block = corpus.read_block(name, "valid", number)
        last = len(block.tokens) // length * length
        begins = [at for at in range(0, last, length) if (number, at) >= first]
        begin = number * corpus.manifest.block_tokens
        rows = [_row(block, at, at + length, begin) for at in begins] + rows
    return rows[-wanted:]


def _first_start(corpus: Corpus, name: str, number: int, at: int) -> tuple[int, int] | None:
    """Return block and place of the first document that begins at or after a place."""
    for block in range(number, corpus.split(name, "valid").blocks):
        starts = corpus.read_block(name, "valid", block).starts
        found = starts[starts >= (at if block == number else 0)]
        if found.size:
            return block, int(found[0])
    return None


def _row(block: Block, first: int, last: int, begin: int) -> _Row:
    """Return tokens [first, last) of a block that begins at a place of the split."""
    inside = block.starts[(block.starts >= first) & (block.starts < last)]
    return block.tokens[first:last], inside.astype(np.int64) - first, begin + first


class Evaluator:
    """Scores a model on the same held-out rows again and again."""

    def __init__(
        self,
        corpus: Corpus,
        rows: HeldOutRows,
        *,
        world: World,
        rows_at_once: int,
        by_document: bool = False,
    ) -> None:
        """Keep this rank's part of `rows`.

        Args:
            corpus: Where domain names and bytes per token come from.
            rows: All rows, the same on every rank.
            world: This rank among the others.
            rows_at_once: Rows per forward pass.
            by_document: The model runs the attention of `raymix.context_parallel`, to which rows
                are documents one after the other: it needs no mask of every pair of tokens.
        """
        self._names: Sequence[str] = corpus.domain_names
        self._bytes_per_token = [_bytes_per_token(corpus, name) for name in self._names]
        self._world = world
        self._rows = rows.part(world.rank, world.size)
        most = -(-len(rows.tokens) // world.size)
        self._passes = count_micro_batches(most, rows_at_once)
        self._by_document = by_document

    @torch.no_grad()
    def evaluate(self, replica: Replica, precision: AbstractContextManager[object]) -> LossTable:
        """Return loss (nats per token), bits per byte and scored tokens by domain; a collective.

        A domain without held-out rows is left out; bits per byte are None where the corpus does
        not know its bytes.
        """
        domains = len(self._names)
        sums = torch.zeros(2, domains, dtype=torch.float64, device=self._world.device)
        replica.module.eval()
        try:
            with precision:
                for batch in self._batches():
                    self._score(replica, batch, sums)
        finally:
            replica.module.train()
        nats_D, tokens_D = PendingSum(sums, self._world).result().tolist()
        table: LossTable = {}
        for index, name in enumerate(self._names):
            if tokens_D[index]:
                table[name] = self._scores(nats_D[index], int(tokens_D[index]), index)
        return table

    def _batches(self) -> Iterator[MicroBatchTensors]:
        rows, device = self._rows, self._world.device
        return micro_batches(rows, self._passes, device, loss_mask_BL=rows.loss_mask)

    def _score(self, replica: Replica, batch: MicroBatchTensors, sums: torch.Tensor) -> None:
        labels_BL = batch.labels_BL
        length_B = torch.from_numpy(self._rows.length_B[batch.rows]).to(labels_BL.device)
        domain_B = torch.from_numpy(self._rows.domain_B[batch.rows]).to(labels_BL.device)
        if len(length_B):  # not a stand-in
            offset_L = torch.arange(labels_BL.shape[1], device=labels_BL.device)
            padding_BL = offset_L >= length_B[:, None] - 1
            labels_BL = labels_BL.masked_fill(padding_BL, IGNORED)
        loss_BL = self._losses(replica, batch, labels_BL)
        if len(length_B):
            sums[0].index_add_(0, domain_B, loss_BL.double().sum(1))
            sums[1].index_add_(0, domain_B, (labels_BL != IGNORED).sum(1).double())

    def _losses(
        self, replica: Replica, batch: MicroBatchTensors, labels_BL: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of every token, (B, L)."""
        tensors = batch.tokens_BL, batch.positions_BL, labels_BL
        if not self._by_document:
            loss_BL: torch.Tensor = replica.module(*tensors)[1]
            return loss_BL
        begins = (batch.positions_BL == 0).flatten().nonzero()[:, 0].tolist()
        lengths = np.diff(begins, append=batch.positions_BL.numel()).tolist()
        held = LocalShards(
            [DocumentPart(length, (0,)) for length in lengths], 0, ContextParallelGroups()
        )
        with attending(held):
            _, loss_1N = replica.module(*(part.flatten()[None] for part in tensors))
        return loss_1N.view(labels_BL.shape)

    def _scores(self, nats: float, tokens: int, domain: int) -> dict[str, float | int | None]:
        loss = nats / tokens
        per_token = self._bytes_per_token[domain]
        bits = loss / math.log(2) / per_token if per_token else None
        return {"loss": loss, "bits_per_byte": bits, "tokens": tokens}


def _bytes_per_token(corpus: Corpus, name: str) -> float:
    info = corpus.split(name, "valid")
    return info.bytes / info.tokens if info.tokens else 0.0
