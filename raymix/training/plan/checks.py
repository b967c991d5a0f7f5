"""Preflight checks: one function per reason why a run cannot work, each returning messages.

They return instead of raising, so that a user sees all problems of a recipe at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raymix.errors import format_problem
from raymix.mixers import GRADIENT_STATISTICS, Mixer
from raymix.recipe import PackedData, Recipe
from raymix.store import Corpus
from raymix.training.host.machine import Resources
from raymix.training.model.facts import MemoryPart
from raymix.training.plan.domain_sizes import DomainSizes
from raymix.training.plan.forecast import Forecast

_GB = 1e9
# Parts of the memory that are exact. Activations and the rest are estimates, and no run is refused
# because of an estimate.
_EXACT_PARTS = ("weights", "gradients", "optimizer")


def cluster_problems(recipe: Recipe, resources: Resources) -> list[str]:
    """Return why the cluster's CPUs and GPUs do not suffice for the workers."""
    cluster, problems = recipe.cluster, list[str]()
    cpus = cluster.workers * cluster.cpus_per_worker
    if cpus > resources.cpus:
        needed = f"with cpus_per_worker = {cluster.cpus_per_worker:g} that takes {cpus:g} CPUs"
        problems.append(
            format_problem(
                "cluster.workers",
                cluster.workers,
                f"{needed}, {resources.where} has {resources.cpus:g}",
                fix="Use fewer workers, or a larger cluster",
            )
        )
    # Without workers the training process itself takes one GPU.
    if cluster.gpus_per_worker == 1 and max(1, cluster.workers) > resources.gpus:
        problems.append(
            format_problem(
                "cluster.gpus_per_worker",
                1,
                (
                    f"with cluster.workers = {cluster.workers} that takes "
                    f"{max(1, cluster.workers)} "
                    f"GPUs, {resources.where} has {resources.gpus:g}"
                ),
                fix="Use fewer workers, or set it to 0",
            )
        )
    return problems


def corpus_problems(recipe: Recipe, corpus: Corpus) -> list[str]:
    """Return why the recipe cannot train on the prepared corpus."""
    from raymix.corpus import differences

    problems = differences(recipe.corpus)
    block_tokens = corpus.manifest.block_tokens
    # Rows do not straddle blocks, which are read and cached one by one.
    if isinstance(recipe.data, PackedData) and recipe.data.sequence_length > block_tokens:
        problems.append(
            format_problem(
                "data.sequence_length",
                recipe.data.sequence_length,
                f"longer than a block of the prepared corpus, {block_tokens:,} tokens",
                fix="Shorten it, or prepare the corpus with a larger corpus.block_tokens",
            )
        )
    masked = [name for name, info in corpus.manifest.domains.items() if info.train.loss_mask]
    if isinstance(recipe.data, PackedData) and masked:
        problems.append(
            format_problem(
                "data.mode",
                recipe.data.mode,
                f"{masked[0]!r} has a loss mask (only answers are learned), packed rows have none",
                allowed="allowed here: documents",
            )
        )
    return problems


def empty_domain_problems(
    sizes: Sequence[DomainSizes], recipe: Recipe, unread_D: NDArray[np.bool_] | None
) -> list[str]:
    """Return a message per domain with no tokens, less than one row, or nothing to learn.

    Args:
        sizes: Sizes of the domains.
        recipe: The recipe.
        unread_D: Domains without a share, which may be empty, shape (D,); None if that is unknown.
    """
    problems = []
    length = recipe.data.sequence_length
    for number, domain in enumerate(sizes):
        path = f"corpus.domains.{number}.name"
        if unread_D is not None and unread_D[number]:
            continue
        if domain.tokens == 0:
            problem, fix = (
                "the domain has no tokens",
                "Give it text or a share of 0, or leave it out",
            )
        elif domain.usable == 0 and not _skips_empty(recipe):
            problem = f"the domain's {domain.tokens:,} tokens do not fill one row of {length:,}"
            fix = (
                "Shorten data.sequence_length, give it more text or a share of 0, or set "
                "data.skip_empty: true"
            )
        elif domain.unlearned and domain.unlearned == domain.documents:
            every = f"all {domain.unlearned:,} documents are cut after {length:,} tokens"
            problem = f"{every}, before their first answer: nothing would be learned"
            fix = "Raise data.sequence_length, or leave it out"
        else:
            continue
        problems.append(format_problem(path, domain.name, problem, fix=fix))
    return problems


