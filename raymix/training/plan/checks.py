"""What cannot work, said before it is tried: one function per reason, each returning messages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raymix.errors import format_problem
from raymix.mixers import GRADIENT_STATISTICS, Mixer
from raymix.recipe import PackedData, Recipe
from raymix.store import Corpus
from raymix.training.host.machine import Resources
from raymix.training.model.memory import MemoryPart
from raymix.training.plan.domain_sizes import DomainSizes
from raymix.training.plan.forecast import Forecast

_GB = 1e9
# What a worker holds for certain; the rest is an estimate.
_STATES = ("weights", "gradients", "optimizer")


def cluster_problems(recipe: Recipe, resources: Resources) -> list[str]:
    """Return why the cluster cannot seat the workers."""
    cluster, found = recipe.cluster, list[str]()
    cpus = cluster.workers * cluster.cpus_per_worker
    if cpus > resources.cpus:
        wrong = f"with cpus_per_worker = {cluster.cpus_per_worker:g} that takes {cpus:g} CPUs"
        found.append(
            format_problem(
                "cluster.workers",
                cluster.workers,
                f"{wrong}, {resources.where} has {resources.cpus:g}",
                fix="Take fewer workers, or a larger cluster",
            )
        )
    if cluster.gpus_per_worker == 1 and max(1, cluster.workers) > resources.gpus:
        found.append(
            format_problem(
                "cluster.gpus_per_worker",
                1,
                (
                    f"with cluster.workers = {cluster.workers} that takes "
                    f"{max(1, cluster.workers)} "
                    f"GPUs, {resources.where} has {resources.gpus:g}"
                ),
                fix="Take fewer workers, or set it to 0",
            )
        )
    return found


def corpus_problems(recipe: Recipe, corpus: Corpus) -> list[str]:
    """Return in what the prepared corpus is not one that the recipe can train on."""
    from raymix.corpus import differences

    found = differences(recipe.corpus)
    block_tokens = corpus.manifest.block_tokens
    if isinstance(recipe.data, PackedData) and recipe.data.sequence_length > block_tokens:
        found.append(
            format_problem(
                "data.sequence_length",
                recipe.data.sequence_length,
                f"longer than a block of the prepared corpus, {block_tokens:,} tokens",
                fix="Shorten it, or prepare the corpus with a larger corpus.block_tokens",
            )
        )
    answers = [name for name, info in corpus.manifest.domains.items() if info.train.loss_mask]
    if isinstance(recipe.data, PackedData) and answers:
        found.append(
            format_problem(
                "data.mode",
                recipe.data.mode,
                f"of {answers[0]!r} only answers are learned, which packed rows do not tell",
                allowed="allowed here: documents",
            )
        )
    return found


def empty_domain_problems(supply: Sequence[DomainSizes], recipe: Recipe) -> list[str]:
    """Return the domains that hold nothing, or not one row."""
    found = []
    for number, domain in enumerate(supply):
        path = f"corpus.domains.{number}.name"
        if domain.tokens == 0:
            wrong, advice = "the domain holds no tokens", "Give it text, or leave it out"
        elif domain.usable == 0:
            length = recipe.data.sequence_length
            wrong = f"the domain's {domain.tokens:,} tokens do not fill one row of {length:,}"
            advice = "Shorten data.sequence_length, give it more text, or leave it out"
        else:
            continue
        found.append(format_problem(path, domain.name, wrong, fix=advice))
    return found


def probe_problems(recipe: Recipe, supply: Sequence[DomainSizes], mixer: Mixer) -> list[str]:
    """Return the domains whose gradients the mixer needs and that do not have two rows."""
    if not GRADIENT_STATISTICS & mixer.needs:
        return []
    length = recipe.data.sequence_length
    return [
        format_problem(
            f"corpus.domains.{number}.name",
            domain.name,
            f"has one row of {length:,} tokens; {recipe.mixer.kind} measures gradients on two",
            fix="Shorten data.sequence_length, give it more text, or leave it out",
        )
        for number, domain in enumerate(supply)
        if length <= domain.tokens < 2 * length
    ]


def max_epochs_by_domain(recipe: Recipe, supply: Sequence[DomainSizes]) -> list[float | None]:
    """Return `data.max_epochs` of every domain."""
    cap = recipe.data.max_epochs
    return [cap.get(domain.name) if isinstance(cap, dict) else cap for domain in supply]


def cap_problems(
    recipe: Recipe, supply: Sequence[DomainSizes], found: Forecast, *, steps: int, tokens: int
) -> list[str]:
    """Return why the caps on epochs leave nothing to read before the last step.

    Args:
        recipe: The recipe.
        supply: What the domains hold.
        found: What the run would read.
        steps: Steps of the run.
        tokens: Tokens of a step.
    """
    if math.isinf(found.exhausted):
        return []
    done = int(found.exhausted)
    used = found.asked_D > 0
    held = float(np.array([domain.usable for domain in supply])[used].sum())
    total = steps * tokens
    return [
        format_problem(
            "data.max_epochs",
            recipe.data.max_epochs,
            (
                f"every domain with a share is used up after {done:,} of {steps:,} steps: the caps "
                f"allow {found.read_D.sum():,.0f} of {total:,} tokens"
            ),
            fix=(
                f"Raise the caps (all domains read equally often would need {total / held:.3g} "
                f"epochs), train at most {done:,} steps, add data, or give other domains a share"
            ),
        )
    ]


def memory_problems(
    recipe: Recipe, parts: Sequence[MemoryPart], resources: Resources, *, on_gpu: bool
) -> list[str]:
    """Return why the weights and optimizer states do not fit into memory."""
    states = sum(part.bytes for part in parts if part.name in _STATES)
    workers = max(1, recipe.cluster.workers)
    if on_gpu or states * workers <= resources.memory_bytes:
        return []
    return [
        format_problem(
            "model",
            recipe.model.model_dump(exclude_defaults=True),
            (
                f"weights, gradients and optimizer states take {workers} x {states / _GB:.1f} GB, "
                f"{resources.where} has "
                f"{resources.memory_bytes / _GB:.1f} GB of memory"
            ),
            fix="Make the model smaller, or take fewer workers",
        )
    ]


def disk_problems(recipe: Recipe, checkpoint: int, free: int | None) -> list[str]:
    """Return why the checkpoints do not fit on the disk; one more than is kept exists at times."""
    needed = (recipe.train.keep_checkpoints + 1) * checkpoint
    if free is None or needed <= free:
        return []
    return [
        format_problem(
            "run.dir",
            recipe.run_dir,
            (
                f"{recipe.train.keep_checkpoints + 1} checkpoints take {needed / _GB:.1f} GB, "
                f"the disk has {free / _GB:.1f} GB free"
            ),
            fix="Free some, choose another run.dir, or lower train.keep_checkpoints",
        )
    ]
