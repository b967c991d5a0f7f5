"""Document mode: batches of whole documents, assigned to ranks by a schedule.

The documents of a step do not depend on the ranks; a schedule, computed from their lengths alone,
assigns them to ranks and micro-batches. A rank reads the whole of each document that it processes
or shares. Letters: D domains, N documents of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raymix.recipe.training import DocumentData
from raymix.sampling import (
    CorpusOrder,
    DocumentPlanner,
    DocumentStep,
    MixtureLog,
    batch_hash,
)
from raymix.store import Corpus
from raymix.streaming.batches.assign import AssignmentContext, Assignments
from raymix.streaming.batches.builder import RankInfo
from raymix.streaming.batches.document_labels import DocumentLabels
from raymix.streaming.batches.packed_rows import ranges
from raymix.streaming.batches.prefetch import BlockPrefetcher, Floats
from raymix.streaming.batches.step_batch import DocumentBatch, LocalDocument
from raymix.streaming.batches.table import BlockTable
from raymix.streaming.batches.upcoming_samples import UpcomingSamples
from raymix.streaming.blocks.block_batch import Tokens
from raymix.streaming.blocks.geometry import (
    GROUP_DOCUMENTS,
    BlockNumbers,
    Ints,
    ReadableShares,
    document_geometry,
    sample_limits,
)
from raymix.streaming.blocks.sources import BlockSource

# Schedules are planned step by step and dominate the time, so longer chunks would save nothing.
_MAX_CHUNK_STEPS = 8


class DocumentBatchBuilder:
    """Batches of whole documents; see `raymix.streaming.batches.builder.BatchBuilder`."""

    def __init__(
        self,
        corpus: Corpus,
        data: DocumentData,
        rank_info: RankInfo,
        *,
        log: MixtureLog,
        source: BlockSource,
        assignments: Assignments,
    ) -> None:
        """Start at step 0; `load` continues elsewhere."""
        geometries = document_geometry(corpus, allow_empty=True)
        self._readable = ReadableShares(corpus, data)
        lengths = [corpus.document_lengths(name, "train") for name in corpus.domain_names]
        numbers = BlockNumbers(corpus)
        order = CorpusOrder(geometries, seed=rank_info.seed, window=data.shuffle_blocks)
        self._log = log
        self._rank = rank_info.rank
        self._dtype = corpus.dtype
        self._block_tokens = corpus.manifest.block_tokens
        self._first_block_D = numbers.first_D[:-1]
        # By domain. Offsets count the stored lengths, reads end at the sequence length.
        self._first_token = [np.cumsum(part, dtype=np.int64) - part for part in lengths]
        self._length = [np.minimum(part, data.sequence_length) for part in lengths]
        self._labels = DocumentLabels(corpus, lengths)
        self._mean_length_D = np.array([part.mean() if part.size else 1.0 for part in self._length])
        # Documents of each domain per step at a share of 1.
        self._documents_D = data.tokens_per_step / self._mean_length_D
        self._planner = DocumentPlanner(
            order=order,
            lengths=lengths,
            sequence_length=data.sequence_length,
            tokens_per_step=data.tokens_per_step,
            log=log,
            limit_D=sample_limits(corpus, data, geometries),
        )
        # State before the step being built: from it the scheduler can plan that step.
        self._step_state = self._planner.state_dict()
        self._until = 0
        self._assign = assignments(
            AssignmentContext(
                rank=rank_info.rank,
                log=log,
                until=lambda: self._until,
                planner_state=lambda step: self._step_state,
            )
        )
        self._table = BlockTable(source, numbers.total)
        self._prefetcher = BlockPrefetcher(
            source,
            self._table,
            UpcomingSamples(order),
            total_blocks=numbers.total,
            block_bytes=self._block_tokens * corpus.dtype.itemsize,
            blocks_of=self._blocks_of,
        )

    def load(self, state: Mapping[str, Any]) -> int:
        """Continue from a state and return its step."""
        self._planner.load_state_dict(state)
        return self._planner.step

    def state_dict(self) -> dict[str, Any]:
        """Return the planner's state before the next step to be planned."""
        return self._planner.state_dict()

    def plan(self, n_steps: int) -> DocumentChunk:
        """Return the next steps, at least one and at most `n_steps`.

        Raises:
            CorpusError: If a block is corrupt, or limits leave no documents.
        """
        planner = self._planner
        rate_D = np.array(self._log.at(planner.step).weights) * self._documents_D
        # The carry is in fixed point, units of 2**-bits tokens; the prefetcher counts documents.
        owed_D = planner.carry_D / float(1 << planner.bits) / self._mean_length_D
        self._prefetcher.update(planner.step, planner.count_D, rate_D, owed_D)
        chunk = DocumentChunk(planner.step)
        self._until = planner.step + max(1, n_steps)
        for _ in range(max(1, min(n_steps, _MAX_CHUNK_STEPS, self._prefetcher.reach))):
            weights = self._log.at(planner.step).weights
            self._readable.check(weights)
            shares_D = np.array(weights)
            self._step_state = planner.state_dict()
            chunk.add(self._step_state, self._batch(planner.plan(1)[0], shares_D))
        chunk.end_state = planner.state_dict()
        return chunk

    def skip(self, n_steps: int) -> int:
        """Advance by at most `n_steps` steps without reading; return by how many.

        Raises:
            CorpusError: If limits leave no documents.
        """
        return len(self._planner.plan(min(n_steps, _MAX_CHUNK_STEPS)))

    def _batch(self, plan: DocumentStep, shares_D: Floats) -> DocumentBatch:
        counts_D = np.bincount(plan.domain_N, minlength=shares_D.size)
        info = DocumentBatchInfo(plan, shares_D.size, self._labels)
        micro_batches = self._micro_batches(plan)
        return DocumentBatch(
            plan.step, plan.version, shares_D, counts_D, info, micro_batches, lengths=plan.length_N
        )

    def _micro_batches(self, plan: DocumentStep) -> tuple[tuple[LocalDocument, ...], ...]:
        """Return this rank's documents of a step, micro-batch by micro-batch."""
        ranks_of = [
            dict.fromkeys(micro.local, (self._rank,))
            | {shard.sequence: shard.ranks for shard in micro.sharded}
            for micro in self._assign(plan)
        ]
        self._fetch(plan, [document for micro in ranks_of for document in micro])
        return tuple(
            tuple(self._document(plan, document, ranks) for document, ranks in micro.items())
            for micro in ranks_of
        )

    def _document(self, plan: DocumentStep, document: int, ranks: tuple[int, ...]) -> LocalDocument:
        # The whole document, of which the rank may process a shard only: labels are shifted before
        # it is cut, and the shards of a rank are two spans.
        tokens = np.empty(int(plan.length_N[document]), dtype=self._dtype)
        self._copy(plan, document, tokens)
        domain = int(plan.domain_N[document])
        loss_mask = self._labels.mask(domain, int(plan.document_N[document]), len(tokens))
        return LocalDocument(domain, ranks, tokens, loss_mask)

    def _copy(self, plan: DocumentStep, document: int, out: Tokens) -> int:
        """Copy a document from all the blocks it lies in; return the number of tokens."""
        domain = int(plan.domain_N[document])
        length = int(plan.length_N[document])
        first_token = int(self._first_token[domain][plan.document_N[document]])
        copied = 0
        # Documents straddle blocks, which may be in different batches.
        while copied < length:
            block, offset = divmod(first_token + copied, self._block_tokens)
            number = np.array([block + self._first_block_D[domain]])
            key, block_first = self._table.find(number)
            size = min(length - copied, self._block_tokens - offset)
            first = int(block_first[0]) + offset
            tokens = self._table.batch(int(key[0])).tokens
            out[copied : copied + size] = tokens[first : first + size]
            copied += size
        return length

    def _fetch(self, plan: DocumentStep, documents: list[int]) -> None:
        """Fetch all blocks of these documents at once, so that one wait covers them all."""
        if not documents:
            return
        domain_N = plan.domain_N[documents]
        first_token_N = np.array(
            [
                self._first_token[domain][document]
                for domain, document in zip(
                    domain_N.tolist(), plan.document_N[documents].tolist(), strict=True
                )
            ]
        )
        first_block_N = self._first_block_D[domain_N]
        number_N, _ = self._blocks(first_token_N, plan.length_N[documents], first_block_N)
        self._table.find(np.unique(number_N))

    def _blocks(
        self, first_token_N: Ints, length_N: Ints, first_block: Ints | np.int64
    ) -> tuple[Ints, Ints]:
        """Return the blocks of each document, and for each block the index of its document."""
        first_N = first_token_N // self._block_tokens
        last_N = (first_token_N + np.maximum(length_N, 1) - 1) // self._block_tokens
        count_N = last_N - first_N + 1
        numbers = ranges(first_N + first_block, count_N)
        return numbers, np.repeat(np.arange(len(first_token_N)), count_N)

    def _blocks_of(self, domain: int, group_N: Ints, unit_N: Ints) -> tuple[Ints, Ints]:
        # In document mode a group is a run of documents and not a block.
        document_N = group_N * GROUP_DOCUMENTS + unit_N
        first_token_N = self._first_token[domain][document_N]
        length_N = self._length[domain][document_N].astype(np.int64)
        return self._blocks(first_token_N, length_N, self._first_block_D[domain])


