"""Models, tokenizers and data of the Hugging Face Hub: the real client against a local server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save

from raymix.corpus.tokenizers.tokenizer import byte_tokenizer
from tests.support.hub_server import Hub, serving
from tests.support.shell import Shell, steps_of, typed

RECIPE: dict[str, Any] = {
    "name": "r",
    "corpus": {
        "path": "corpus",
        "tokenizer": "tiny-bytes",
        "domains": [
            {"name": "a", "train": "hf://datasets/some/texts/data/a.parquet"},
            {"name": "b", "train": "hf://datasets/some/texts/data/b*.parquet"},
        ],
    },
    "data": {"sequence_length": 64, "rows_per_step": 4},
    "model": {"kind": "pretrained", "path": "tiny/llama"},
    "train": {"steps": 2},
    "cluster": {"workers": 0},
    "eval": {"rows_per_domain": 2},
}


def llama(seed: int) -> dict[str, bytes]:
    """Return the files of a llama of one layer, made without the library that will read it."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 257,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 256,
    }
    layer = {f"self_attn.{name}_proj": (16, 16) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32)}
    layer |= {"input_layernorm": (16,), "post_attention_layernorm": (16,)}
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (257, 16), "lm_head.weight": (257, 16)}
    shapes |= {"model.norm.weight": (16,)}
    draw = np.random.default_rng(seed)
    tensors = {
        name: draw.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()
    }
    weights = save(tensors, metadata={"format": "pt"})
    return {"config.json": json.dumps(config).encode(), "model.safetensors": weights}


def publish(hub: Hub, scratch: Path) -> None:
    """Put a model, a gated one, a tokenizer and a dataset on the server."""
    for seed, name in enumerate(("tiny/llama", "tiny/gated")):
        for file, content in llama(seed).items():
            hub.put(name, file, content)
        hub.put(name, "onnx/model.safetensors", b"never downloaded")
    hub.gated.add("tiny/gated")
    hub.put("tiny-bytes", "tokenizer.json", byte_tokenizer().to_str().encode())
    hub.put("tiny-bytes", "tokenizer_config.json", b'{"eos_token": "<|endoftext|>"}')
    for name in "ab":
        texts = [f"{name} {number} the quick brown fox and the lazy dog" for number in range(400)]
        pq.write_table(pa.table({"text": texts}), scratch / "t.parquet")
        content = (scratch / "t.parquet").read_bytes()
        hub.put("some/texts", f"data/{name}.parquet", content, kind="datasets")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as running:
        publish(running, tmp_path_factory.mktemp("scratch"))
        yield running


def check(shell: Shell, lines: list[tuple[str, int, list[str]]]) -> None:
    """Type lines into one process, and assert the exit code and words of each."""
    outputs = typed(shell, [(line, code) for line, code, _ in lines])
    for (line, code, said), (_, _, expected) in zip(outputs, lines, strict=True):
        assert f"exit {code}" in said, f"{line}\n{said}"
        assert "Traceback" not in said, said
        for words in expected:
            assert words in said, f"{line}\n{words}\n{said}"


def test_names_of_the_hub_online_and_then_from_the_cache_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    home = tmp_path / "home"
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    online = Shell(tmp_path, env={**environment, "HF_ENDPOINT": hub.url})
    first, data = hub.commit("tiny/llama"), hub.commit("some/texts", "datasets")
    byte = "corpus.tokenizer=byte"
    check(
        online,
        [
            ("plan r.yaml", 0, [f"model: tiny/llama of the Hub, commit {first}"]),
            (f"plan r.yaml {byte} model.path=no/such", 2, ["model.path = 'no/such': no such dir"]),
            (f"plan r.yaml {byte} model.revision=v9", 2, ["tiny/llama has no revision 'v9'"]),
            (f"plan r.yaml {byte} model.path=tiny/gated", 2, ["gated", "HF_TOKEN"]),
            ("plan r.yaml corpus.tokenizer=no/such", 2, ["corpus.tokenizer = 'no/such': no such"]),
            (
                "plan r.yaml corpus.domains.0.train=hf://datasets/no/such/x.parquet",
                2,
                ["corpus.domains.0.train = 'hf://datasets/no/such/x.parquet': ", "hf auth login"],
            ),
            ("train r.yaml --no-report", 0, [f"commit {first}", "step 2/2"]),
        ],
    )
    weights = f"GET /tiny/llama/resolve/{first}/model.safetensors"
    # Once, and not by a plan, which needs the configuration alone; the last plan asks for no/such.
    assert hub.requests.count(weights) == 1
    assert hub.requests.index(weights) > hub.requests.index("GET /api/datasets/no/such")
    assert "onnx" not in str([request for request in hub.requests if "/resolve/" in request])
    run = tmp_path / "runs" / "r"
    resolved = yaml.safe_load((run / "resolved.yaml").read_text())
    assert resolved["model"]["commit"] == first
    prepared = json.loads((tmp_path / "corpus" / "prepare.json").read_text())
    assert f"@{data}/" in str(prepared["sources"]["a"]["train"])
    assert len(prepared["config"]["tokenizer"]["revision"]) == 40

    # A newer commit in the cache is for new runs: this one keeps its own, without a network.
    cache = home / "hub" / "models--tiny--llama"
    (cache / "snapshots" / ("f" * 40)).mkdir()
    for file in (cache / "snapshots" / first).iterdir():
        os.link(file.resolve(), cache / "snapshots" / ("f" * 40) / file.name)
    (cache / "refs" / "main").write_text("f" * 40)
    merge = {"merge_method": "linear", "models": [{"model": f"tiny/llama@{first}"}]}
    merge["models"].append({"model": "tiny/llama"})
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(merge))
    (tmp_path / "tiny" / "here").mkdir(parents=True)
    offline = Shell(tmp_path, env={**environment, "HF_HUB_OFFLINE": "1"})
    missing = ["hf download tiny/gone", str(home / "hub"), "HF_HUB_OFFLINE"]
    check(
        offline,
        [
            ("train r.yaml --no-report", 0, ["is finished"]),
            ("train r.yaml --no-report name=new", 0, [f"commit {'f' * 40}", "step 2/2"]),
            ("export runs/r exported", 0, []),
            ("merge merge.yaml --out merged", 0, []),
            ("plan r.yaml model.path=tiny/gone", 2, ["model.path = 'tiny/gone'", *missing]),
            (
                "plan r.yaml model.path=tiny/here",
                2,
                ["tiny/here is used, not tiny/here of the Hub"],
            ),
            (
                "plan r.yaml corpus.path=c2",
                2,
                ["corpus.domains.0.train = 'hf://", "hf download some/texts --repo-type dataset"],
            ),
            ("merge merge.yaml models.1.model=tiny/gone --out no", 2, ["models.1.model", *missing]),
        ],
    )
    assert not (tmp_path / "no").exists()
    assert [len(steps_of(tmp_path / "runs" / name)) for name in ("r", "new")] == [2, 2]
    for card, names in {
        "exported": ["tiny/llama", first],
        "merged": [f"tiny/llama@{first}"],
    }.items():
        text = (tmp_path / card / "README.md").read_text()
        assert str(tmp_path) not in text
        assert all(name in text for name in names), text
    # The model that was trained on from takes 512 positions, whatever the rows were.
    configuration = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    assert configuration["model_max_length"] == 512
