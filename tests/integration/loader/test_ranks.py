"""`MixtureLoader` on two ranks over gloo: one mixture log, whatever the ranks."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from raymix.errors import TrainingError
from raymix.loader import MixtureLoader
from raymix.store import Corpus
from raymix.training.model.parallel import World
from tests.integration.training.test_run import recipe
from tests.support.loops import train_corpus
from tests.support.ranks import on_two_ranks, results_of_ranks
from tests.support.streams import TokensMixer

STEPS = 12


def adaptive(directory: Path, **options: Any) -> MixtureLoader:
    corpus = Corpus.open(str(directory / "corpus"))
    made = recipe(corpus, directory, train={"steps": STEPS, "probe_interval": 2})
    return MixtureLoader(made, mixer=TokensMixer(3), **options)


def give_losses(loader: MixtureLoader, steps: int) -> None:
    """Train on steps whose losses depend on token and step alone."""
    for part in islice(loader, steps):
        step = loader.step_trained
        loss = (part["domain_ids"] + 1) * (step + 2.0) ** -0.3 + part["input_ids"] / 100
        loader.feedback(loss, part["labels"], part["domain_ids"])
        loader.step()


def work(world: World, directory: Path) -> dict[str, Any]:
    loader = adaptive(directory)
    give_losses(loader, 7)
    first = loader.set_weights({"a": 0.2, "b": 0.2, "c": 0.6})
    state = loader.state_dict()
    states: list[Any] = [None, None]
    torch.distributed.all_gather_object(states, state)
    give_losses(loader, STEPS - 7)
    try:  # both processes say that they are rank 0
        next(adaptive(directory, rank=0, world_size=2))
        problems: tuple[str, ...] = ()
    except TrainingError as error:
        problems = error.problems
    return {
        "rank": (loader.rank, loader.world_size),
        "log": loader.mixture_log.to_lines(),
        "equal": states[0] == states[1],
        "state": json.dumps(state),
        "first": first,
        "losses": loader.domain_losses(),
        "problems": problems,
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    train_corpus(directory / "corpus", {"a": 9000, "b": 6000, "c": 3000})
    return directory


@pytest.fixture(scope="module")
def two(directory: Path) -> dict[str, Any]:
    return results_of_ranks("tests.integration.loader.test_ranks", directory)


def entries(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def test_two_ranks_decide_as_one(directory: Path, two: dict[str, Any]) -> None:
    one = adaptive(directory)
    give_losses(one, 7)
    assert one.set_weights({"a": 0.2, "b": 0.2, "c": 0.6}) == two["first"] == 8
    give_losses(one, STEPS - 7)
    assert two["rank"] == (0, 2)
    ours, theirs = entries(one.mixture_log.to_lines()), entries(two["log"])
    assert len(ours) > 3
    for own, other in zip(ours, theirs, strict=True):
        assert own["first_step"] == other["first_step"]
        assert own["shares"] == pytest.approx(other["shares"], rel=1e-9)
    assert two["losses"] == pytest.approx(one.domain_losses())


def test_the_state_is_equal_on_both_and_goes_on_with_one(
    directory: Path, two: dict[str, Any]
) -> None:
    assert two["equal"]
    rest = adaptive(directory)
    rest.load_state_dict(json.loads(two["state"]))
    give_losses(rest, STEPS - 7)
    ours, theirs = entries(rest.mixture_log.to_lines()), entries(two["log"])
    assert [line["first_step"] for line in ours] == [line["first_step"] for line in theirs]
    for own, other in zip(ours, theirs, strict=True):
        assert own["shares"] == pytest.approx(other["shares"], rel=1e-9)


def test_two_processes_of_one_rank_are_refused(two: dict[str, Any]) -> None:
    assert two["problems"] == (
        "rank = 0: the processes read as ranks 0, 0. Give each process its own rank, in the order "
        "of the process group.",
    )


if __name__ == "__main__":
    on_two_ranks(work)