def _skips_empty(recipe: Recipe) -> bool:
    return isinstance(recipe.data, PackedData) and recipe.data.skip_empty


def probe_problems(recipe: Recipe, sizes: Sequence[DomainSizes], mixer: Mixer) -> list[str]:
    """Return a message per domain that has too few rows for the mixer's gradient statistics."""
    # Unbiased estimates of squared norms need the product of two independent gradients.
    if not GRADIENT_STATISTICS & mixer.needs:
        return []
    length = recipe.data.sequence_length
    return [
        format_problem(
            f"corpus.domains.{number}.name",
            domain.name,
            f"its {domain.tokens:,} tokens are less than two rows of {length:,}, and "
            f"{recipe.mixer.kind} measures gradients on two",
            fix="Shorten data.sequence_length, give it more text, or leave it out",
        )
        for number, domain in enumerate(sizes)
        # Domains without a single row have a message of their own, unless they are skipped.
        if (0 if _skips_empty(recipe) else length) <= domain.tokens < 2 * length
    ]


def max_epochs_by_domain(recipe: Recipe, sizes: Sequence[DomainSizes]) -> list[float | None]:
    """Return `data.max_epochs` of each domain; None for a domain without a cap."""
    cap = recipe.data.max_epochs
    return [cap.get(domain.name) if isinstance(cap, dict) else cap for domain in sizes]


def cap_problems(
    recipe: Recipe,
    sizes: Sequence[DomainSizes],
    forecast: Forecast,
    *,
    steps: int,
    tokens_per_step: int,
) -> list[str]:
    """Return why the caps on epochs leave nothing to read before the last step.

    Args:
        recipe: The recipe.
        sizes: Tokens of the domains.
        forecast: Tokens the run would read.
        steps: Steps of the run.
        tokens_per_step: Tokens of a global batch.
    """
    if math.isinf(forecast.exhausted_step):
        return []
    done = int(forecast.exhausted_step)
    used_D = forecast.share_D > 0
    usable = float(np.array([domain.usable for domain in sizes])[used_D].sum())
    total = steps * tokens_per_step
    return [
        format_problem(
            "data.max_epochs",
            recipe.data.max_epochs,
            (
                f"every domain with a share is exhausted after {done:,} of {steps:,} steps: the "
                f"caps allow {forecast.read_D.sum():,.0f} of {total:,} tokens"
            ),
            fix=(
                f"Raise the caps (all domains read equally often would need {total / usable:.3g} "
                f"epochs), train at most {done:,} steps, add data, or give other domains a share"
            ),
        )
    ]


def memory_problems(
    recipe: Recipe, parts: Sequence[MemoryPart], resources: Resources, *, on_gpu: bool
) -> list[str]:
    """Return why weights, gradients and optimizer states do not fit into memory."""
    states = sum(part.bytes for part in parts if part.name in _EXACT_PARTS)
    workers = max(1, recipe.cluster.workers)
    # The memory of the workers' GPUs may not be visible here, nor that of nodes to come: the first
    # step tells.
    if on_gpu or resources.missing or states * workers <= resources.memory_bytes:
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
            fix="Make the model smaller, or use fewer workers",
        )
    ]


def disk_problems(recipe: Recipe, checkpoint_bytes: int, free_bytes: int | None) -> list[str]:
    """Return why the checkpoints do not fit on the disk; `free_bytes` is None if unknown."""
    # One more than `keep_checkpoints`: the oldest is removed after the newest is complete.
    needed = (recipe.train.keep_checkpoints + 1) * checkpoint_bytes
    if free_bytes is None or needed <= free_bytes:
        return []
    return [
        format_problem(
            "run.dir",
            recipe.run_dir,
            (
                f"{recipe.train.keep_checkpoints + 1} checkpoints take {needed / _GB:.1f} GB, "
                f"the disk has {free_bytes / _GB:.1f} GB free"
            ),
            fix="Free some space, choose another run.dir, or lower train.keep_checkpoints",
        )
    ]
