"""Damaged, unreadable and lost checkpoints: no progress is lost without a word."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from raymix.errors import RecipeError, StorageError
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.launch.local import run_in_process
from raymix.training.model.parallel import World
from raymix.training.run.checkpoint import newest_checkpoint, read_state
from raymix.training.run.rundir import RunDirectory
from raymix.training.setup import resume
from tests.integration.training.test_run import at, job, recipe
from tests.support.loops import train_corpus

# Its first page is not mapped: a read of it fails with EIO, as on a disk that is dying.
UNREADABLE = Path("/proc/self/mem")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = tmp_path_factory.mktemp("finished")
    used = recipe(corpus, directory)
    train(used, report=False)
    return at(directory, used)


@pytest.fixture
def run(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(finished.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def again(run: RunDirectory, corpus: Corpus, **changes: object) -> Recipe:
    return recipe(corpus, run.path.parent, **changes)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*"))


def test_damaged_checkpoints_are_set_aside_and_never_outlive_whole_ones(
    run: RunDirectory, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run.checkpoints / "step-00000006"
    for step in (1000, 2000):
        shutil.copytree(whole, run.checkpoints / f"step-{step:08d}")
        (run.checkpoints / f"step-{step:08d}" / "model.safetensors").write_bytes(b"cut")
    shutil.rmtree(run.checkpoints / "step-00000008")
    train(again(run, corpus, train__checkpoint_every=1), report=False)
    assert names(run.checkpoints) == ["damaged", "step-00000007", "step-00000008"]
    assert names(run.checkpoints / "damaged") == ["step-00001000", "step-00002000"]
    said = capsys.readouterr().out
    assert "step-00001000': damaged: model.safetensors is not" in said
    assert "checkpoints/damaged/step-00001000 now." in said


def test_checkpoints_damaged_while_it_runs_do_not_count_for_those_to_keep(
    run: RunDirectory, corpus: Corpus
) -> None:
    for step in (1000, 2000):
        (run.checkpoints / f"step-{step:08d}").mkdir()
    shutil.rmtree(run.checkpoints / "step-00000008")
    # As a worker that is started again: only the command sets aside.
    used = again(run, corpus, train__checkpoint_every=1)
    run_in_process(job(used), stop_requested=lambda: False)
    left = ["step-00000007", "step-00000008", "step-00001000", "step-00002000"]
    assert names(run.checkpoints) == left


def test_an_error_of_the_disk_is_not_damage(run: RunDirectory, corpus: Corpus) -> None:
    state = run.checkpoints / "step-00000008" / "state.json"
    content, before = state.read_bytes(), run.metrics.read_bytes()
    state.unlink()
    state.symlink_to(UNREADABLE)
    with pytest.raises(OSError, match="Input/output") as error:
        state.read_bytes()
    assert error.value.errno == errno.EIO
    with pytest.raises(StorageError, match=r"cannot be read: Input/output error\. Nothing was"):
        train(again(run, corpus), report=False)
    assert run.metrics.read_bytes() == before
    assert names(run.checkpoints) == ["step-00000006", "step-00000008"]
    threading.Thread(target=_mend, args=(state, content)).start()
    newest = newest_checkpoint(run.checkpoints)
    assert newest is not None
    assert newest[1].step == 8


def _mend(state: Path, content: bytes) -> None:
    time.sleep(0.3)
    whole = state.with_suffix(".new")
    whole.write_bytes(content)
    os.replace(whole, state)


@pytest.mark.parametrize("how", ["deleted", "damaged"])
def test_a_run_that_lost_its_checkpoints_is_not_begun_again(
    how: str, run: RunDirectory, corpus: Corpus
) -> None:
    if how == "deleted":
        shutil.rmtree(run.checkpoints)
    for path in run.checkpoints.glob("step-*/state.json"):
        path.unlink()
    before, used = run.metrics.read_bytes(), again(run, corpus)
    with pytest.raises(RecipeError) as error:
        resume(job(used), World())  # a worker that is started again
    assert "it had a checkpoint at step 8, and no whole one is left" in str(error.value)
    assert "raymix train RECIPE --if-exists new" in str(error.value)
    with pytest.raises(RecipeError, match="it had a checkpoint at step 8"):
        train(used, report=False)
    assert run.metrics.read_bytes() == before
    if how == "damaged":
        aside = run.checkpoints / "damaged" / "step-00000008"
        assert (aside / "model.safetensors").is_file()
    document = train(used, if_exists="new", report=False)
    assert document["steps"] == 8
    assert read_state(Path(document["run"]) / "checkpoints" / "step-00000008").step == 8
