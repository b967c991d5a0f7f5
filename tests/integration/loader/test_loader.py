"""`MixtureLoader` in one process: what it reads, its states, adaptive mixers, bad use."""

from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from raymix.errors import CorpusError, RecipeError, TrainingError
from raymix.loader import MixtureLoader, token_losses
from raymix.recipe import Recipe
from raymix.sampling import MixtureEntry, MixtureLog
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.learning_rate import learning_rate
from raymix.training.model.loss import IGNORED, PackedLoss
from raymix.training.model.optim import (
    build_optimizer,
    clip_gradients,
    set_learning_rate,
)
from raymix.training.run.rundir import read_metrics
from tests.integration.training.test_run import recipe
from tests.support.loops import train_corpus

STEPS, LENGTH = 8, 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[str]]:
    """Return a recipe and the batch hashes of `raymix train`."""
    made = recipe(corpus, tmp_path_factory.mktemp("run"))
    train(made, report=False)
    return made, hashes_of_run(made)


def hashes_of_run(made: Recipe) -> list[str]:
    lines = read_metrics(Path(made.run_dir) / "metrics.jsonl")
    return [line["batch_hash"] for line in lines if "batch_hash" in line]


def hashes(loader: MixtureLoader) -> list[str]:
    """Return the hash of each step that is left, read in whole steps."""
    by_step = []
    for number, _ in enumerate(loader, start=1):
        if not number % loader.micro_batches:
            by_step.append(loader.info(loader.step_read - 1).batch_hash)
    return by_step


def test_batches_are_those_of_raymix_train(trained: tuple[Recipe, list[str]]) -> None:
    made, expected = trained
    assert hashes(MixtureLoader(made)) == expected
    assert hashes(MixtureLoader(made, rank=1, world_size=4, micro_batches=2)) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_and_parts_make_up_the_batch(
    trained: tuple[Recipe, list[str]], world_size: int
) -> None:
    made, _ = trained
    whole = next(iter(MixtureLoader(made)))
    ranks = [
        MixtureLoader(made, rank=rank, world_size=world_size, micro_batches=2)
        for rank in range(world_size)
    ]
    parts = [part for rank in ranks for part in islice(rank, 2)]
    parts = [part for part in parts if part["input_ids"].numel() > 1]  # rows, none left for it
    for name in ("input_ids", "labels", "position_ids", "domain_ids"):
        joined = torch.cat([part[name] for part in parts])
        assert torch.equal(joined, whole[name]), name
    assert float(parts[0]["num_items_in_batch"]) == pytest.approx(
        int((whole["labels"] != IGNORED).sum()) / world_size
    )


def test_fields_are_what_causal_models_take(trained: tuple[Recipe, list[str]]) -> None:
    made, _ = trained
    batch = next(iter(MixtureLoader(made)))
    tokens, labels, positions = (batch[n] for n in ("input_ids", "labels", "position_ids"))
    assert "attention_mask" not in batch
    assert tokens.shape == (6, LENGTH)
    assert (positions[:, 0] == 0).all()
    # A label is its own token, but for the first of a document and of a row.
    assert torch.equal(labels == IGNORED, positions == 0)
    assert torch.equal(labels[positions > 0], tokens[positions > 0])
    steps = positions[:, 1:] - positions[:, :-1]
    assert torch.equal(steps == 1, positions[:, 1:] > 0)


def test_flat_parts_have_the_boundaries_of_documents(trained: tuple[Recipe, list[str]]) -> None:
    made, _ = trained
    rows = next(iter(MixtureLoader(made)))
    flat = next(iter(MixtureLoader(made, layout="flat", varlen=True)))
    assert torch.equal(flat["input_ids"], rows["input_ids"].reshape(1, -1))
    starts = torch.nonzero(rows["position_ids"].flatten() == 0).flatten().tolist()
    assert flat["cu_seq_lens_q"].tolist() == [*starts, 6 * LENGTH]
    assert flat["max_length_q"] == max(np.diff([*starts, 6 * LENGTH]))


@pytest.mark.parametrize("read", [0, 1, 3, STEPS])
def test_a_state_goes_on_in_the_next_batch_on_any_number_of_ranks(
    trained: tuple[Recipe, list[str]], read: int
) -> None:
    made, expected = trained
    first = MixtureLoader(made, rank=0, world_size=2, micro_batches=2)
    # One part of the next step too: that step begins again.
    for _ in islice(first, 2 * read + (read < STEPS)):
        pass
    other = MixtureLoader(made, rank=1, world_size=2, micro_batches=2)
    for _ in islice(other, 2 * read + (read < STEPS)):
        pass
    state = first.state_dict()
    assert state == other.state_dict()
    again = MixtureLoader(made, rank=2, world_size=3)
    again.load_state_dict(json.loads(json.dumps(state)))
    if read < STEPS:
        assert hashes(again) == expected[read:]
    again.load_state_dict(state)  # also after reading
    assert again.step_read == read


