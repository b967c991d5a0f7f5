"""Actors of raymix come back after a kill, however large the arguments they were made with."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from raymix.mixers import MixerContext
from raymix.recipe import DocumentData
from raymix.store import Corpus
from raymix.streaming.blocks.actor import start_plane
from raymix.streaming.controller.build import build_mixture_state
from raymix.streaming.controller.client import start_controller
from raymix.streaming.sequences.actor import start_sequence_scheduler
from tests.support.loops import train_corpus
from tests.support.streams import fixed

# Ray sends arguments above 100 KB through the object store.
LARGE = 10_000_000
STEPS = 50


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000})


def controller(corpus: Corpus, directory: Path) -> Any:
    """Start one as for a run that resumes with a mixture log of 10 MB."""
    tokens = [corpus.split(name, "train").tokens for name in corpus.domain_names]
    context = MixerContext(corpus.domain_names, tokens, sum(tokens), STEPS)
    state = build_mixture_state(fixed((0.5, 0.5)), context)
    state.register("first", 1)
    state.lease("first", 0, step=0, leased_until=0, n_steps=STEPS, version=-1)
    snapshot = state.snapshot(0)
    assert snapshot is not None
    statistics = f'"stats": {{"loss": "{LARGE * "5"}"}}'
    snapshot["log"] = [line.replace('"stats": null', statistics) for line in snapshot["log"]]
    return start_controller(
        recipe_mixer=fixed((0.5, 0.5)), context=context, run_dir=str(directory), snapshot=snapshot
    )


def plane(corpus: Corpus, directory: Path) -> Any:
    return start_plane(corpus, row_tokens=32, cache_bytes=1_000_000)


def scheduler(corpus: Corpus, directory: Path) -> Any:
    """Start one with a limit for each of very many domains."""
    data = DocumentData.model_validate({"mode": "documents", "max_epochs": {LARGE * "d": 1.0}})
    return start_sequence_scheduler(corpus, data)


@pytest.mark.parametrize("start", [controller, plane, scheduler])
def test_a_killed_actor_comes_back_with_its_state(
    start: Any, corpus: Corpus, tmp_path: Path, ray_cluster: None
) -> None:
    handle = start(corpus, tmp_path)
    method = handle.describe if start is plane else handle.status
    before = ray.get(method.remote(), timeout=60)
    os.kill(before["pid"], signal.SIGKILL)
    after = ray.get(method.remote(), timeout=60)
    assert after.pop("pid") != before.pop("pid")
    after.pop("refills", 0)
    before.pop("refills", 0)
    assert after == before
    ray.kill(handle)
