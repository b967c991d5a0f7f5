"""Domains that do not fill a row: refused, or left out where the recipe says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymix.errors import RecipeError
from raymix.training.plan import preflight
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


def test_gradients_cannot_be_measured_without_rows(tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", TOKENS)
    used = recipe(corpus, tmp_path, data__skip_empty=True, mixer={"kind": "pike"})
    with pytest.raises(RecipeError, match=r"'tiny': its \d+ tokens are less than two rows of 32"):
        preflight.preflight(used, corpus, HERE)
