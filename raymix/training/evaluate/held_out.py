"""Held-out loss per domain, on the first rows of each domain's valid split.

The rows are cut and packed as in training, so the loss is that of the same task.

Legend: D domains, B rows, L tokens per row, N = B * L.
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
"""By domain: `loss` in nats per token, `bits_per_byte`, and `tokens` scored."""


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """Rows of all domains, domain after domain."""

    tokens: npt.NDArray[np.unsignedinteger]
    """Token ids, shape (B, L)."""
    row_starts: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    """Offsets, shape (B + 1,), into the in-row positions at which documents begin."""
    domain_B: npt.NDArray[np.int64]
    """Domain of each row, shape (B,)."""
    length_B: npt.NDArray[np.int64]
    """Tokens of each row without padding, shape (B,)."""
    loss_mask: npt.NDArray[np.bool_] | None
    """Whether a token is predicted, shape (B, L); None: all but the first of each document."""

    def part(self, rank: int, world_size: int) -> HeldOutRows:
        """Return the rows of one rank."""
        # Bounds by multiplication, so that ranks differ by one row at most.
        rows = len(self.tokens)
        first, last = rows * rank // world_size, rows * (rank + 1) // world_size
        offsets, positions = self.row_starts
        rank_offsets = offsets[first : last + 1]
        # Offsets of a part begin at 0 again.
        starts = rank_offsets - rank_offsets[0], positions[rank_offsets[0] : rank_offsets[-1]]
        part = slice(first, last)
        loss_mask = self.loss_mask if self.loss_mask is None else self.loss_mask[part]
        return HeldOutRows(
            self.tokens[part], starts, self.domain_B[part], self.length_B[part], loss_mask
        )


_Row = tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64], int]
"""Tokens of a row, the positions in it at which documents begin, and its offset in the split."""


def held_out_rows(
    corpus: Corpus,
    *,
    sequence_length: int,
    rows_per_domain: int,
    domains: Sequence[str] | None = None,
) -> HeldOutRows:
    """Return the first rows of the valid split of `domains`, by default of all, in stream order.

    A split shorter than one row gives one padded row; an empty one gives none. As in training,
    rows do not straddle blocks.

    Raises:
        CorpusError: If a shard is corrupt.
    """
    return _stack(
        corpus,
        sequence_length,
        {
            name: _first_rows(corpus, name, sequence_length, rows_per_domain)
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
    """Return validation rows for a search, and the domains where they share a document with tests.

    The rows are the last ones of the valid split of each of `domains`. None is among the first
    `test_rows`, which `held_out_rows` returns. None is from a document that these rows have a part
    of, unless the split has no other document.

    Raises:
        CorpusError: If a domain has no such row, with a message each, or a shard is corrupt.
    """
    problems: list[str] = []
    shared: list[str] = []
    rows: dict[str, list[_Row]] = {}
    for name in domains:
        per_block = corpus.manifest.block_tokens // sequence_length
        # The tests end at a row of a block, as rows do not straddle blocks.
        block, row = divmod(test_rows, per_block) if per_block else (0, 0)
        tests_end = block, row * sequence_length
        first_document = _next_document(corpus, name, *tests_end)
        rows[name] = _last_rows(corpus, name, sequence_length, rows_per_domain, first_document)
        # Rows of the same document are a weaker separation, but better than no search.
        if not rows[name]:
            rows[name] = _last_rows(corpus, name, sequence_length, rows_per_domain, tests_end)
            shared.append(name)
        if not rows[name]:
            tokens = corpus.split(name, "valid").tokens
            problems.append(
                format_problem(
                    "corpus.domains",
                    name,
                    (
                        f"its {tokens:,} held-out tokens leave no rows for the search after the "
                        f"first {test_rows} rows of {sequence_length:,}"
                    ),
                    fix="Lower eval.rows_per_domain, or hold out more text",
                )
            )
    if problems:
        raise CorpusError(*problems)
    return _stack(corpus, sequence_length, rows), tuple(shared)


def _stack(
    corpus: Corpus, sequence_length: int, rows_by_domain: Mapping[str, Sequence[_Row]]
) -> HeldOutRows:
    rows: list[npt.NDArray[np.unsignedinteger]] = []
    starts: list[npt.NDArray[np.int64]] = []
    domains: list[int] = []
    split_offsets: list[int] = []
    for domain, name in enumerate(corpus.domain_names):
        for tokens, row_starts, split_offset in rows_by_domain.get(name, ()):
            rows.append(tokens)
            starts.append(row_starts)
            domains.append(domain)
            split_offsets.append(split_offset)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens_BL = np.zeros((len(rows), sequence_length), dtype=corpus.dtype)
    for index, row in enumerate(rows):
        tokens_BL[index, : len(row)] = row
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in starts])]).astype(np.int64)
    positions = np.concatenate(starts).astype(np.int64) if starts else np.empty(0, np.int64)
    domain_B = np.array(domains, dtype=np.int64)
    loss_mask = row_loss_mask(
        corpus, "valid", domain_B, np.array(split_offsets, np.int64), sequence_length
    )
    return HeldOutRows(tokens_BL, (offsets, positions), domain_B, lengths, loss_mask)


def _first_rows(corpus: Corpus, name: str, length: int, count: int) -> list[_Row]:
    """Return the first `count` rows of a domain's valid split."""
    info = corpus.split(name, "valid")
    rows: list[_Row] = []
    for number in range(info.blocks):
        if len(rows) >= count:
            break
        block = corpus.read_block(name, "valid", number)
        # A tail shorter than a row counts only where the whole split is that short.
        last = len(block.tokens) if info.tokens < length else len(block.tokens) // length * length
        block_offset = number * corpus.manifest.block_tokens
        rows += [
            _row(block, start, min(start + length, last), block_offset)
            for start in range(0, last, length)
        ]
    return rows[:count]