class DocumentChunk:
    """Consecutive steps; see `raymix.streaming.batches.builder.Chunk`.

    Attributes:
        first: The first step.
        end_state: The planner's state after the last step.
    """

    def __init__(self, first: int) -> None:
        self.end_state: dict[str, Any] = {}
        self.first = first
        self._steps: list[tuple[dict[str, Any], DocumentBatch]] = []

    @property
    def end(self) -> int:
        """Return the step after the last one."""
        return self.first + len(self._steps)

    def add(self, state: dict[str, Any], batch: DocumentBatch) -> None:
        """Append a step, with the planner's state before it."""
        self._steps.append((state, batch))

    def batch(self, step: int) -> DocumentBatch:
        """Return the batch of one of the steps."""
        return self._steps[step - self.first][1]

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the planner's state before `step`."""
        return self.end_state if step == self.end else self._steps[step - self.first][0]


class DocumentBatchInfo:
    """Figures of the global batch, computed on request; see `BatchInfo`."""

    def __init__(self, plan: DocumentStep, n_domains: int, labels: DocumentLabels) -> None:
        self.plan = plan
        self._n_domains = n_domains
        self._labels = labels

    def tokens_by_domain(self, step: int) -> Ints:
        """Return the tokens of each domain in the global batch, shape (D,)."""
        plan = self.plan
        tokens_D = np.bincount(plan.domain_N, weights=plan.length_N, minlength=self._n_domains)
        return tokens_D.astype(np.int64)

    def label_tokens(self, step: int) -> int:
        """Return the number of labels in the global batch; see `DocumentLabels`."""
        return self._labels.count(self.plan)

    def batch_hash(self, step: int) -> str:
        """Return the hash of the global batch's samples."""
        return batch_hash(self.plan.domain_N, self.plan.index_N)
