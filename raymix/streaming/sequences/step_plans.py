"""Which rank takes which documents of a step: decided from lengths alone, a few steps ahead.

What a step reads is a function of (seed, corpus, mixture log); who reads it, of that and (layout,
planner, cost). So nothing here needs keeping: whoever asks brings the log as far as it knows it and
the state of the order of documents, some hundred bytes, and plans are made again, the same.

Legend: N documents of a step.
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
from raymix.streaming.blocks.geometry import document_geometry, epoch_limits


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingConfig:
    """How the documents of steps are dealt out: the same on all ranks of a run."""

    seed: int
    """The run's seed."""
    layout: Layout
    """The ranks."""
    cost: CostModel
    """Times and memory of the model on the hardware."""
    planner: str = "refine"
    """One of `raymix.schedule.known_planners()`."""

    def document(self) -> dict[str, Any]:
        """Return what a schedule follows from, beside the lengths of a step, in JSON types."""
        return {
            "planner": self.planner,
            "layout": asdict(self.layout),
            "cost": self.cost.document(),
        }


@dataclass(frozen=True, slots=True)
class RankMicroBatches:
    """What one rank does in one step."""

    step: int
    version: int
    """Version of the log entry the step follows."""
    micro_batches: tuple[MicroBatch, ...]
    """As many on every rank; they name documents by their position in the step."""
    label_tokens: int
    """Labels of the global batch."""
    batch_hash: str
    """Names the global batch."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step's documents and their schedule."""

    documents: DocumentStep
    schedule: Schedule
    label_tokens: int
    batch_hash: str

    def of(self, rank: int) -> RankMicroBatches:
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
    """Plans of steps in order, as far as their weights are known.

    Args of the constructor:
        corpus: The prepared corpus; only its index is read.
        data: The recipe's `data` section.
        how: How documents are dealt out.

    Raises:
        ScheduleError: If the planner is unknown, or the longest document does not fit a group.
    """

    def __init__(self, corpus: Corpus, data: DocumentData, how: SchedulingConfig) -> None:
        geometries = document_geometry(corpus)
        lengths = [corpus.document_lengths(name, "train") for name in corpus.domain_names]
        _check_room(lengths, data, how)
        self._how = how
        self._planner = training_planner(how.planner)
        self._order = CorpusOrder(geometries, seed=how.seed, window=data.shuffle_blocks)
        self._lengths = lengths
        self._labels = DocumentLabels(corpus, lengths)
        self._data = data
        self._limit_D = epoch_limits(geometries, data.max_epochs)
        self._names = corpus.domain_names
        self.log = MixtureLog(self._names)
        self._until = 0
        self._plans: dict[int, PlannedStep] = {}
        self._documents: DocumentPlanner | None = None

    @property
    def ranks(self) -> int:
        """Return the ranks planned for."""
        return self._how.layout.ranks

    def begin(self, state: Mapping[str, Any], entries: Sequence[MixtureEntry], until: int) -> None:
        """Start afresh.

        Args:
            state: The `state_dict` of a `DocumentPlanner` before the first step to be planned.
            entries: The whole mixture log.
            until: The step before which the log is final.
        """
        self.log = MixtureLog(self._names, list(entries))
        self._until = until
        self._plans = {}
        self._documents = DocumentPlanner(
            order=self._order,
            lengths=self._lengths,
            sequence_length=self._data.sequence_length,
            tokens_per_step=self._data.tokens_per_step,
            log=self.log,
            limit_D=self._limit_D,
        )
        self._documents.load_state_dict(state)

    def learn(self, entries: Sequence[MixtureEntry], until: int) -> None:
        """Take what an asker knows of the log; what is known already is left out."""
        version = self.version
        for entry in entries:
            if entry.version > version:
                self.log.append(entry)
        self._until = max(self._until, until)

    @property
    def version(self) -> int:
        """Return the version of the newest log entry known, -1 without one."""
        return self.log.entries[-1].version if self.log.entries else -1

    @property
    def next_step(self) -> int:
        """Return the step that is planned next."""
        return self._documents.step if self._documents is not None else 0

    def can(self, step: int) -> bool:
        """Return whether a step is planned or can be: it is not over and its weights are known."""
        ready = self._documents is not None and self.next_step <= step < self._until
        return step in self._plans or ready

    def planned(self, step: int) -> PlannedStep:
        """Return the plan of a step, with all before it; see `can`.

        Raises:
            CorpusError: If limits leave no documents.
        """
        documents = self._documents
        assert documents is not None
        while step not in self._plans:
            found = documents.plan(1)[0]
            self._plans[found.step] = PlannedStep(
                found,
                self._planner.plan(found.length_N, self._how.layout, self._how.cost),
                self._labels.count(found),
                batch_hash(found.domain_N, found.index_N),
            )
        return self._plans[step]

    def forget(self, step: int) -> None:
        """Drop the plans of steps before `step`."""
        for old in [at for at in self._plans if at < step]:
            del self._plans[old]

    @property
    def held(self) -> tuple[int, ...]:
        """Return the steps whose plans are kept, rising."""
        return tuple(sorted(self._plans))


def _check_room(lengths: Sequence[Any], data: DocumentData, how: SchedulingConfig) -> None:
    room = how.layout.context * how.cost.memory_tokens
    longest = max((int(part.max(initial=0)) for part in lengths), default=0)
    if (needed := min(longest, data.sequence_length)) > room:
        raise ScheduleError.at(
            "data.sequence_length",
            data.sequence_length,
            (
                f"a document of {needed} tokens is longer than the {how.layout.context} x "
                f"{how.cost.memory_tokens} = {room} tokens that a group of ranks can hold"
            ),
            fix="Lower it, or take larger groups of ranks",
        )
