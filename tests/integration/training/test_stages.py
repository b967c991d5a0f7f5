"""Lines for the stages before the first step, where no terminal shows a live line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raymix.cli.train import command
from tests.integration.training.test_run import recipe
from tests.support.loops import train_corpus
from tests.support.recipes import write


@pytest.mark.parametrize("json", [False, True])
def test_a_line_per_stage_on_stderr_but_not_beside_json(
    json: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A policy of the user's own: the command then sets nothing for this whole process.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    corpus = train_corpus(tmp_path / "corpus", {"a": 3000, "b": 2000, "c": 1500})
    used = recipe(corpus, tmp_path, train={"steps": 2}, eval={"rows_per_domain": 1})
    path = write(tmp_path / "r.yaml", used.model_dump(mode="json"))
    command(str(path), report=False, json=json)
    stages = re.findall(r"^ *(\d+\.\d) s  (.+)$", capfd.readouterr().err, flags=re.MULTILINE)
    if json:
        assert stages == []
        return
    assert [name for _, name in stages] == [
        "reading the recipe",
        "checking recipe, corpus and machine",
        "building the model",
        "scoring held-out text",
        "reading the first batch",
    ]
    assert sorted(float(seconds) for seconds, _ in stages) == [float(s) for s, _ in stages]
