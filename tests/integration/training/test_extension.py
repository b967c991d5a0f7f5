"""A run made longer is the run that had been asked for at first, but for the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymix.errors import RecipeError
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.run.rundir import RunDirectory
from tests.integration.training.test_run import at, numbers, recipe
from tests.support.loops import train_corpus

STATIC = {"kind": "static", "weights": {"a": 0.7, "b": 0.3}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000})


def of_length(corpus: Corpus, directory: Path, steps: int, **changes: Any) -> Recipe:
    options = {"mixer": STATIC, "train__steps": steps, "eval__every": 100}
    return recipe(corpus, directory, **options | changes)


def steps_of(run: RunDirectory) -> list[dict[str, Any]]:
    return [line for line in numbers(run) if "batch_hash" in line]


@pytest.mark.parametrize(
    "changes",
    [{}, {"mixer": {"kind": "pike"}, "train__probe_interval": 2}, {"train__schedule": "constant"}],
    ids=["static", "pike", "constant"],
)
def test_a_longer_run_reads_what_it_would_have_read(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    whole = of_length(corpus, tmp_path / "whole", 10, **changes)
    train(whole, report=False)
    train(of_length(corpus, tmp_path / "longer", 5, **changes), report=False)
    longer = of_length(corpus, tmp_path / "longer", 10, **changes)
    with pytest.raises(RecipeError, match=r"differs in train\.steps: 5 -> 10.*Use --extend"):
        train(longer, report=False)
    capsys.readouterr()
    assert train(longer, extend=True, report=False)["steps"] == 10
    said = capsys.readouterr().out
    assert "extended from 5 to 10 steps: from step 5 on the learning rate is" in said
    expected, steps = (
        steps_of(at(tmp_path / "whole", whole)),
        steps_of(at(tmp_path / "longer", longer)),
    )
    assert [line["step"] for line in steps] == list(range(1, 11))
    if "mixer" not in changes:
        assert [line["batch_hash"] for line in steps] == [line["batch_hash"] for line in expected]
    if "train__schedule" in changes:
        # Without a shape that the length changes, the run is the same to the last bit.
        assert [line["loss"] for line in steps] == [line["loss"] for line in expected]
    assert [line["lr"] for line in steps[5:]] == [line["lr"] for line in expected[5:]]
    # Asked again, it is finished.
    assert train(longer, extend=True, report=False)["steps"] == 10


def test_wsd_goes_on_from_its_hold(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "train__schedule": "wsd", "train__decay_ratio": 0.4, "train__keep_checkpoints": 9,
        "train__checkpoint_every": 2, "train__warmup_ratio": 0.0,
    }  # fmt: skip
    whole = of_length(corpus, tmp_path / "whole", 20, **changes)
    train(whole, report=False)
    train(of_length(corpus, tmp_path / "longer", 10, **changes), report=False)
    longer = of_length(corpus, tmp_path / "longer", 20, **changes)
    train(longer, extend=True, report=False)
    run = at(tmp_path / "longer", longer)
    said = capsys.readouterr().out
    assert "wsd goes on from its hold, at step 6; the checkpoints of the decay are in" in said
    aside = sorted(path.name for path in (run.checkpoints / "before-extension").iterdir())
    assert aside == ["step-00000008", "step-00000010"]
    expected = steps_of(at(tmp_path / "whole", whole))
    assert [line["loss"] for line in steps_of(run)] == [line["loss"] for line in expected]


def test_without_a_checkpoint_of_its_hold_it_says_so(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"train__schedule": "wsd", "train__decay_ratio": 0.9, "train__warmup_ratio": 0.0}
    train(of_length(corpus, tmp_path, 10, **changes), report=False)
    train(of_length(corpus, tmp_path, 20, **changes), extend=True, report=False)
    assert "no checkpoint from before the decay at step 1 is left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "steps", "wrong"),
    [
        ({}, 4, r"train\.steps = 4: 4 steps, and the run has 6, of which 6 are done"),
        ({"train__lr": 0.5}, 12, r"differs in train\.lr"),
        ({"mixer": {"kind": "unimax", "max_epochs": 0.5}}, 38, r"mixer\.kind = 'unimax'"),
    ],
)
def test_other_changes_are_refused(
    corpus: Corpus, tmp_path: Path, changes: dict[str, Any], steps: int, wrong: str
) -> None:
    mixer = {"mixer": changes["mixer"]} if "mixer" in changes else {}
    first = of_length(corpus, tmp_path, 6, **mixer)
    train(first, report=False)
    before = {
        path: path.read_bytes() for path in at(tmp_path, first).path.rglob("*") if path.is_file()
    }
    with pytest.raises(RecipeError, match=wrong):
        train(of_length(corpus, tmp_path, steps, **changes), extend=True, report=False)
    after = {
        path: path.read_bytes() for path in at(tmp_path, first).path.rglob("*") if path.is_file()
    }
    assert after == before
