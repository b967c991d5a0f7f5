"""Step plans: the documents of coming steps assigned to ranks, from lengths alone.

The documents of a step are a function of (seed, corpus, mixture log); their assignment is one of
these and (layout, planner, cost). So plans need no storage: with the log and the state of the
document order, some hundred bytes, they are computed again and come out the same.

Letters: D domains, N documents of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raymix.errors import ScheduleError
from raymix.recipe.training import DocumentData
from raymix.sampling import (
    CorpusOrder,
    DocumentPlanner,
    DocumentStep,
    MixtureEntry,
    MixtureLog,
    batch_hash,
)
from raymix.schedule import CostModel, Layout, MicroBatch, Schedule, training_planner
from raymix.store import Corpus
from raymix.streaming.batches.document_labels import DocumentLabels
from raymix.streaming.blocks.geometry import document_geometry, sample_limits


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingConfig:
    """Inputs of a schedule beside the lengths: the same on all ranks of a run."""

    seed: int
    """The run's seed."""
    layout: Layout
    """Ranks and groups of ranks that may share a document."""
    cost: CostModel
    """Time and memory of the model on the hardware."""
    planner: str = "refine"
    """One of `raymix.schedule.known_planners()`."""

    def document(self) -> dict[str, Any]:
        """Return planner, layout and cost in JSON types."""
        return {
            "planner": self.planner,
            "layout": asdict(self.layout),
            "cost": self.cost.document(),
        }


@dataclass(frozen=True, slots=True)
class RankMicroBatches:
    """The micro-batches of one rank in one step."""

    step: int
    version: int
    """Version of the log entry the step follows."""
    micro_batches: tuple[MicroBatch, ...]
    """The same number on all ranks; they name documents by their position in the step."""
    label_tokens: int
    """Number of labels in the global batch."""
    batch_hash: str
    """Hash of the global batch's samples."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step's documents and their schedule."""

    documents: DocumentStep
    schedule: Schedule
    label_tokens: int
    batch_hash: str

    def for_rank(self, rank: int) -> RankMicroBatches:
        """Return a rank's part.

        Raises:
            ScheduleError: If the layout has no such rank.
        """
        step = self.documents
        return RankMicroBatches(
            step=step.step,
            version=step.version,
            micro_batches=self.schedule.micro_batches(rank),
            label_tokens=self.label_tokens,
            batch_hash=self.batch_hash,
        )


class StepPlans:
    """Plans of steps in order, as far as their shares are known.

    Args of the constructor:
        corpus: The prepared corpus; only its index is read.
        data: The recipe's `data` section.
        config: Layout, cost model and planner.

    Raises:
        ScheduleError: If the planner is unknown, or the longest document does not fit a group.
    """

    def __init__(self, corpus: Corpus, data: DocumentData, config: SchedulingConfig) -> None:
        geometries = document_geometry(corpus, allow_empty=True)
        lengths = [corpus.document_lengths(name, "train") for name in corpus.domain_names]
        # At the start, not in the step in which the longest document happens to come up.
        _check_longest_document(lengths, data, config)
        self._config = config
        self._planner = training_planner(config.planner)
        self._order = CorpusOrder(geometries, seed=config.seed, window=data.shuffle_blocks)
        self._lengths = lengths
        self._labels = DocumentLabels(corpus, lengths)
        self._data = data
        self._limit_D = sample_limits(corpus, data, geometries)
        self._names = corpus.domain_names
        self.log = MixtureLog(self._names)
        # The log is final below this step.
        self._until = 0
        self._plans: dict[int, PlannedStep] = {}
        self._documents: DocumentPlanner | None = None

    @property
    def ranks(self) -> int:
        """Return the number of ranks planned for."""
        return self._config.layout.ranks

    def reset(self, state: Mapping[str, Any], entries: Sequence[MixtureEntry], until: int) -> None:
        """Start from a state, without plans.

        Args:
            state: The `state_dict` of a `DocumentPlanner` before the first step to be planned.
            entries: The complete mixture log.
            until: The log is final below this step.
        """
        self.log = MixtureLog(self._names, list(entries))
        self._until = until
        self._plans = {}
        # A new planner and not `load_state_dict` on the old one, which has the old log.
        self._documents = DocumentPlanner(
            order=self._order,
            lengths=self._lengths,
            sequence_length=self._data.sequence_length,
            tokens_per_step=self._data.tokens_per_step,
            log=self.log,
            limit_D=self._limit_D,
        )
        self._documents.load_state_dict(state)

    def extend_log(self, entries: Sequence[MixtureEntry], until: int) -> None:
        """Add a rank's log entries; those that are known already are skipped."""
        version = self.version
        for entry in entries:
            if entry.version > version:
                self.log.append(entry)
        # Ranks report in any order: one that is behind must not take back what is final.
        self._until = max(self._until, until)

    @property
    def version(self) -> int:
        """Return the version of the newest log entry, -1 without one."""
        return self.log.entries[-1].version if self.log.entries else -1

    @property
    def next_step(self) -> int:
        """Return the step that is planned next."""
        return self._documents.step if self._documents is not None else 0

    def can_plan(self, step: int) -> bool:
        """Return whether a step is planned, or is not over and has known shares."""
        ready = self._documents is not None and self.next_step <= step < self._until
        return step in self._plans or ready

    def plan(self, step: int) -> PlannedStep:
        """Return the plan of a step, planning all steps before it; see `can_plan`.

        Raises:
            CorpusError: If limits leave no documents.
        """
        documents = self._documents
        assert documents is not None
        # Error diffusion and the counters carry over from step to step, so none can be skipped.
        while step not in self._plans:
            batch = documents.plan(1)[0]
            self._plans[batch.step] = PlannedStep(
                batch,
                self._planner.plan(batch.length_N, self._config.layout, self._config.cost),
                self._labels.count(batch),
                batch_hash(batch.domain_N, batch.index_N),
            )
        return self._plans[step]

    def drop_before(self, step: int) -> None:
        """Drop the plans of steps before `step`."""
        for old in [planned for planned in self._plans if planned < step]:
            del self._plans[old]

    @property
    def planned_steps(self) -> tuple[int, ...]:
        """Return the steps that have plans, increasing."""
        return tuple(sorted(self._plans))


def _check_longest_document(
    lengths: Sequence[Any], data: DocumentData, config: SchedulingConfig
) -> None:
    layout, rank_tokens = config.layout, config.cost.memory_tokens
    # Capacity of the widest group; documents are cut to the sequence length.
    capacity = layout.context * rank_tokens
    longest = max((int(part.max(initial=0)) for part in lengths), default=0)
    if (needed := min(longest, data.sequence_length)) > capacity:
        raise ScheduleError.at(
            "data.sequence_length",
            data.sequence_length,
            (
                f"a document of {needed} tokens is longer than the {layout.context} x "
                f"{rank_tokens} = {capacity} tokens that a group of ranks can hold"
            ),
            fix="Lower it, or take larger groups of ranks",
        )
