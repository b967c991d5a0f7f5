"""Bad input to a merge: one error each that names what is wrong, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.errors import MergeError
from raymix.merging.run.engine import merge
from tests.support.merging import (
    DOWN,
    NORM,
    Q_PROJ,
    read_model,
    weights,
    write_adapter,
    write_family,
    write_model,
)

VOCABULARY = {"a": 0, "b": 1, "ab": 2}


def refused(family: dict[str, Any], out: Path, **more: Any) -> str:
    """Return the one message of a merge that must leave nothing behind."""
    before = sorted(out.parent.iterdir())
    document = {"merge_method": "drm", **family, **more}
    with pytest.raises(MergeError) as caught:
        merge(document, out)
    assert sorted(out.parent.iterdir()) == before
    assert len(caught.value.problems) == 1, caught.value.problems
    return str(caught.value)


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    return write_family(tmp_path, tasks=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", ["base", "m2"])
def test_values_that_are_not_finite(
    bad: float, model: str, family: dict[str, Any], tmp_path: Path
) -> None:
    tensors = weights(0 if model == "base" else 2)
    tensors[DOWN][3, 5] = bad
    write_model(tmp_path / model, tensors)
    message = refused(family, tmp_path / "out")
    field = "base_model" if model == "base" else "models.1.model"
    assert message.startswith(f"{field} = {str(tmp_path / model)!r}: tensor {DOWN!r} holds ")
    assert ("NaN" if bad != bad else "Inf") in message


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = weights(2)
        change(tensors)
        write_model(folder, tensors)

    return apply


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 4)


def _index(**weight_map: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        names = dict.fromkeys(weights(2), "part.safetensors")
        text = json.dumps({"weight_map": {**names, **weight_map}})
        (folder / "model.safetensors.index.json").write_text(text)

    return apply


def _config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        write_model(folder, weights(2), config=changes)

    return apply


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _fp8(folder: Path) -> None:
    write_model(folder, {**weights(2), NORM: weights(2)[NORM].to(torch.float8_e4m3fn)})


VOCAB = {"model.embed_tokens.weight": torch.zeros(41, 16)}

SPOILED = {
    "missing": (edit(lambda t: t.pop(Q_PROJ)), f"lacks {Q_PROJ!r}, compared to"),
    "extra": (edit(lambda t: t.update(more=t[NORM].clone())), "also has 'more'"),
    "untied": (edit(lambda t: t.pop("lm_head.weight")), "ties its embeddings"),
    "shape": (
        edit(lambda t: t.update({Q_PROJ: torch.zeros(16, 8)})),
        r"is \[16, 8\] here and \[16, 16\] in",
    ),
    "vocabulary": (edit(lambda t: t.update(VOCAB)), "vocabularies differ: resize"),
    "truncated": (_truncate, "not a complete safetensors file"),
    "no header": (_no_header, "not a complete safetensors file"),
    "outside": (_index(more="../base/model.safetensors"), "outside the model's directory"),
    "absolute": (_index(more="/etc/passwd"), "outside the model's directory"),
    "absent file": (_index(more="gone.safetensors"), "no such file"),
    "absent tensor": (_index(more="part.safetensors"), "the index file puts 'more' in part"),
    "no weights": (_remove("model.safetensors"), "holds neither model.safetensors nor"),
    "no config": (_remove("config.json"), "there is no config.json"),
    "bad config": (_bad_config, "cannot be read"),
    "other kind": (_config(model_type="gpt2"), "its config says model_type 'gpt2'"),
    "other heads": (_config(num_attention_heads=8), "its config says num_attention_heads 8"),
    "quantized": (_fp8, "cannot be merged. Dequantize"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_checkpoints_that_cannot_be_merged(
    fault: str, family: dict[str, Any], tmp_path: Path
) -> None:
    spoil, words = SPOILED[fault]
    spoil(tmp_path / "m2")
    with pytest.raises(MergeError, match=words):
        raise MergeError(refused(family, tmp_path / "out"))


def test_tokenizers_that_differ(tmp_path: Path) -> None:
    family = write_family(tmp_path, tasks=2, vocabulary=VOCABULARY)
    merge({"merge_method": "linear", **family}, tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer.json").exists()
    other = {**VOCABULARY, "ab": 3}
    write_model(tmp_path / "m2", weights(2), vocabulary=other)
    message = refused(family, tmp_path / "out")
    assert "token 'ab' has id 3 here and 2 there" in message
    write_model(tmp_path / "m2", weights(2), vocabulary={**VOCABULARY, "more": 3})
    assert "1 more tokens, such as 'more'" in refused(family, tmp_path / "out")
    merge({"merge_method": "drm", "check_tokenizer": False, **family}, tmp_path / "anyway")
    source = refused(family, tmp_path / "out", tokenizer_source="union", check_tokenizer=False)
    assert "Vocabularies are not united" in source


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def test_pickles_are_refused_unless_asked_for(family: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "m2" / "model.safetensors").unlink()
    torch.save(weights(2), tmp_path / "m2" / "pytorch_model.bin")
    assert "can run code when they are loaded" in refused(family, tmp_path / "out")
    merge({"merge_method": "task_arithmetic", **family, "allow_pickle": True}, tmp_path / "out")
    assert not read_model(tmp_path / "out")[DOWN].equal(weights(0)[DOWN])
    with (tmp_path / "m2" / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": _Evil()}, file)
    message = refused(family, tmp_path / "other", allow_pickle=True)
    assert "rejected by torch's weights_only loader" in message


def test_values_that_do_not_fit_the_output(family: dict[str, Any], tmp_path: Path) -> None:
    message = refused(
        family, tmp_path / "out", merge_method="task_arithmetic", out_dtype="float16",
        parameters={"lambda": 1e7},
    )  # fmt: skip
    assert "do not fit float16" in message


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"merge_method": "drmm"}, "Did you mean 'drm'"),
    "option": ({"parameters": {"dorp": 0.5}}, "parameters.dorp = 0.5: no option of drm"),
    "value": ({"parameters": {"drop": 1.5}}, r"parameters\.drop = 1.5: too large"),
    "direction": ({"parameters": {"direction": "sideways"}}, "'horizontal'"),
    "key": ({"mode": 1}, "mode = 1"),
    "rule": ({"rules": [{"match": "("}]}, "not a regular expression"),
    "layers": ({"rules": [{"layers": ["first"]}]}, "not a layer number"),
    "rule method": ({"rules": [{"merge_method": "tie"}]}, r"rules\.0\.merge_method = 'tie'"),
    "no base": ({"base_model": None}, "drm needs the model that the others were fine-tuned from"),
    "few": ({"merge_method": "model_stock", "models": 1}, "merges at least 2 models"),
    "many": ({"merge_method": "slerp"}, "at most 1 models"),
    "none": ({"models": 0}, "no models to merge"),
    "modules": ({"modules": {}}, "List the models under `models`"),
    "zero weights": (
        {"merge_method": "linear", "parameters": {"weight": 0}},
        "the weights sum to 0",
    ),
    "epsilon": (
        {"merge_method": "della", "parameters": {"density": 0.1}},
        "must lie between 0 and 1",
    ),
    "conditions": ({"parameters": {"drop": [{"filtre": "q"}]}}, "not of the form"),
    "randomized": ({"parameters": {"decomposition": "randomized"}}, "needs a rank"),
}


@pytest.mark.parametrize("fault", FILES)
def test_merge_files_that_cannot_work(fault: str, family: dict[str, Any], tmp_path: Path) -> None:
    changes, words = FILES[fault]
    if isinstance(changes.get("models"), int):
        changes = {**changes, "models": family["models"][: changes["models"]]}
    with pytest.raises(MergeError, match=words):
        raise MergeError(refused(family, tmp_path / "out", **changes))


def test_a_model_that_is_not_there(family: dict[str, Any], tmp_path: Path) -> None:
    family["models"][1]["model"] = str(tmp_path / "m22")
    assert "Did you mean 'm2'?" in refused(family, tmp_path / "out")
    family["models"][1]["model"] = "owner/name"
    message = refused(family, tmp_path / "out")
    assert "models.1.model = 'owner/name': no such directory" in message
    assert "hf download owner/name" in message
    family["models"][1]["model"] = str(tmp_path / "m1")
    assert "listed twice" in refused(family, tmp_path / "out")


def test_nothing_is_overwritten(family: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "nothing is overwritten" in refused(family, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


FACTORS = {"model.layers.0.self_attn.q_proj": (torch.zeros(16, 2), torch.zeros(2, 16))}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "its use_dora is True"),
        ({"bias": "all"}, "its bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "its modules_to_save is"),
        ({"peft_type": "IA3"}, "an adapter of type IA3"),
        ({"base": "other"}, "trained on different bases"),
    ],
)
def test_adapters_that_cannot_be_merged(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", FACTORS)
    write_adapter(tmp_path / "b", FACTORS, **config)
    models = [{"model": str(tmp_path / name)} for name in ("a", "b")]
    assert words in refused({"models": models}, tmp_path / "out")


def test_an_adapter_without_weights(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", FACTORS)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    message = refused({"models": [{"model": str(tmp_path / "a")}]}, tmp_path / "out")
    assert "holds no adapter_model.safetensors" in message


def test_entry_wise_methods_give_no_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", FACTORS)
    models = [{"model": str(tmp_path / "a")}]
    message = refused({"models": models}, tmp_path / "out", merge_method="ties")
    assert "its result has no low rank" in message


def test_an_adapter_for_another_base(family: dict[str, Any], tmp_path: Path) -> None:
    wide = {"model.layers.0.self_attn.q_proj": (torch.zeros(32, 2), torch.zeros(2, 16))}
    write_adapter(tmp_path / "a", wide)
    family["models"][1]["model"] = str(tmp_path / "a")
    assert "which the base has in shape (16, 16)" in refused(family, tmp_path / "out")


def test_the_command_line_says_it_in_one_document(family: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(json.dumps({"merge_method": "drm", **family}))
    options = ["--json", "--no-plot", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["merge", str(file), "parameters.drop=2", *options])
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert document["error"] == "MergeError"
    assert document["problems"][0].startswith("parameters.drop = 2: too large")
    result = CliRunner().invoke(app, ["merge", str(file), "parameters.drop=0.5", *options])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert {"out", "method", "tensors", "seconds", "peak_bytes"} <= set(document)
    assert document["out"] == str(tmp_path / "out")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for text, words in (("- a", "not a mapping"), ("a: [", "not valid YAML")):
        (tmp_path / "merge.yaml").write_text(text)
        with pytest.raises(MergeError, match=words):
            merge(tmp_path / "merge.yaml", tmp_path / "out")
    with pytest.raises(MergeError, match="no such file"):
        merge(tmp_path / "gone.yaml", tmp_path / "out")
