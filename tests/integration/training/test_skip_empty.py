"""Domains that do not fill a row: refused, or left out where the recipe says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymix.errors import CorpusError, RecipeError
from raymix.loader import MixtureLoader
from raymix.streaming.controller.build import build_mixture_state
from raymix.training.plan import preflight
from raymix.training.plan.mixer_context import mixer_context
from raymix.training.run.checkpoint import newest_checkpoint
from raymix.training.run.rundir import RunDirectory
from tests.integration.training.test_preflight import HERE
from tests.integration.training.test_run import at, recipe, train
from tests.support.loops import train_corpus

TOKENS = {"a": 9000, "tiny": 28, "b": 6000}


def test_a_domain_of_less_than_a_row_gives_its_share_to_the_others(tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", TOKENS)
    changes = {"mixer": {"kind": "uniform"}, "train__steps": 4}
    refused = recipe(corpus, tmp_path, **changes)
    with pytest.raises(RecipeError, match=r"'tiny'.*do not fill one row.*data\.skip_empty: true"):
        preflight.preflight(refused, corpus, HERE)
    used = recipe(corpus, tmp_path, data__skip_empty=True, **changes)
    plan = preflight.preflight(used, corpus, HERE)
    assert [domain.read for domain in plan.domains] == [384, 0, 384]
    assert "tiny does not fill a row of 32 tokens: others take its share." in plan.notes
    assert train(used).step == 4
    assert tokens_read(at(tmp_path, used)) == {"a": 384, "tiny": 0, "b": 384}
    # As without the domain.
    without = train_corpus(tmp_path / "less", {"a": TOKENS["a"], "b": TOKENS["b"]})
    other = recipe(without, tmp_path / "other", **changes)
    assert train(other).step == 4
    assert tokens_read(at(tmp_path / "other", other)) == {"a": 384, "b": 384}


def tokens_read(run: RunDirectory) -> dict[str, int]:
    newest = newest_checkpoint(run.checkpoints)
    assert newest is not None
    return newest[1].tokens


@pytest.mark.parametrize(
    "mixer",
    [
        {"kind": "static", "weights": {"a": 0.5, "b": 0.5, "tiny": 0}},
        {"kind": "static", "weights": {"a": 0.5, "b": 0.5}},
        {"kind": "schedule", "pieces": [{"step": 0, "weights": {"a": 0.5, "b": 0.5}}]},
        {"kind": "epochs", "epochs": {"a": 1, "b": 1.5, "tiny": 0}},
    ],
    ids=["zero", "absent", "schedule", "epochs"],
)
@pytest.mark.parametrize("tokens", [28, 0])
def test_a_domain_without_a_share_may_be_empty(
    tmp_path: Path, mixer: dict[str, Any], tokens: int
) -> None:
    corpus = train_corpus(tmp_path / "corpus", TOKENS | {"tiny": tokens})
    used = recipe(corpus, tmp_path, mixer=mixer, train__steps=4)
    plan = preflight.preflight(used, corpus, HERE)
    assert "without a share, so never read: tiny." in plan.notes
    assert train(used).step == 4
    assert tokens_read(at(tmp_path, used)) == {"a": 384, "tiny": 0, "b": 384}


@pytest.mark.parametrize("kind", ["uniform", "proportional", "temperature", "unimax", "odm"])
def test_a_domain_with_a_share_may_not(tmp_path: Path, kind: str) -> None:
    corpus = train_corpus(tmp_path / "corpus", TOKENS | {"tiny": 0})
    used = recipe(corpus, tmp_path, mixer={"kind": kind})
    with pytest.raises(RecipeError, match=r"'tiny': the domain has no tokens\. Give it text or a"):
        preflight.preflight(used, corpus, HERE)


def test_documents_without_a_share_and_shares_asked_for_later(tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", {"a": 9000, "none": 0, "b": 6000})
    used = recipe(
        corpus,
        tmp_path,
        mixer={"kind": "static", "weights": {"a": 0.5, "b": 0.5}},
        data={"mode": "documents", "sequence_length": 32, "tokens_per_step": 200},
        train__steps=3,
    )
    assert train(used).step == 3
    read = tokens_read(at(tmp_path, used))
    assert read["none"] == 0
    assert abs(read["a"] - read["b"]) <= 64
    context = mixer_context(used, corpus, steps=3)
    state = build_mixture_state(used.mixer, context)
    with pytest.raises(RecipeError, match=r"weights\.none = 0\.1: the domain has no samples"):
        state.set_weights({"a": 0.5, "b": 0.4, "none": 0.1})


def test_a_loader_refuses_a_share_of_nothing(tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", TOKENS)
    options = {"sequence_length": 32, "rows_per_step": 6, "steps": 4}
    with pytest.raises(CorpusError, match=r"corpus\.tiny = 0\.333.*no samples.*share of 0"):
        next(iter(MixtureLoader.from_corpus(corpus.path, mixer="uniform", **options)))
    half = {"kind": "static", "weights": {"a": 0.5, "b": 0.5}}
    assert len(list(MixtureLoader.from_corpus(corpus.path, mixer=half, **options))) == 4


def test_epochs_say_how_long_the_run_would_be(tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", {"a": 9000, "b": 6000})
    mixer = {"kind": "epochs", "epochs": {"a": 0.5, "b": 1.5}}
    used = recipe(corpus, tmp_path, mixer=mixer, train__steps=10)
    plan = preflight.preflight(used, corpus, HERE)
    assert [domain.share for domain in plan.domains] == pytest.approx([1 / 3, 2 / 3])
    note = next(note for note in plan.notes if note.startswith("mixer.epochs take 13,500 tokens"))
    assert "train.tokens=13500 gives the epochs as written" in note
    exact = recipe(
        corpus, tmp_path, mixer=mixer, train={"tokens": 13500, "lr": 0.01, "checkpoint_every": 3}
    )
    plan = preflight.preflight(exact, corpus, HERE)
    assert [domain.epochs for domain in plan.domains] == pytest.approx([0.5, 1.5], rel=0.02)
    assert any("to 1 %" in note for note in plan.notes)


def test_gradients_cannot_be_measured_without_rows(tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", TOKENS)
    used = recipe(corpus, tmp_path, data__skip_empty=True, mixer={"kind": "pike"})
    with pytest.raises(RecipeError, match=r"'tiny': its \d+ tokens are less than two rows of 32"):
        preflight.preflight(used, corpus, HERE)
