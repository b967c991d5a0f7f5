"""Every command on real input, from a recipe to an exported model, as a new user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.shell import DOMAINS, Shell, write_recipe

TRAINED = ("name=commands", "cluster.workers=0", "train.steps=30")


@pytest.fixture(scope="module")
def trained(shell: Shell) -> dict[str, object]:
    return shell.json("train", "tiny.yaml", *TRAINED)


def test_train_reports_every_domain(trained: dict[str, object]) -> None:
    assert trained["steps"] == 30
    assert trained["tokens"] == 30 * 8 * 128
    domains = trained["domains"]
    assert isinstance(domains, dict)
    assert set(domains) == set(DOMAINS)
    for row in domains.values():
        assert row["share_realised"] == pytest.approx(row["share_asked"], abs=2 / (30 * 8))
        assert row["loss_last"] < row["loss_first"]
        assert row["bits_per_byte"] > 0
        assert row["unigram_entropy"] > 0


def test_the_run_directory_is_whole(shell: Shell, trained: dict[str, object]) -> None:
    run = shell.cwd / str(trained["run"])
    for name in ("recipe.yaml", "resolved.yaml", "mixture_log.jsonl", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0, name
    report = (run / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    json.loads((run / "report.json").read_text())


def test_eval_agrees_with_the_last_evaluation(shell: Shell, trained: dict[str, object]) -> None:
    table = shell.json("eval", str(trained["run"]))
    domains = trained["domains"]
    assert isinstance(domains, dict)
    for name, row in table["domains"].items():
        assert row["loss"] == pytest.approx(domains[name]["loss_last"], abs=1e-5)


def test_export_loads_in_transformers(shell: Shell, trained: dict[str, object]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shell.ok("export", str(trained["run"]), "exported")
    out = shell.cwd / "exported"
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("Permission is hereby granted, free of charge", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
    # The rows it was trained on, not the 1e30 of a tokenizer without a limit.
    assert tokenizer.model_max_length == 128
    card = (out / "README.md").read_text()
    assert card.startswith("---")
    assert str(shell.cwd) not in card
    again = shell.run("export", str(trained["run"]), "exported")
    assert again.returncode == 2


def test_a_finished_run_is_left_alone(shell: Shell, trained: dict[str, object]) -> None:
    metrics = shell.cwd / str(trained["run"]) / "metrics.jsonl"
    before = metrics.read_bytes()
    shell.ok("train", "tiny.yaml", *TRAINED)
    assert metrics.read_bytes() == before


def test_changed_corpus_is_refused(shell: Shell, trained: dict[str, object]) -> None:
    shutil.copytree(shell.cwd / str(trained["run"]), shell.cwd / "runs" / "moved")
    shutil.copytree(shell.cwd / "corpus", shell.cwd / "corpus-changed")
    manifest = shell.cwd / "corpus-changed" / "manifest.json"
    text = manifest.read_text()
    fingerprint = text.split('"fingerprint": "', 1)[1].split('"', 1)[0]
    manifest.write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    moved = ("name=moved", "corpus.path=corpus-changed")
    done = shell.run("train", "tiny.yaml", *TRAINED, *moved)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_plan_says_what_train_did(shell: Shell, trained: dict[str, object]) -> None:
    plan = shell.json("plan", "tiny.yaml", "train.steps=30")
    assert plan["steps"] == trained["steps"]
    assert plan["tokens"] == trained["tokens"]
    assert sum(row["share"] for row in plan["domains"].values()) == pytest.approx(1)
    assert plan["memory_bytes"] > 0


def test_prepare_twice_does_nothing(shell: Shell) -> None:
    manifest = shell.cwd / "corpus" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    shell.ok("prepare", "tiny.yaml")
    assert manifest.stat().st_mtime_ns == before


def test_documents_mode_trains(shell: Shell) -> None:
    document = write_recipe(
        shell.cwd / "documents.yaml",
        name="documents",
        data={"mode": "documents", "sequence_length": 256, "tokens_per_step": 2048},
        train__steps=12,
        cluster__workers=0,
    )
    result = shell.json("train", document.name)
    assert result["steps"] == 12
    for row in result["domains"].values():
        assert row["share_realised"] == pytest.approx(row["share_asked"], abs=0.06)


def test_init_gives_a_recipe_that_validates(shell: Shell) -> None:
    shell.ok("init", "fresh.yaml")
    shell.ok("validate", "fresh.yaml")
    assert shell.run("init", "fresh.yaml").returncode == 2


def test_schema_and_doctor_speak_json(shell: Shell) -> None:
    assert "properties" in json.loads(shell.ok("schema").stdout)
    assert isinstance(shell.json("doctor"), dict)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_other_model_types_train(kind: str, shell: Shell) -> None:
    sizes: dict[str, object] = (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
        if kind == "gpt2"
        else {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    )
    path = write_recipe(
        Path(shell.cwd) / f"{kind}.yaml",
        name=kind,
        model={"type": kind, "config": sizes},
        train__steps=8,
        cluster__workers=0,
    )
    result = shell.json("train", path.name)
    assert all(row["loss_last"] < row["loss_first"] for row in result["domains"].values())
