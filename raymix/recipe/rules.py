"""Rules that involve two or more sections of a recipe.

They are separate from the `Recipe` model so that the loader can check them on valid sections while
others still hold errors: a user sees every fault at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from raymix.errors import did_you_mean
from raymix.recipe.base import Fault
from raymix.recipe.corpus import CorpusConfig
from raymix.recipe.mixer import MixerConfig
from raymix.recipe.sections.cluster import ClusterConfig
from raymix.recipe.sections.specialists import SpecialistsConfig
from raymix.recipe.sections.tune import TuneConfig
from raymix.recipe.shares import MixerModel
from raymix.recipe.training import DataConfig, DocumentData, PackedData
from raymix.recipe.translate import known_names

# A suggestion costs an edit distance to every domain, and there may be 10,000 of them.
_MAX_SHOWN = 5


def broken_rules(sections: Mapping[str, Any]) -> list[Fault]:
    """Return the faults of every rule whose sections are all in `sections`, by field name."""
    return [
        fault
        for needed, rule in _RULES
        if all(name in sections for name in needed)
        # A rule runs only when all its sections are valid, so no rule has to check types.
        for fault in rule(*(sections[name] for name in needed))
    ]


def _weights_name_domains(corpus: CorpusConfig, mixer: MixerConfig) -> Iterable[Fault]:
    # A plug-in's mixer checks its own names.
    if isinstance(mixer, MixerModel):
        for field, values in (mixer.shares() | mixer.values()).items():
            yield from _unknown_domains(corpus, f"mixer.{field}", values)


def _targets_are_held_out(corpus: CorpusConfig, mixer: MixerConfig) -> Iterable[Fault]:
    names = [domain.name for domain in corpus.domains]
    known, targets = set(names), set(mixer.targets)
    for name in [name for name in mixer.targets if known and name not in known][:_MAX_SHOWN]:
        advice = (did_you_mean(name, names), f"Known: {known_names(names)}")
        yield Fault("mixer.targets", name, "no domain of the corpus has this name", advice)
    # A recipe without domains uses a prepared corpus, whose names are checked when it is opened.
    if known and known <= targets:
        advice = "Leave at least one domain to train on"
        yield Fault("mixer.targets", mixer.targets, "every domain is a target", (advice,))
    for field, shares in mixer.shares().items() if isinstance(mixer, MixerModel) else ():
        for name in [name for name in shares if name in targets and shares[name] > 0]:
            wrong, advice = "a target is measured and never trained on", "Its share must be 0"
            yield Fault(f"mixer.{field}.{name}", shares[name], wrong, (advice,))


def _caps_name_domains(corpus: CorpusConfig, data: DataConfig) -> Iterable[Fault]:
    if isinstance(data.max_epochs, dict):
        yield from _unknown_domains(corpus, "data.max_epochs", data.max_epochs)


def _tuning_names_domains(corpus: CorpusConfig, tune: TuneConfig) -> Iterable[Fault]:
    for field, values in tune.by_domain().items():
        yield from _unknown_domains(corpus, f"tune.{field}", values)


def _specialists_are_trained(
    corpus: CorpusConfig, mixer: MixerConfig, specialists: SpecialistsConfig
) -> Iterable[Fault]:
    names = dict.fromkeys(specialists.domains, 0.0)
    yield from _unknown_domains(corpus, "specialists.domains", names, named=True)
    for name in [name for name in specialists.domains if name in mixer.targets]:
        wrong, advice = "a target is measured and never trained on", "Leave it out of one of them"
        yield Fault("specialists.domains", name, wrong, (advice,))


def _unknown_domains(
    corpus: CorpusConfig, path: str, values: Mapping[str, float], *, named: bool = False
) -> Iterable[Fault]:
    names = [domain.name for domain in corpus.domains]
    known = set(names)
    unknown = [name for name in values if known and name not in known]
    for name in unknown[:_MAX_SHOWN]:
        advice = (did_you_mean(name, names), f"Known: {known_names(names)}")
        where, value = (path, name) if named else (f"{path}.{name}", values[name])
        yield Fault(where, value, "no domain of the corpus has this name", advice)
    if len(unknown) > _MAX_SHOWN:
        wrong = f"{len(unknown) - _MAX_SHOWN} more names are of no domain"
        yield Fault(path, values, wrong)


def _rows_for_every_worker(data: DataConfig, cluster: ClusterConfig) -> Iterable[Fault]:
    # A rank without rows would wait in every collective and learn nothing.
    if isinstance(data, PackedData) and data.rows_per_step < cluster.workers:
        wrong = f"fewer rows than the {cluster.workers} workers of cluster.workers"
        advice = "Every worker needs at least one row per step"
        yield Fault("data.rows_per_step", data.rows_per_step, wrong, (advice,))


def _groups_of_workers(data: DataConfig, cluster: ClusterConfig) -> Iterable[Fault]:
    # 0 workers train in one process, which shares nothing: 0 % context is 0.
    if isinstance(data, DocumentData) and cluster.workers % data.assign.context:
        wrong = f"the {cluster.workers} workers of cluster.workers do not make up groups of it"
        advice = "Take a number that divides them"
        yield Fault("data.assign.context", data.assign.context, wrong, (advice,))


def _answers_are_of_documents(corpus: CorpusConfig, data: DataConfig) -> Iterable[Fault]:
    chats = [number for number, domain in enumerate(corpus.domains) if domain.messages_column]
    if chats and isinstance(data, PackedData):
        wrong = "rows that are cut without regard to documents are learned whole, not answers only"
        advice = "Set data.mode to documents"
        path = f"corpus.domains.{chats[0]}.messages_column"
        yield Fault(path, corpus.domains[chats[0]].messages_column, wrong, (advice,))


def _min_workers(data: DataConfig, cluster: ClusterConfig) -> Iterable[Fault]:
    min_workers = cluster.min_workers
    if min_workers is None:
        return
    if min_workers > cluster.workers:
        wrong = f"more than the {cluster.workers} of cluster.workers, the most there are"
        yield Fault("cluster.min_workers", min_workers, wrong, ("Take that many or fewer",))
    # Schedules depend on the number of ranks, so another number would give other micro-batches.
    elif isinstance(data, DocumentData) and min_workers < cluster.workers:
        wrong = "documents are assigned to a number of workers (data.mode) that must not change"
        advice = "Leave it out, or pack the documents into rows"
        yield Fault("cluster.min_workers", min_workers, wrong, (advice,))


_RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterable[Fault]]], ...] = (
    (("corpus", "mixer"), _weights_name_domains),
    (("corpus", "mixer"), _targets_are_held_out),
    (("corpus", "data"), _caps_name_domains),
    (("corpus", "tune"), _tuning_names_domains),
    (("corpus", "data"), _answers_are_of_documents),
    (("corpus", "mixer", "specialists"), _specialists_are_trained),
    (("data", "cluster"), _rows_for_every_worker),
    (("data", "cluster"), _groups_of_workers),
    (("data", "cluster"), _min_workers),
)
