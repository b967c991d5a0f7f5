"""Steps found without a state: `seek`, and Megatron's external loader, which counts samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raymix.errors import TrainingError
from raymix.integrations.megatron import external_iterator
from raymix.loader import MixtureLoader
from raymix.recipe import Recipe
from raymix.store import Corpus
from tests.integration.training.test_run import recipe
from tests.support.loops import train_corpus

STEPS = 30
SCHEDULE = {
    "kind": "schedule",
    "pieces": [
        {"step": 0, "weights": {"a": 0.5, "b": 0.3, "c": 0.2}},
        {"step": 11, "weights": {"a": 0.1, "b": 0.1, "c": 0.8}},
    ],
}
DOCUMENTS = {"mode": "documents", "sequence_length": 64, "tokens_per_step": 400}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    sizes = {"a": 90_000, "b": 60_000, "c": 30_000}
    return train_corpus(tmp_path_factory.mktemp("corpus"), sizes)


def made(corpus: Corpus, tmp_path: Path, **sections: object) -> Recipe:
    return recipe(corpus, tmp_path, **{"mixer": SCHEDULE, "train": {"steps": STEPS}, **sections})


def hashes(loader: MixtureLoader) -> list[tuple[int, str]]:
    for _ in loader:
        pass
    infos = [loader.info(step) for step in range(loader.step_read - 6, loader.step_read)]
    return [(info.step, info.batch_hash) for info in infos]


@pytest.mark.parametrize("data", [None, DOCUMENTS], ids=["packed", "documents"])
@pytest.mark.parametrize("step", [0, 5, 11, 24])
def test_batches_are_those_of_a_loader_that_read_them(
    corpus: Corpus, tmp_path: Path, step: int, data: dict[str, object] | None
) -> None:
    own = made(corpus, tmp_path, **({"data": data} if data else {}))
    whole, sought = MixtureLoader(own), MixtureLoader(own)
    sought.seek(step)
    assert sought.step_read == sought.step_trained == step
    assert hashes(sought) == hashes(whole)
    assert sought.state_dict() == whole.state_dict()


def test_it_goes_back_and_keeps_the_state_of_where_it_is(corpus: Corpus, tmp_path: Path) -> None:
    own = made(corpus, tmp_path)
    loader, again = MixtureLoader(own), MixtureLoader(own)
    for _ in range(20):
        next(loader)
    loader.seek(7)
    again.load_state_dict(loader.state_dict())
    assert hashes(loader) == hashes(again)


@pytest.mark.parametrize(
    ("mixer", "step", "says"),
    [
        (SCHEDULE, -1, r"step = -1: not a step of this run: 0 to 30"),
        (SCHEDULE, 31, r"step = 31: not a step of this run"),
        ({"kind": "ado"}, 8, r"adaptive mixer.*Save state_dict"),
    ],
)
def test_a_step_that_cannot_be_found_is_refused(
    corpus: Corpus, tmp_path: Path, mixer: dict[str, object], step: int, says: str
) -> None:
    with pytest.raises(TrainingError, match=says):
        MixtureLoader(made(corpus, tmp_path, mixer=mixer)).seek(step)


def test_megatron_goes_on_by_its_count_of_samples(corpus: Corpus, tmp_path: Path) -> None:
    own = made(corpus, tmp_path)
    rows, length = own.data.step_rows, own.data.sequence_length
    size = rows // 2
    loader = MixtureLoader(own)
    parts = list(loader)[9:]
    ranks = [
        external_iterator(
            own, rank=rank, world_size=2, micro_batch_size=size, consumed_samples=9 * rows
        )
        for rank in range(2)
    ]
    for part in parts:
        both = [next(rank) for rank in ranks]
        batch = {name: torch.cat([each[name] for each in both]) for name in both[0]}
        order = [part["input_ids"].tolist().index(row) for row in batch["tokens"].tolist()]
        assert sorted(order) == list(range(rows))
        labels = part["labels"][order]
        learned = labels[:, 1:] != -100
        assert torch.equal(batch["loss_mask"][:, :-1], learned.float())
        assert not batch["loss_mask"][:, -1].any()
        assert torch.equal(batch["labels"][:, :-1][learned], labels[:, 1:][learned])
        assert batch["labels"].min() >= 0
        positions = batch["position_ids"]
        assert torch.equal(positions, part["position_ids"][order])
        # A token sees as many as came before it in its document, and itself.
        seen = (~batch["attention_mask"]).sum(-1)[:, 0]
        assert torch.equal(seen, positions + 1)
        assert batch["attention_mask"].shape == (rows, 1, length, length)


@pytest.mark.parametrize(
    ("options", "sections", "says"),
    [
        ({"micro_batch_size": 5}, {}, "micro_batch_size = 5.*do not divide"),
        ({"consumed_samples": 7}, {}, "consumed_samples = 7: no multiple"),
        ({}, {"mixer": {"kind": "ado"}}, "mixer.kind = 'ado'.*fixed mixture"),
        ({}, {"data": DOCUMENTS}, "data.mode = 'documents'"),
    ],
)
def test_what_megatron_cannot_do_is_refused(
    corpus: Corpus,
    tmp_path: Path,
    options: dict[str, int],
    sections: dict[str, object],
    says: str,
) -> None:
    sizes = {"rank": 0, "world_size": 1, "micro_batch_size": 1, **options}
    with pytest.raises(TrainingError, match=says):
        external_iterator(made(corpus, tmp_path, **sections), **sizes)
