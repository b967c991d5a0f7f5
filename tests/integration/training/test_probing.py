"""Gradients measured while training: whole runs under mixers that need them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymix.mixers import DomainStats
from raymix.recipe.training import ProbeConfig
from raymix.store import Corpus
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.loss import PackedLoss
from raymix.training.model.parallel import World
from raymix.training.run.rundir import RunDirectory
from raymix.training.step.probing import Prober, ProbeReader
from tests.integration.training.test_run import after, at, numbers, recipe, train
from tests.support.loops import train_corpus

LENGTH = 32
NEEDS = frozenset({"grad_norm2", "grad_noise", "gram", "alignment"})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    sizes = {"a": 9000, "b": 6000, "c": 3000}
    return train_corpus(tmp_path_factory.mktemp("corpus"), sizes)


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> PackedLoss:
    config = recipe(corpus, Path("unused")).model
    # Without dropout: one pass and several would draw different masks.
    config = config.model_copy(update={"config": {**config.config, "attention_dropout": 0.0}})
    info = corpus.manifest.tokenizer
    facts = CorpusFacts(info.vocab_size, info.eos_id, LENGTH)
    return PackedLoss(build_model(config, facts, seed=1), linear_head=True)


def prober(corpus: Corpus, model: PackedLoss, world: World, **changes: Any) -> Prober:
    options: dict[str, Any] = {"needs": NEEDS, "micro_batch_rows": 6, "targets": [2]} | changes
    return Prober(
        ProbeReader(corpus, sequence_length=LENGTH, seed=5),
        model,
        world,
        ProbeConfig(rows=8, mode=options.pop("mode", "exact")),
        n_domains=3,
        precision=contextlib.nullcontext,
        **options,
    )


def fields(stats: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value for name, value in stats.items() if name != "probe_passes"}


def test_the_halves_of_a_pass_are_never_one_row(corpus: Corpus) -> None:
    reader = ProbeReader(corpus, sequence_length=LENGTH, seed=5)
    rows = [corpus.split(name, "train").tokens // LENGTH for name in corpus.domain_names]
    domain_B, half_B = np.repeat(np.arange(3), 2), np.tile(np.arange(2), 3)
    seen: dict[int, list[bytes]] = {domain: [] for domain in range(3)}
    for number in range(max(rows)):
        batch = reader.rows(domain_B, reader.row_numbers(domain_B, number, half_B))
        for domain in range(3):
            first, second = (batch.tokens[2 * domain + half].tobytes() for half in range(2))
            assert first != second
            seen[domain] += [first, second]
    # One after the other, all rows but the last of an odd number.
    for domain, own in seen.items():
        pairs = rows[domain] // 2
        assert len(set(own[: 2 * pairs])) == 2 * pairs


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_it_is_the_same_on_any_number_of_ranks(
    world_size: int, corpus: Corpus, model: PackedLoss
) -> None:
    from raymix.streaming.controller.windows import combine_ranks

    def stats(rank: int, size: int) -> DomainStats:
        measured = prober(corpus, model, World(rank=rank, size=size)).measure(3)
        tokens_D, loss_D = np.ones(3, np.int64), np.ones(3)
        return DomainStats(step=0, window=1, tokens_D=tokens_D, loss_D=loss_D, **measured)

    alone = combine_ranks([stats(0, 1)])
    shared = combine_ranks([stats(rank, world_size) for rank in range(world_size)])
    assert shared.probe_passes == alone.probe_passes == 4
    for name in ("grad_norm2_D", "grad_noise_D", "gram_DD", "alignment_D"):
        np.testing.assert_allclose(getattr(shared, name), getattr(alone, name), rtol=1e-9)


def test_it_is_what_one_backward_pass_per_part_shows(corpus: Corpus, model: PackedLoss) -> None:
    exact = fields(prober(corpus, model, World()).measure(0))
    reference = fields(prober(corpus, model, World(), mode="backward").measure(0))
    assert exact.keys() == reference.keys()
    for name, values in exact.items():
        scale = np.abs(reference[name]).max()
        np.testing.assert_allclose(values, reference[name], rtol=1e-4, atol=1e-5 * scale)


def test_domains_may_be_measured_some_at_a_time(corpus: Corpus, model: PackedLoss) -> None:
    few = NEEDS - {"gram"}
    together = fields(prober(corpus, model, World(), needs=few, micro_batch_rows=64).measure(1))
    apart = fields(prober(corpus, model, World(), needs=few, micro_batch_rows=2).measure(1))
    assert "gram_DD" not in together
    for name, values in together.items():
        np.testing.assert_allclose(apart[name], values, rtol=1e-4)


def test_groups_are_measured_in_place_of_domains(corpus: Corpus, model: PackedLoss) -> None:
    each = np.eye(3)[:2]
    needs = frozenset({"group_alignment", "group_gram"})
    groups = fields(prober(corpus, model, World(), needs=needs, group_ND=each).measure(2))
    domains = fields(prober(corpus, model, World()).measure(2))
    assert groups.keys() == {"group_alignment_N", "group_gram_NN"}
    np.testing.assert_allclose(
        groups["group_alignment_N"], domains["alignment_D"][:2], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        np.diagonal(groups["group_gram_NN"]), domains["grad_norm2_D"][:2], rtol=1e-3, atol=1e-3
    )


def test_gradients_are_left_alone(corpus: Corpus, model: PackedLoss) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    prober(corpus, model, World()).measure(0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def steps(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the run's metrics without what its probes took."""
    return [line for line in numbers(run) if "probe" not in line]


MIXERS: dict[str, dict[str, Any]] = {
    "pike": {"kind": "pike"},
    "balanced": {"kind": "pike", "tau": 3.0},
    "dga": {"kind": "dga", "targets": ["c"]},
    "doge": {"kind": "doge"},
    "rb": {"kind": "rb"},
    "valid": {"kind": "doremi", "loss": "valid", "reference": dict.fromkeys("abc", 2.0)},
}


@pytest.mark.parametrize("name", MIXERS)
def test_a_run_goes_on_bit_for_bit_and_its_log_replays_it(
    name: str, corpus: Corpus, tmp_path: Path
) -> None:
    mixer = MIXERS[name]
    options = {"mixer": mixer, "train__probe_interval": 3, "train__steps": 13}
    whole = recipe(corpus, tmp_path, name="whole", **options)
    train(whole)
    stopped = recipe(corpus, tmp_path, name="stopped", **options)
    assert train(stopped, stop_requested=after(at(tmp_path, stopped), 7)).stopped
    train(stopped)
    run = at(tmp_path, whole)
    assert steps(at(tmp_path, stopped)) == steps(run)
    entries = [json.loads(line) for line in run.mixture_log.read_text().splitlines()]
    # On so few rows a norm may come out negative: then a window changes nothing.
    first = [entry["first_step"] for entry in entries]
    assert first[0] == 0
    assert len(first) > 2
    assert set(first) <= {0, 6, 9, 12}
    if targets := mixer.get("targets"):
        assert all(entry["shares"][target] == 0 for entry in entries for target in targets)
    assert ("loss_weights" in entries[-1]["stats"]) == (name == "balanced")

    replay = {"kind": "replay", "log": str(run.mixture_log), "targets": mixer.get("targets", [])}
    again = recipe(corpus, tmp_path, name="again", **options | {"mixer": replay})
    train(again)
    assert steps(at(tmp_path, again)) == steps(run)