def _last_rows(
    corpus: Corpus, name: str, length: int, count: int, first: tuple[int, int] | None
) -> list[_Row]:
    """Return the last `count` rows of a valid split from `first`, a block and a position in it."""
    rows: list[_Row] = []
    # From the end, so that only the blocks of the returned rows are read.
    for number in range(corpus.split(name, "valid").blocks - 1, -1, -1):
        if first is None or number < first[0] or len(rows) >= count:
            break
        block = corpus.read_block(name, "valid", number)
        last = len(block.tokens) // length * length
        row_starts = [start for start in range(0, last, length) if (number, start) >= first]
        block_offset = number * corpus.manifest.block_tokens
        rows = [_row(block, start, start + length, block_offset) for start in row_starts] + rows
    return rows[-count:]


def _next_document(corpus: Corpus, name: str, number: int, start: int) -> tuple[int, int] | None:
    """Return block and position of the first document that begins at or after a position."""
    for block in range(number, corpus.split(name, "valid").blocks):
        starts = corpus.read_block(name, "valid", block).starts
        later = starts[starts >= (start if block == number else 0)]
        if later.size:
            return block, int(later[0])
    return None


def _row(block: Block, first: int, last: int, block_offset: int) -> _Row:
    """Return tokens [first, last) of a block whose offset in the split is `block_offset`."""
    starts = block.starts[(block.starts >= first) & (block.starts < last)]
    return block.tokens[first:last], starts.astype(np.int64) - first, block_offset + first


class Evaluator:
    """Scores a model on fixed held-out rows."""

    def __init__(
        self,
        corpus: Corpus,
        rows: HeldOutRows,
        *,
        world: World,
        micro_batch_rows: int,
        by_document: bool = False,
    ) -> None:
        """Keep this rank's part of `rows`.

        Args:
            corpus: The corpus, for domain names and bytes per token.
            rows: All rows, the same on every rank.
            world: This rank.
            micro_batch_rows: Rows per forward pass.
            by_document: The model runs the attention of `raymix.context_parallel`, which takes
                rows as a sequence of documents and needs no (L, L) mask.
        """
        self._names: Sequence[str] = corpus.domain_names
        self._bytes_per_token = [_bytes_per_token(corpus, name) for name in self._names]
        self._world = world
        self._rows = rows.part(world.rank, world.size)
        # The same number on all ranks, from the largest part: a forward pass under FSDP2 is a
        # collective.
        max_rows = -(-len(rows.tokens) // world.size)
        self._passes = count_micro_batches(max_rows, micro_batch_rows)
        self._by_document = by_document

    @torch.no_grad()
    def evaluate(self, replica: Replica, precision: AbstractContextManager[object]) -> LossTable:
        """Return loss (nats per token), bits per byte and scored tokens by domain; a collective.

        A domain without held-out rows is left out; bits per byte are None if the corpus does not
        have the number of bytes.
        """
        domains = len(self._names)
        # float64: in float32 the sum over millions of tokens would depend on the split over ranks.
        sums = torch.zeros(2, domains, dtype=torch.float64, device=self._world.device)
        replica.module.eval()
        try:
            with precision:
                for batch in self._batches():
                    self._score(replica, batch, sums)
        finally:
            # Also after an error: dropout would stay off in the rest of the run.
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
        # A rank with fewer passes than others gets a dummy batch without rows of its own.
        if len(length_B):
            offset_L = torch.arange(labels_BL.shape[1], device=labels_BL.device)
            # The label at l is the token at l + 1, so the last token of a row has none.
            padding_BL = offset_L >= length_B[:, None] - 1
            labels_BL = labels_BL.masked_fill(padding_BL, IGNORED)
        loss_BL = self._losses(replica, batch, labels_BL)
        if len(length_B):
            sums[0].index_add_(0, domain_B, loss_BL.double().sum(1))
            sums[1].index_add_(0, domain_B, (labels_BL != IGNORED).sum(1).double())

    def _losses(
        self, replica: Replica, batch: MicroBatchTensors, labels_BL: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of each token, shape (B, L)."""
        tensors = batch.tokens_BL, batch.positions_BL, labels_BL
        if not self._by_document:
            loss_BL: torch.Tensor = replica.module(*tensors)[1]
            return loss_BL
        # Positions restart at each document and at each row. A part of a document counts as a
        # document of its own, since rows do not attend to each other.
        starts = (batch.positions_BL == 0).flatten().nonzero()[:, 0].tolist()
        lengths = np.diff(starts, append=batch.positions_BL.numel()).tolist()
        shards = LocalShards(
            [DocumentPart(length, (0,)) for length in lengths], 0, ContextParallelGroups()
        )
        with attending(shards):
            _, loss_1N = replica.module(*(part.flatten()[None] for part in tensors))
        return loss_1N.view(labels_BL.shape)

    def _scores(self, nats: float, tokens: int, domain: int) -> dict[str, float | int | None]:
        loss = nats / tokens
        bytes_per_token = self._bytes_per_token[domain]
        bits = loss / math.log(2) / bytes_per_token if bytes_per_token else None
        return {"loss": loss, "bits_per_byte": bits, "tokens": tokens}


def _bytes_per_token(corpus: Corpus, name: str) -> float:
    info = corpus.split(name, "valid")
    return info.bytes / info.tokens if info.tokens else 0.0
