"""Domains added to a run, removed from it or split, from the step of a checkpoint on.

The batches before that step stay as they were. From it on, batches are those of the recipe's mixer,
a pure function of seed, corpus, mixture log and the checkpoint's counts, as in any run. Nothing in
the checkpoint changes: its state is translated whenever the run goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raymix.errors import CorpusError, RecipeError
from raymix.mixers import Mixer, MixerContext, PlannedMixer, build_mixer, inherited_shares
from raymix.mixers.by_name import some
from raymix.recipe import DocumentData, InheritMixer, Recipe, StaticMixer
from raymix.sampling import DOMAINS_CHANGE, MixtureEntry, MixtureLog, carry_bits, change_domains
from raymix.store import Corpus
from raymix.streaming.controller.windows import NOTE, Windows, loss_weight_stats
from raymix.training.plan.mixer_context import mixer_context
from raymix.training.run.checkpoint import TrainingState
from raymix.training.run.fallback import resume_checkpoint
from raymix.training.run.rundir import RunDirectory

FREE_FIELDS = frozenset({"mixer", "data.max_epochs"})
"""Recipe fields that may change together with the domains, with all below them."""


@dataclass(frozen=True, slots=True)
class DomainChange:
    """Domains of a run before a step and from it on."""

    step: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def added(self) -> tuple[str, ...]:
        """Return the domains that come."""
        return tuple(name for name in self.after if name not in self.before)

    @property
    def removed(self) -> tuple[str, ...]:
        """Return the domains that go."""
        return tuple(name for name in self.before if name not in self.after)

    def __str__(self) -> str:
        """Return what changes, in words."""
        added = f"added {some(self.added)}" if self.added else ""
        removed = f"removed {some(self.removed)}" if self.removed else ""
        words = " and ".join(filter(None, (added, removed))) or "in another order"
        return f"domains from step {self.step:,} on: {words}"


def domain_change(state: TrainingState, corpus: Corpus) -> DomainChange | None:
    """Return the change from the domains of a checkpoint to those of a corpus; None: the same."""
    before = tuple(state.tokens)
    if before == corpus.domain_names:
        return None
    return DomainChange(state.step, before, corpus.domain_names)


def check_change(
    change: DomainChange,
    state: TrainingState,
    corpus: Corpus,
    *,
    asked: int | None,
    recipe: Recipe,
    where: str,
) -> None:
    """Check that a run may go on from a checkpoint with other domains.

    Args:
        change: The change.
        state: The state in the checkpoint.
        corpus: The corpus with the other domains.
        asked: The step from which on the user wants them; None if they did not say so.
        recipe: The recipe.
        where: Path or URL of the run.

    Raises:
        CorpusError: If they did not say so, or the content of a domain that stays is another.
        RecipeError: If they named another step.
    """
    if asked is None:
        raise CorpusError.at(
            "corpus.domains",
            list(change.after),
            f"the run in {where} reads {list(change.before)}, and has to its step {change.step:,}",
            fix=f"Add --domains-from {change.step} to the command to read these from there on, or "
            "--if-exists new to begin anew",
        )
    if asked != change.step:
        raise RecipeError.at(
            "domains-from",
            asked,
            "not the step of the run's newest checkpoint, from which it goes on",
            allowed=f"Allowed: {change.step}",
        )
    if recipe.data.accept_changed_corpus:
        return
    if state.tokenizer != corpus.manifest.tokenizer.fingerprint:
        raise CorpusError.at(
            "corpus.tokenizer",
            corpus.manifest.tokenizer.fingerprint,
            "not known to be the tokenizer of the run: the checkpoint does not name one"
            if not state.tokenizer
            else "another tokenizer than that of the run: its ids mean other texts",
            fix="Prepare the corpus with the tokenizer of the run (corpus.tokenizer: {path: "
            "CHECKPOINT}), or set data.accept_changed_corpus if the ids are the same",
        )
    fingerprints = corpus.domain_fingerprints()
    other = [
        name
        for name in change.after
        if name in change.before and state.domain_fingerprints.get(name) != fingerprints[name]
    ]
    if other:
        raise CorpusError.at(
            "corpus.domains",
            some(other),
            f"their content is not what the run has read to its step {change.step:,}",
            fix="Restore it, or set data.accept_changed_corpus: samples may come again or be left "
            "out",
        )


def with_inherited_shares(recipe: Recipe, corpus: Corpus, before: Mapping[str, float]) -> Recipe:
    """Return the recipe with the shares that its `inherit` mixer takes from `before`.

    Raises:
        RecipeError: If they do not fit the domains.
    """
    if not isinstance(recipe.mixer, InheritMixer):
        return recipe
    tokens = {name: corpus.split(name, "train").tokens for name in corpus.domain_names}
    targets = recipe.mixer.targets
    # A target has no share under any mixer.
    mixed = {name: size for name, size in tokens.items() if name not in targets}
    shares = inherited_shares(recipe.mixer, before, mixed)
    mixer = StaticMixer(kind="static", weights=shares, targets=targets)
    return recipe.model_copy(update={"mixer": mixer})


def shares_before(state: TrainingState, step: int) -> dict[str, float]:
    """Return the shares of the step before `step`, by the log in a checkpoint.

    Raises:
        RecipeError: If its domains changed at another step.
    """
    log: MixtureLog | None = _log(state)
    # A checkpoint of a later step has the change behind it.
    if log is not None and log.entries[0].first_step == step:
        log = log.earlier
    elif state.step != step:
        log = None
    if log is None:
        raise RecipeError.at("domains-from", step, "the domains of the run did not change there")
    entry = log.at(step - 1)
    return dict(zip(log.domains, entry.weights, strict=True))


def changed_state(
    state: TrainingState, change: DomainChange, corpus: Corpus, recipe: Recipe, steps: int
) -> TrainingState:
    """Return the state of a checkpoint for other domains.

    Counts and carries of domains that stay go on; the mixer begins with a new state, and requests
    for shares to come are dropped, as they are of other domains.

    Args:
        state: The state in the checkpoint.
        change: The change.
        corpus: The corpus with the other domains.
        recipe: The recipe with its mixer.
        steps: Steps of the run.
    """
    context = mixer_context(recipe, corpus, steps=steps)
    shift = 0
    if isinstance(recipe.data, DocumentData):
        sizes = (len(change.after), len(change.before))
        after, before = (carry_bits(recipe.data.sequence_length, size) for size in sizes)
        shift = after - before
    sampler = change_domains(state.sampler, change.before, change.after, shift=shift)
    identity = {key: state.sampler[key] for key in ("mode", "sequence_length")}
    return replace(
        state,
        sampler={**sampler, **identity, "fingerprint": corpus.fingerprint},
        controller=_controller(_log(state), change, recipe, context),
        corpus_fingerprint=corpus.fingerprint,
        tokens={name: state.tokens.get(name, 0) for name in change.after},
        left=_left(state, change),
        # The sums of a window are of the old domains; without them all domains are scored anew.
        window={},
    )


def checkpoint_to_resume(
    run: RunDirectory, recipe: Recipe, steps: int, *, domains_from: int | None
) -> tuple[Path, TrainingState] | None:
    """Return the newest checkpoint of a run and its state.

    The state is for the domains of the recipe's corpus if the checkpoint is of step `domains_from`;
    else as it is, and what goes on from it refuses other domains.

    Raises:
        CorpusError: If the corpus cannot be opened.
        RecipeError: If the run has lost its checkpoints.
        StorageError: If the store cannot be used.
    """
    newest = resume_checkpoint(run)
    if newest is None:
        return None
    path, state = newest
    if state.step != domains_from:
        return newest
    corpus = Corpus.open(recipe.corpus.path)
    change = domain_change(state, corpus)
    return path, state if change is None else changed_state(state, change, corpus, recipe, steps)


def change_notes(change: DomainChange, mixer: Mixer, state: TrainingState) -> Iterator[str]:
    """Yield lines on what a change of domains does."""
    yield str(change)
    if not isinstance(mixer, PlannedMixer):
        yield "the mixer begins anew at its initial shares: what it has learned is of other domains"
    controller = state.controller or {}
    if controller.get("asks") or any(controller.get("holds", {}).values()):
        yield "shares that were requested for later steps, or to hold, are dropped"


def _left(state: TrainingState, change: DomainChange) -> dict[str, int]:
    """Return the tokens read of domains that are not among those to come."""
    # A domain that comes back begins anew, so what it was read before stays here under its name.
    left = dict(state.left)
    for name in change.removed:
        left[name] = left.get(name, 0) + state.tokens[name]
    return left


def _log(state: TrainingState) -> MixtureLog:
    assert state.controller is not None
    return MixtureLog.from_lines(state.controller["log"], tuple(state.tokens))


def _controller(
    log: MixtureLog, change: DomainChange, recipe: Recipe, context: MixerContext
) -> dict[str, Any]:
    """Return the controller's snapshot with an entry for the change."""
    mixer, step = build_mixer(recipe.mixer, context), change.step
    # Entries are decided ahead of the steps: those that never held are not part of the run.
    log.truncate(step - 1)
    interval = recipe.train.probe_interval
    window = step // interval
    windows = None
    if isinstance(mixer, PlannedMixer):
        shares_D = mixer.planned(step)
    else:
        windows = Windows(mixer, interval, context.domains)
        shares_D = windows.shares(0)[0]
        # The window under way and the next one have the initial shares, as at the start of a run.
        fresh = windows.state_dict()
        shares = {window + ahead: share_D.tolist() for ahead, share_D in fresh["weights"].items()}
        windows = {**fresh, "done": window, "weights": shares}
    planned = getattr(mixer, "planned_loss_weights", None)
    factors_D = planned(step) if planned else None
    stats: dict[str, Any] = {} if factors_D is None else loss_weight_stats(change.after, factors_D)
    stats |= {
        DOMAINS_CHANGE: {"added": list(change.added), "removed": list(change.removed)},
        NOTE: str(change),
    }
    version = log.entries[-1].version + 1
    log = MixtureLog(change.after, earlier=log)
    log.append(MixtureEntry(version, step, tuple(shares_D.tolist()), recipe.mixer.kind, stats))
    return {
        "log": log.to_lines(),
        "decided": step + 1,
        "asks": {},
        "holds": {},
        "windows": windows,
        "mixer": None if windows else mixer.state_dict(),
    }
