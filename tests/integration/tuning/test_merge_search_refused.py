"""Searches of merges and specialists that cannot work: one message each, and nothing is begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.errors import RecipeError
from raymix.recipe import load_recipe
from raymix.store import Corpus
from tests.support.corpora import write_corpus
from tests.support.loops import VOCAB, train_corpus

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 6000, "b": 3000})


def recipe_of(folder: Path, corpus_path: str, /, **changes: Any) -> Path:
    document = {
        "name": "tiny",
        "corpus": {"path": corpus_path},
        "data": {"sequence_length": 32, "rows_per_step": 4},
        "model": {"type": "llama", "config": SIZES | HEADS},
        "train": {"steps": 4},
        "eval": {"rows_per_domain": 4},
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def models(folder: Path, vocabulary: int = VOCAB) -> None:
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **SIZES, **HEADS)
    for number, name in enumerate(("base", "one", "two")):
        torch.manual_seed(number)
        LlamaForCausalLM(config).save_pretrained(folder / name)


def merge_file(folder: Path, method: str = "drm", **changes: Any) -> Path:
    document = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "one"}, {"model": "two"}],
        **changes,
    }
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.stderr
    return "\n".join(json.loads(done.stdout)["problems"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    models(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--search", "scale"], "--eval = None: a search needs held-out text to choose by."),
        (["--eval", "r.yaml"], "--search = None: --eval and --trials are for a search."),
        (["--trials", "3"], "--search = None: --eval and --trials are for a search."),
        (
            ["--search", "scale", "--eval", "r.yaml", "--on", "ray", "--memory", "1"],
            "--on = 'ray': a search runs through Ray Tune already.",
        ),
        (["--search", "scale", "--eval", "r.yaml"], "recipe = 'r.yaml': no such file"),
    ],
)
def test_options_that_do_not_go_together(
    place: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    out = tmp_path / "out"
    assert says in refused("merge", str(merge_file(place)), "--out", str(out), *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "search", "says"),
    [
        ("drm", "scale,drpo", "no such option that can be searched. It has: scale, drop"),
        ("model_stock", "scale", "model_stock has no such option that can be searched."),
        ("drmm", "scale", "merge_method = 'drmm': not a merge method."),
    ],
)
def test_what_cannot_be_searched(
    place: Path, corpus: Corpus, tmp_path: Path, method: str, search: str, says: str
) -> None:
    recipe = recipe_of(tmp_path, corpus.path)
    out = tmp_path / "out"
    words = ["merge", str(merge_file(place, method)), "--search", search, "--eval", str(recipe)]
    assert says in refused(*words, "--out", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def search(place: Path, recipe: Path, out: Path, **changes: Any) -> str:
    words = ["merge", str(merge_file(place, **changes)), "--search", "scale", "--eval", str(recipe)]
    return refused(*words, "--out", str(out))


def test_a_recipe_without_held_out_text(place: Path, tmp_path: Path) -> None:
    import numpy as np

    tokens = np.arange(400, dtype=np.uint16) % VOCAB
    bare = write_corpus(
        tmp_path / "bare", {"a": (tokens, np.array([400]))}, block_tokens=64, vocab_size=VOCAB
    )
    said = search(place, recipe_of(tmp_path, bare.path), tmp_path / "out")
    assert "its corpus has no held-out text, so nothing can be chosen by it" in said
    assert not (tmp_path / "out-search").exists()


def test_too_little_held_out_text(place: Path, corpus: Corpus, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, corpus.path, eval={"rows_per_domain": 4000})
    said = search(place, recipe, tmp_path / "out")
    assert "leave no rows for the search after the first 4000 rows of 32" in said
    assert not (tmp_path / "out-search").exists()


def test_models_of_another_vocabulary(corpus: Corpus, tmp_path: Path) -> None:
    models(tmp_path, vocabulary=20)
    said = search(tmp_path, recipe_of(tmp_path, corpus.path), tmp_path / "out")
    assert "model.path" in said
    assert not (tmp_path / "out-search").exists()


def test_an_output_that_is_taken(place: Path, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    said = search(place, recipe_of(tmp_path, corpus.path), tmp_path / "out")
    assert "it exists, and nothing is overwritten" in said


def test_a_missing_model(place: Path, corpus: Corpus, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, corpus.path)
    said = search(place, recipe, tmp_path / "out", models=[{"model": "one"}, {"model": "three"}])
    assert "models.1.model" in said
    assert not (tmp_path / "out-search").exists()


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"domains": ["a"]}, "specialists.domains = ('a',): nothing to merge."),
        ({"methods": {"x": {"drop": 0.5}}}, "methods.x = {'drop': 0.5}: does not say `merge_met"),
        ({"finetune": {"mixer.kind": "pike"}}, "specialists.finetune.mixer.kind = 'pike': cannot"),
        ({"trials": 0}, "specialists.trials = 0: too small."),
    ],
)
def test_sections_that_cannot_work(
    corpus: Corpus, tmp_path: Path, section: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_of(tmp_path, corpus.path, specialists=section))
    assert says in str(caught.value)


def test_domains_that_there_are_not(tmp_path: Path) -> None:
    domains = [{"name": name, "train": "x.txt"} for name in ("chat", "code", "held")]
    changes = {
        "corpus": {"path": "here", "domains": domains},
        "mixer": {"kind": "uniform", "targets": ["held"]},
        "specialists": {"domains": ["chat", "cdoe", "held"]},
    }
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_of(tmp_path, "here", **changes))
    assert caught.value.problems == (
        "specialists.domains = 'cdoe': no domain of the corpus has this name. "
        "Did you mean 'code'? Known: chat, code, held.",
        "specialists.domains = 'held': a target is measured and never trained on. "
        "Leave it out of one of them.",
    )


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        (
            {"x": {"merge_method": "tyes"}},
            "specialists.methods.x: merge_method = 'tyes': not a merge method.",
        ),
        (
            {"x": {"merge_method": "ties", "density": 2.0}},
            "specialists.methods.x: parameters.density",
        ),
        (
            {"x": {"merge_method": "ties", "drop": 0.5}},
            "specialists.methods.x: parameters.drop = 0.5: no option of ties.",
        ),
    ],
)
def test_methods_that_there_are_not(
    corpus: Corpus, tmp_path: Path, methods: dict[str, Any], says: str
) -> None:
    section = {"domains": ["a", "b"], "methods": methods}
    recipe = recipe_of(tmp_path, corpus.path, specialists=section)
    assert says in refused("specialists", str(recipe), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_fine_tuning_that_cannot_work(corpus: Corpus, tmp_path: Path) -> None:
    section = {"domains": ["a", "b"], "finetune": {"train.stesp": 4}}
    recipe = recipe_of(tmp_path, corpus.path, specialists=section)
    said = refused("specialists", str(recipe), "--out", str(tmp_path / "out"))
    assert "specialists.finetune: train.stesp = 4: unknown key." in said
    section = {"domains": ["a", "b"], "finetune": {"data.max_epochs": 0.01}}
    recipe = recipe_of(tmp_path, corpus.path, specialists=section)
    said = refused("specialists", str(recipe), "--out", str(tmp_path / "out"))
    assert "specialist-a" in said
    assert not (tmp_path / "out").exists()
