"""Plans read the measurements of a model from a cache: the same plan, without importing torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raymix._utils.result_cache import cached
from raymix.errors import RecipeError
from raymix.recipe import load_recipe
from raymix.store import Corpus
from raymix.training.host.machine import Resources
from raymix.training.plan.preflight import preflight
from tests.support.corpora import labeled_domain, write_corpus
from tests.support.recipes import write

HERE = Resources(where="this machine", cpus=2, gpus=0, memory_bytes=8 * 10**9,
                 object_store_bytes=10**9)  # fmt: skip
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    domains = {name: labeled_domain(at, 9000) for at, name in enumerate(("a", "b"))}
    return write_corpus(tmp_path_factory.mktemp("corpus"), domains, block_tokens=1024)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "raymix"


def recipe_file(directory: Path, corpus: Corpus, **changes: Any) -> Path:
    document = {
        "name": "planned",
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 64, "rows_per_step": 8},
        "model": {"config": TINY},
        "train": {"steps": 20},
        "cluster": {"workers": 0},
        "run": {"dir": str(directory / "runs" / "{name}")},
    }
    return write(directory / "my.yaml", document | changes)


def planned(path: Path, corpus: Corpus, *overrides: str) -> dict[str, Any]:
    document = preflight(load_recipe(path, overrides), corpus, HERE).document()
    # The only figure that other processes change.
    document.pop("disk_free_bytes", None)
    return document


def test_the_second_plan_is_the_same_and_imports_no_torch(
    corpus: Corpus, cache: Path, tmp_path: Path
) -> None:
    path = recipe_file(tmp_path, corpus)
    script = """
import json, sys
from raymix.training.plan.preflight import plan_run
from raymix.recipe import load_recipe
plan = plan_run(load_recipe(sys.argv[1]))
print(json.dumps([plan.parameters, [part.bytes for part in plan.worker_memory], list(plan.notes)]))
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    first, second = (
        subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for _ in range(2)
    )
    assert first[-1] == "True True"
    assert second == [first[0], "False False"]


def test_other_models_are_measured_again(corpus: Corpus, cache: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, corpus)
    first = planned(path, corpus)
    files = set(cache.iterdir())
    for same in ("train.lr=0.001", "train.steps=40", "seed=3", "train.schedule=wsd"):
        planned(path, corpus, same)
    assert set(cache.iterdir()) == files
    wide = planned(path, corpus, "model.config.hidden_size=64")
    assert wide["parameters"] > first["parameters"]
    long = planned(path, corpus, "data.sequence_length=128")
    assert long["worker_memory_bytes"]["activations"] > first["worker_memory_bytes"]["activations"]
    assert set(cache.iterdir()) > files


def test_a_checkpoint_that_changed_is_measured_again(
    corpus: Corpus, cache: Path, tmp_path: Path
) -> None:
    config = {"model_type": "llama", "vocab_size": 65_536, "architectures": ["LlamaForCausalLM"]}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    path = recipe_file(tmp_path, corpus, model={"kind": "pretrained", "path": str(checkpoint)})
    counts = []
    for layers in (2, 3):
        document = config | TINY | {"num_hidden_layers": layers}
        (checkpoint / "config.json").write_text(json.dumps(document))
        counts.append(planned(path, corpus)["parameters"])
    assert counts[0] < counts[1]


def test_errors_are_not_stored(corpus: Corpus, cache: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, corpus, model={"config": TINY | {"hidden_sise": 3}})
    for _ in range(2):
        with pytest.raises(RecipeError, match="hidden_sise"):
            planned(path, corpus)
    assert not cache.exists()


@dataclass
class Answer:
    number: int


def test_files_that_cannot_be_used_only_cost_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def compute() -> Answer:
        asked.append(1)
        return Answer(len(asked))

    # A file is where the directory would be.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [cached(["question"], compute, Answer).number for _ in range(2)] == [1, 2]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [cached(["question"], compute, Answer).number for _ in range(2)] == [3, 3]
    (stored,) = (tmp_path / "raymix").iterdir()
    for damaged in (b"", b'{"number": "three"}', b"\xff", b"{}"):
        stored.write_bytes(damaged)
        assert cached(["question"], compute, Answer).number == len(asked)
    assert len(asked) == 7
    assert cached(["another"], compute, Answer).number == 8


def test_the_cache_does_not_grow_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for number in range(510):
        cached([str(number)], lambda at=number: Answer(at), Answer)
    assert len(list((tmp_path / "raymix").iterdir())) == 500