def test_the_state_of_the_step_trained_when_a_framework_reads_ahead(
    trained: tuple[Recipe, list[str]],
) -> None:
    made, expected = trained
    loader = MixtureLoader(made)
    for _ in islice(loader, 5):
        pass
    for _ in range(3):
        loader.step()
    assert (loader.step_read, loader.step_trained) == (5, 3)
    again = MixtureLoader(made)
    again.load_state_dict(loader.state_dict())
    assert hashes(again) == expected[3:]
    again.load_state_dict(loader.state_dict(4))
    assert hashes(again) == expected[4:]
    with pytest.raises(TrainingError, match="step = 2"):  # released by the steps reported
        loader.state_dict(2)


def test_it_is_pickled_and_goes_on(trained: tuple[Recipe, list[str]]) -> None:
    made, expected = trained
    loader = MixtureLoader(made)
    assert hashes(pickle.loads(pickle.dumps(loader))) == expected
    for _ in islice(loader, 3):
        pass
    assert hashes(pickle.loads(pickle.dumps(loader))) == expected[3:]
    loader.close()
    assert hashes(loader) == expected[3:]


def test_a_dataloader_takes_it_where_a_framework_insists(trained: tuple[Recipe, list[str]]) -> None:
    made, expected = trained
    loader = MixtureLoader(made)
    batches = list(DataLoader(loader, batch_size=None))
    assert len(batches) == len(loader) == STEPS
    assert [loader.info(step).batch_hash for step in range(STEPS)] == expected


def test_weights_hold_from_the_step_after_the_next(trained: tuple[Recipe, list[str]]) -> None:
    made, _ = trained
    loader = MixtureLoader(made)
    for _ in islice(loader, 3):
        pass
    first = loader.set_weights({"a": 0.25, "b": 0.25, "c": 0.5})
    assert first <= 4  # the batch of step 3 is being made ahead
    list(loader)
    shares = [list(loader.info(step).shares.values()) for step in range(STEPS)]
    assert shares[:first] == [[0.5, 0.3, 0.2]] * first
    assert shares[first:] == [[0.25, 0.25, 0.5]] * (STEPS - first)
    assert loader.mixture_log.entries[-1].first_step == first
    again = MixtureLoader(made)
    again.load_state_dict(loader.state_dict(6))
    assert hashes(again) == [loader.info(step).batch_hash for step in range(6, STEPS)]
    assert again.mixture_log.to_lines() == loader.mixture_log.to_lines()


def test_a_prepared_corpus_needs_no_recipe(corpus: Corpus) -> None:
    loader = MixtureLoader.from_corpus(
        corpus.path, steps=4, mixer="uniform", sequence_length=LENGTH, rows_per_step=6
    )
    assert [part["input_ids"].shape for part in loader] == [(6, LENGTH)] * 4
    assert loader.info().shares == pytest.approx(dict.fromkeys("abc", 1 / 3))


def test_documents_are_handed_out_whole(corpus: Corpus, tmp_path: Path) -> None:
    data = {"mode": "documents", "sequence_length": LENGTH, "tokens_per_step": 200}
    made = recipe(corpus, tmp_path, data=data)
    train(made, report=False)
    ranks = [MixtureLoader(made, rank=rank, world_size=2, micro_batches=3) for rank in (0, 1)]
    assert [hashes(rank) for rank in ranks] == [hashes_of_run(made)] * 2
    parts = [part for rank in ranks for part in islice(MixtureLoader(
        made, rank=rank.rank, world_size=2, micro_batches=3), 3)]  # fmt: skip
    info = ranks[0].info(0)
    known = [part["domain_ids"] >= 0 for part in parts]
    assert sum(int(mask.sum()) for mask in known) == sum(info.tokens.values())
    assert sum(int((part["labels"] != IGNORED).sum()) for part in parts) == info.label_tokens


# -- adaptive mixers ---------------------------------------------------------------------------


def own_loop(made: Recipe, loader: MixtureLoader, until: int, *, probe: bool = False) -> None:
    """Train as `raymix train` does, by the parts a user would write it of."""
    info = Corpus.open(made.corpus.path).manifest.tokenizer
    model = build_model(
        made.model, CorpusFacts(info.vocab_size, info.eos_id, LENGTH), seed=made.seed
    )
    optimizer = build_optimizer(PackedLoss(model, linear_head=False), made.train, sharded=False)
    if probe:
        loader.gradient_probe(model, optimizer=optimizer)
    for step, part in zip(range(until), loader, strict=False):
        set_learning_rate(optimizer, learning_rate(step, steps=loader.steps, config=made.train))
        domain_ids = part.pop("domain_ids")
        out = model(**part)
        out.loss.backward()
        loader.feedback(token_losses(out.logits, part["labels"]), part["labels"], domain_ids)
        clip_gradients(model.parameters(), made.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loader.step()


def log_of(path: Path) -> list[MixtureEntry]:
    lines = (path / "mixture_log.jsonl").read_text().splitlines()
    return MixtureLog.from_lines(lines, ("a", "b", "c")).entries


@pytest.mark.parametrize("kind", ["ado", "pike"])
def test_an_adaptive_mixer_decides_as_in_raymix_train(
    corpus: Corpus, tmp_path: Path, kind: str
) -> None:
    made = recipe(
        corpus,
        tmp_path,
        mixer={"kind": kind},
        train={"steps": 16, "lr": 0.01, "probe_interval": 2, "probe": {"rows": 4}},
    )
    config = {**made.model.config, "attention_dropout": 0.0}
    made = made.model_copy(update={"model": made.model.model_copy(update={"config": config})})
    train(made, report=False)
    loader = MixtureLoader(made, run_dir=tmp_path / "own")
    own_loop(made, loader, 16, probe=kind == "pike")
    ours, theirs = log_of(tmp_path / "own"), log_of(Path(made.run_dir))
    assert len(ours) > 3
    assert [entry.first_step for entry in ours] == [entry.first_step for entry in theirs]
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own.weights, other.weights, rtol=1e-4)
    assert set(loader.domain_losses()) == {"a", "b", "c"}


