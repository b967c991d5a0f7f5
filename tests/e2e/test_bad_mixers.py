"""Mixers that cannot be: one clear error before anything runs, and a run that then goes on."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raymix.store import Corpus
from raymix.training.run.progress import RunProgress
from raymix.training.step.probing import Prober
from tests.integration.training.test_run import at, numbers, recipe, train
from tests.support.loops import train_corpus
from tests.unit.cli.test_cli import call

# What is asked for, and the words that the error must have.
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown": ("mixer={kind: pyke}", ("mixer.kind = 'pyke'", "Did you mean 'pike'")),
    "no target": ("mixer={kind: dga}", ("mixer.targets", "dga needs a target")),
    "target unknown": (
        "mixer={kind: dga, targets: [medicine]}",
        ("mixer.targets = 'medicine'", "no domain of the corpus"),
    ),
    "target misspelt": ("mixer={kind: dga, targets: [aa]}", ("'aa'", "Did you mean 'a'")),
    "only targets": (
        "mixer={kind: dga, targets: [a, b, c]}",
        ("mixer.targets", "every domain is a target", "at least one domain"),
    ),
    "tau": ("mixer={kind: pike, tau: -1}", ("mixer.tau = -1", "0")),
    "initial sum": (
        "mixer={kind: pike, initial: {a: 0.5, b: 0.2}}",
        ("mixer.initial", "sum to 0.7", "Divide each by 0.7"),
    ),
    "initial unknown": (
        "mixer={kind: pike, initial: {a: 0.5, bb: 0.5}}",
        ("mixer.initial.bb", "no such domain"),
    ),
    "initial of a target": (
        "mixer={kind: dga, targets: [c], initial: {a: 0.5, c: 0.5}}",
        ("mixer.initial.c = 0.5", "never trained on"),
    ),
    "negative": ("mixer={kind: pike, initial: {a: 1.5, b: -0.5}}", ("mixer.initial.b = -0.5",)),
    "half of a pair": ("mixer={kind: pike, lr: 0.1}", ("mixer.lr", "go together")),
    "rows of a probe": ("train.probe.rows=3", ("train.probe.rows = 3", "multiple of 2")),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    sizes = {"a": 9000, "b": 6000, "c": 3000}
    return train_corpus(tmp_path_factory.mktemp("corpus"), sizes)


@pytest.fixture
def file(corpus: Corpus, tmp_path: Path) -> Path:
    """Return a recipe under PiKE, three steps without Ray."""
    return written(tmp_path, corpus)


def written(directory: Path, corpus: Corpus, **changes: Any) -> Path:
    options = {"mixer": {"kind": "pike"}, "train__probe_interval": 1, "train__steps": 3}
    used = recipe(corpus, directory, **options | changes)
    path = directory / "r.yaml"
    document = used.model_dump(mode="json", exclude_unset=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_window_that_tells_nothing_is_said_once(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second window's gradients are no numbers: its weights would hold from step 6 on."""
    measure = Prober.measure

    def broken(self: Prober, window: int) -> dict[str, Any]:
        stats = measure(self, window)
        return stats | {"grad_norm2_D": np.full(3, np.nan)} if window == 1 else stats

    monkeypatch.setattr(Prober, "measure", broken)
    options = {"mixer": {"kind": "pike"}, "train__probe_interval": 2, "train__steps": 10}
    used = recipe(corpus, tmp_path, **options)
    train(used)
    noted = [line for line in numbers(at(tmp_path, used)) if "note" in line]
    assert [line["step"] for line in noted] == [7]
    wrong = "steps 2 to 3: norm2 is not finite; the weights stay as they were"
    assert noted[0]["note"] == wrong
    shown = io.StringIO()
    file = tmp_path / "again.jsonl"
    with RunProgress(file, steps=10, stream=shown) as progress:
        file.write_text(at(tmp_path, used).metrics.read_text())
        progress.poll()
    assert shown.getvalue().count(f"step 7: {wrong}\n") == 1


@pytest.fixture
def environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the one error that a command leaves with."""
    assert call(*args) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert shown.err.count("error: ") == 1, shown.err
    assert "problems." not in shown.err, shown.err
    return shown.err


@pytest.mark.parametrize("name", REFUSED)
def test_plan_refuses_with_one_error(
    name: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    override, says = REFUSED[name]
    shown = error(capsys, "plan", str(file), override)
    for words in says:
        assert words in shown, shown
    assert not (file.parent / "run").exists()


def test_train_refuses_and_leaves_the_run_as_it_was(
    file: Path, capsys: pytest.CaptureFixture[str], environment: None
) -> None:
    train = ("train", str(file), "--no-report")
    for override in ("mixer={kind: dga}", "mixer={kind: dga, targets: [medicine]}"):
        error(capsys, *train, override)
        assert not (file.parent / "run" / "metrics.jsonl").exists()
    assert call(*train) == 0
    run = file.parent / "run"
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    capsys.readouterr()
    for override, _ in REFUSED.values():
        error(capsys, *train, override)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    # The run is whole: asked again it has nothing to do, and it may be judged.
    assert call(*train) == 0
    assert "is finished" in capsys.readouterr().out
    assert call("eval", str(run), "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["domains"]) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("tokens", "says"), [(0, "has no tokens"), (20, "20 tokens do not fill one row of 32")]
)
def test_an_empty_target_is_refused(
    tokens: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"a": 9000, "b": 6000, "small": 60}
    corpus = train_corpus(tmp_path / "corpus", sizes)
    manifest = tmp_path / "corpus" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["domains"]["small"]["train"]["tokens"] = tokens
    manifest.write_text(json.dumps(document))
    mixer = {"kind": "dga", "targets": ["small"]}
    shown = error(capsys, "plan", str(written(tmp_path, corpus, mixer=mixer)))
    assert "'small'" in shown
    assert says in shown


def test_a_finished_run_is_no_answer_about_another_corpus(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], environment: None
) -> None:
    train = ("train", str(file), "--no-report", "data.accept_changed_corpus=true")
    assert call(*train) == 0
    capsys.readouterr()
    other = train_corpus(tmp_path / "other", {"a": 9000, "b": 6000, "c": 3000}, seed=1)
    said = error(capsys, *train, f"corpus.path={other.path}")
    assert "its content is not what the run in" in said
    more = train_corpus(tmp_path / "more", {"a": 9000, "b": 6000, "c": 3000, "d": 3000})
    said = error(capsys, *train, f"corpus.path={more.path}")
    assert "corpus.domains = ['a', 'b', 'c', 'd']: the run in" in said
    assert "reads ['a', 'b', 'c'], and has to its step 3" in said
