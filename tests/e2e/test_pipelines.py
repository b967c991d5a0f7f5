"""The recipes and the corpus that are shipped: they load, they fit, they may be passed on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raymix.mixers import Adaptive, MixerContext, build_mixer
from raymix.recipe import load_recipe
from raymix.training.host.machine import Resources
from raymix.training.plan.preflight import preflight
from tests.support.paths import PIPELINES

QUICKSTART = PIPELINES / "quickstart"
RECIPES = sorted(PIPELINES.glob("*.yaml"))
EMAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")


def provenance() -> list[dict[str, object]]:
    return json.loads((QUICKSTART / "provenance.json").read_text())["sources"]


def parquet(split: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted((QUICKSTART / split).glob("*.parquet"))}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_find_their_files(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for domain in recipe.corpus.domains:
        for pattern in (*domain.train, *domain.valid):
            assert Path(pattern).is_file()


def test_every_recipe_says_what_to_expect() -> None:
    text = (PIPELINES / "README.md").read_text()
    for path in RECIPES:
        assert f"`{path.name}`" in text


def test_the_demo_is_the_one_the_issue_asks_for() -> None:
    recipe = load_recipe(PIPELINES / "quickstart.yaml")
    assert len(recipe.corpus.domains) >= 8
    assert {domain.name for domain in recipe.corpus.domains} == set(parquet("train"))
    assert recipe.cluster.workers == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_works_on_two_cores_before_its_corpus_is_prepared(path: Path) -> None:
    has = Resources(where="here", cpus=2, gpus=0, memory_bytes=8 << 30, object_store_bytes=1 << 30)
    plan = preflight(load_recipe(path), None, has)
    assert plan.estimated
    assert sum(domain.share for domain in plan.domains) == pytest.approx(1)
    assert {plan.corpus_path} == {load_recipe(recipe).corpus.path for recipe in RECIPES}


@pytest.mark.parametrize(
    ("name", "tau", "targets"), [("pike", 0, ()), ("balanced", 3, ()), ("dga", None, ("techdoc",))]
)
def test_recipes_that_learn_read_all_domains_but_the_target(
    name: str, tau: float | None, targets: tuple[str, ...]
) -> None:
    recipe = load_recipe(PIPELINES / f"{name}.yaml")
    assert getattr(recipe.mixer, "tau", None) == tau
    assert recipe.mixer.targets == targets
    context = MixerContext(
        domains=tuple(domain.name for domain in recipe.corpus.domains),
        tokens_D=np.full(len(recipe.corpus.domains), 10**6),
        total_tokens=10**6,
        total_steps=recipe.train.steps or 0,
    )
    mixer = build_mixer(recipe.mixer, context)
    assert isinstance(mixer, Adaptive)
    read = {n for n, share in zip(context.domains, mixer.initial, strict=True) if share > 0}
    assert read == set(parquet("train")) - set(targets)
    # The first window's statistics tell from the third on: most windows must lie behind that.
    assert (recipe.train.steps or 0) >= 10 * recipe.train.probe_interval


def test_the_corpus_is_small() -> None:
    size = sum(path.stat().st_size for path in QUICKSTART.rglob("*") if path.is_file())
    assert size <= 6_000_000


def test_every_source_has_its_licence_and_origin() -> None:
    readme = (QUICKSTART / "README.md").read_text()
    assert {str(source["domain"]) for source in provenance()} == set(parquet("train"))
    for source in provenance():
        assert (QUICKSTART / str(source["licence_file"])).stat().st_size > 500
        assert re.fullmatch(r"[0-9a-f]{64}", str(source["archive_sha256"]))
        for key in ("package", "version", "licence_file", "archive_sha256"):
            assert str(source[key]) in readme


def test_all_documents_come_from_the_sources_told() -> None:
    expected = {
        (str(s["domain"]), str(s["package"])): (s["documents"], s["bytes"]) for s in provenance()
    }
    counted: dict[tuple[str, str], tuple[int, int]] = {}
    for split in ("train", "valid"):
        for path in parquet(split).values():
            for row in pq.read_table(path).to_pylist():
                domain, package = row["id"].split("/")[:2]
                documents, size = counted.get((domain, package), (0, 0))
                counted[domain, package] = documents + 1, size + len(row["text"].encode())
    assert counted == expected


@pytest.mark.parametrize("split", ["train", "valid"])
def test_texts_hold_no_addresses_and_no_document_is_in_both_splits(split: str) -> None:
    other = "valid" if split == "train" else "train"
    for name, path in parquet(split).items():
        table = pq.read_table(path)
        assert table.column_names == ["id", "text"]
        assert not set(table["id"].to_pylist()) & set(
            pq.read_table(parquet(other)[name])["id"].to_pylist()
        )
        for text in table["text"].to_pylist():
            assert not EMAIL.search(text), f"{split}/{name}: {EMAIL.search(text)}"