def test_a_state_within_a_window_goes_on_with_its_losses(corpus: Corpus, tmp_path: Path) -> None:
    made = recipe(corpus, tmp_path, mixer={"kind": "odm"}, train={"steps": 12, "probe_interval": 4})

    def losses(loader: MixtureLoader, steps: int) -> None:
        for part in islice(loader, steps):
            ids = part["domain_ids"]
            loader.feedback(1.0 + ids.double(), part["labels"], ids)
            loader.step()

    whole, first, rest = (MixtureLoader(made) for _ in range(3))
    losses(whole, 12)
    losses(first, 6)
    rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
    losses(rest, 6)
    assert rest.mixture_log.to_lines() == whole.mixture_log.to_lines()


# -- bad use -----------------------------------------------------------------------------------


def test_bad_use_is_one_clear_error(
    trained: tuple[Recipe, list[str]], corpus: Corpus, tmp_path: Path
) -> None:
    made, _ = trained
    with pytest.raises(TrainingError, match=r"rank = 2: outside a world of 2"):
        MixtureLoader(made, rank=2, world_size=2)
    with pytest.raises(TrainingError, match=r"world_size.*go together"):
        MixtureLoader(made, rank=0)
    with pytest.raises(RecipeError, match="varlen"):
        MixtureLoader(made, varlen=True)
    with pytest.raises(RecipeError, match="micro_batches"):
        MixtureLoader(made, micro_batches=0)
    with pytest.raises(CorpusError, match="no prepared corpus"):
        MixtureLoader.from_corpus(tmp_path / "nothing", steps=3)
    loader = MixtureLoader(made)
    with pytest.raises(TrainingError, match=r"step = 0: its batch has not been read"):
        loader.step()
    with pytest.raises(TrainingError, match="have the shapes"):
        loader.feedback(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(RecipeError, match="weights"):
        loader.set_weights({"a": 1, "d": 1})
    list(loader)
    with pytest.raises(TrainingError, match="read to its end"):
        iter(loader)
    with pytest.raises(TrainingError, match="num_workers = 1"):
        list(DataLoader(MixtureLoader(made), batch_size=None, num_workers=1))


def test_states_of_others_are_refused(trained: tuple[Recipe, list[str]], tmp_path: Path) -> None:
    made, _ = trained
    state = MixtureLoader(made).state_dict()
    with pytest.raises(TrainingError, match=r"state\.seed"):
        MixtureLoader(made.model_copy(update={"seed": 9})).load_state_dict(state)
    other = train_corpus(tmp_path / "other", {"a": 9000, "b": 6000, "c": 4000})
    with pytest.raises(CorpusError, match="another corpus"):
        MixtureLoader(recipe(other, tmp_path)).load_state_dict(state)
    with pytest.raises(TrainingError, match=r"state\.version"):
        MixtureLoader(made).load_state_dict({})


def test_adaptive_mixers_miss_what_nobody_gives(corpus: Corpus, tmp_path: Path) -> None:
    train_section = {"steps": 8, "probe_interval": 1}
    loader = MixtureLoader(recipe(corpus, tmp_path, mixer={"kind": "ado"}, train=train_section))
    next(loader)
    with pytest.raises(TrainingError, match=r"no losses were given for steps 0 to 0"):
        loader.step()
    loader = MixtureLoader(recipe(corpus, tmp_path, mixer={"kind": "pike"}, train=train_section))
    part = next(loader)
    loader.feedback(part["labels"].double(), part["labels"], part["domain_ids"])
    with pytest.raises(RecipeError, match=r"mixer\.kind = 'pike'.*gradient_probe"):
        loader.step()


def test_ranks_of_the_environment(
    trained: tuple[Recipe, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = trained
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    loader = MixtureLoader(made)
    assert (loader.rank, loader.world_size) == (1, 3)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(TrainingError, match=r"rank = 3: outside a world of 3, which RANK"):
        MixtureLoader(made)
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(TrainingError, match=r"RANK = 'one': not a whole number"):
        MixtureLoader(made)
