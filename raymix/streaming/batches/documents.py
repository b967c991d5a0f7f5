"""Document mode: whole documents, each on the rank or the ranks that a schedule gives it.

Which documents make up a step does not depend on the ranks; a schedule, worked out from their
lengths alone, says what each rank holds in each micro-batch. A rank reads all of the documents of
which it holds a part. Letters: D domains, N documents of the step.
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
    document_geometry,
    epoch_limits,
)
from raymix.streaming.blocks.sources import BlockSource

# Planning is the dearer part here; more steps at once would save nothing.
_MOST_STEPS = 8


class DocumentBatchBuilder:
    """Batches of whole documents; see `raymix.streaming.batches.builder.BatchBuilder`."""

    def __init__(
        self,
        corpus: Corpus,
        data: DocumentData,
        place: RankInfo,
        *,
        log: MixtureLog,
        source: BlockSource,
        assignments: Assignments,
    ) -> None:
        """Start at step 0; `load` goes elsewhere."""
        geometries = document_geometry(corpus)
        lengths = [corpus.document_lengths(name, "train") for name in corpus.domain_names]
        numbers = BlockNumbers(corpus)
        order = CorpusOrder(geometries, seed=place.seed, window=data.shuffle_blocks)
        self._log = log
        self._place = place
        self._dtype = corpus.dtype
        self._block_tokens = corpus.manifest.block_tokens
        self._first_block_D = numbers.first_D[:-1]
        self._first_token = [np.cumsum(part, dtype=np.int64) - part for part in lengths]
        self._length = [np.minimum(part, data.sequence_length) for part in lengths]
        self._labels = DocumentLabels(corpus, lengths)
        self._mean_D = np.array([part.mean() for part in self._length])
        self._rate_D = data.tokens_per_step / self._mean_D
        self._planner = DocumentPlanner(
            order=order,
            lengths=lengths,
            sequence_length=data.sequence_length,
            tokens_per_step=data.tokens_per_step,
            log=log,
            limit_D=epoch_limits(geometries, data.max_epochs),
        )
        self._origin = self._planner.state_dict()
        self._until = 0
        self._deal = assignments(
            AssignmentContext(
                rank=place.rank,
                log=log,
                until=lambda: self._until,
                origin=lambda step: self._origin,
            )
        )
        self._table = BlockTable(source, numbers.total)
        self._lookahead = BlockPrefetcher(
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
        rate_D = np.array(self._log.at(planner.step).weights) * self._rate_D
        owed_D = planner.carry_D / float(1 << planner.bits) / self._mean_D
        self._lookahead.look(planner.step, planner.count_D, rate_D, owed_D)
        chunk = DocumentChunk(planner.step)
        self._until = planner.step + max(1, n_steps)
        for _ in range(max(1, min(n_steps, _MOST_STEPS, self._lookahead.reach))):
            shares_D = np.array(self._log.at(planner.step).weights)
            self._origin = planner.state_dict()
            chunk.add(self._origin, self._batch(planner.plan(1)[0], shares_D))
        chunk.after = planner.state_dict()
        return chunk

    def _batch(self, plan: DocumentStep, shares_D: Floats) -> DocumentBatch:
        counts_D = np.bincount(plan.domain_N, minlength=shares_D.size)
        facts = DocumentBatchInfo(plan, shares_D.size, self._labels)
        held = self._held(plan)
        return DocumentBatch(
            plan.step, plan.version, shares_D, counts_D, facts, held, lengths=plan.length_N
        )

    def _held(self, plan: DocumentStep) -> tuple[tuple[LocalDocument, ...], ...]:
        """Return what this rank holds of a step, micro-batch by micro-batch."""
        teams = [
            dict.fromkeys(micro.local, (self._place.rank,))
            | {shard.sequence: shard.team for shard in micro.sharded}
            for micro in self._deal(plan)
        ]
        self._fetch(plan, [document for micro in teams for document in micro])
        return tuple(
            tuple(self._document(plan, document, team) for document, team in micro.items())
            for micro in teams
        )

    def _document(self, plan: DocumentStep, document: int, team: tuple[int, ...]) -> LocalDocument:
        tokens = np.empty(int(plan.length_N[document]), dtype=self._dtype)
        self._copy(plan, document, tokens)
        domain = int(plan.domain_N[document])
        loss_mask = self._labels.mask(domain, int(plan.document_N[document]), len(tokens))
        return LocalDocument(domain, team, tokens, loss_mask)

    def _copy(self, plan: DocumentStep, document: int, out: Tokens) -> int:
        """Copy a document, whichever blocks it lies in, and return its tokens."""
        domain = int(plan.domain_N[document])
        length = int(plan.length_N[document])
        place = int(self._first_token[domain][plan.document_N[document]])
        done = 0
        while done < length:
            block, offset = divmod(place + done, self._block_tokens)
            number = np.array([block + self._first_block_D[domain]])
            slab, first = self._table.find(number)
            part = min(length - done, self._block_tokens - offset)
            begin = int(first[0]) + offset
            out[done : done + part] = self._table.slab(int(slab[0])).tokens[begin : begin + part]
            done += part
        return length

    def _fetch(self, plan: DocumentStep, documents: list[int]) -> None:
        """Get all blocks of these documents at once."""
        if not documents:
            return
        domain_N = plan.domain_N[documents]
        place_N = np.array(
            [
                self._first_token[domain][document]
                for domain, document in zip(
                    domain_N.tolist(), plan.document_N[documents].tolist(), strict=True
                )
            ]
        )
        number_N, _ = self._span(place_N, plan.length_N[documents], self._first_block_D[domain_N])
        self._table.find(np.unique(number_N))

    def _span(self, place_N: Ints, length_N: Ints, base_N: Ints | np.int64) -> tuple[Ints, Ints]:
        """Return the blocks of each document, and for each block which document it is of."""
        first_N = place_N // self._block_tokens
        count_N = (place_N + np.maximum(length_N, 1) - 1) // self._block_tokens - first_N + 1
        numbers = ranges(first_N + base_N, count_N)
        return numbers, np.repeat(np.arange(len(place_N)), count_N)

    def _blocks_of(self, domain: int, group_N: Ints, unit_N: Ints) -> tuple[Ints, Ints]:
        document_N = group_N * GROUP_DOCUMENTS + unit_N
        place_N = self._first_token[domain][document_N]
        length_N = self._length[domain][document_N].astype(np.int64)
        return self._span(place_N, length_N, self._first_block_D[domain])


class DocumentChunk:
    """Consecutive steps; see `raymix.streaming.batches.builder.Chunk`."""

    def __init__(self, first: int) -> None:
        self.after: dict[str, Any] = {}
        self._first = first
        self._steps: list[tuple[dict[str, Any], DocumentBatch]] = []

    @property
    def end(self) -> int:
        """Return the step after the last one."""
        return self._first + len(self._steps)

    def add(self, before: dict[str, Any], batch: DocumentBatch) -> None:
        """Append a step, with the state before it."""
        self._steps.append((before, batch))

    def batch(self, step: int) -> DocumentBatch:
        """Return the batch of one of the steps."""
        return self._steps[step - self._first][1]

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the planner's state before `step`."""
        return self.after if step == self.end else self._steps[step - self._first][0]


class DocumentBatchInfo:
    """What is known of a step's documents, all ranks'."""

    def __init__(self, plan: DocumentStep, n_domains: int, labels: DocumentLabels) -> None:
        self.plan = plan
        self._n_domains = n_domains
        self._labels = labels

    def tokens_by_domain(self, step: int) -> Ints:
        """Return the tokens of each domain in the whole batch."""
        plan = self.plan
        tokens_D = np.bincount(plan.domain_N, weights=plan.length_N, minlength=self._n_domains)
        return tokens_D.astype(np.int64)

    def label_tokens(self, step: int) -> int:
        """Return the labels of the whole batch; see `raymix.streaming.batches.document_labels`."""
        return self._labels.count(self.plan)

    def batch_hash(self, step: int) -> str:
        """Return the name of the whole batch."""
        return batch_hash(self.plan.domain_N, self.plan.index_N)
