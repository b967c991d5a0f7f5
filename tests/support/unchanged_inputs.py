"""Seeded inputs of `unchanged`: recipes, conversations, a mixture table, model families.

Nothing here imports raymix, so that the inputs cannot change with the code under test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

_QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart"
DOMAINS = ("german", "russian", "japanese", "math")

TRAIN = {
    "steps": 20,
    "lr": 3e-3,
    "checkpoint_every": 10,
    "probe_interval": 4,
    "probe": {"rows": 2},
}
# Bandits and power laws leave the shares alone in their first windows.
MANY_WINDOWS = TRAIN | {"steps": 36, "probe_interval": 2}

SHARES = {"german": 0.4, "russian": 0.3, "japanese": 0.1, "math": 0.2}
PACKED = {"sequence_length": 128, "rows_per_step": 8}
DOCUMENTS = {"mode": "documents", "sequence_length": 512, "tokens_per_step": 2048, "max_epochs": 2}
STATIC = {"kind": "static", "weights": SHARES}
PIKE = {"kind": "pike", "form": "full", "tau": 1.0, "zeta_1": 0.3, "max_log_change": 0.5}

# Run by the command line, with two workers and in one process.
RUNS: dict[str, dict[str, Any]] = {
    "packed": {"data": PACKED, "mixer": {"kind": "temperature", "temperature": 2}},
    "documents": {"data": DOCUMENTS, "mixer": STATIC},
    "pike": {"data": PACKED, "mixer": PIKE},
}

# Run in one process one after the other: no mixer kind is left out.
MIXERS: dict[str, dict[str, Any]] = {
    "static": STATIC,
    "uniform": {"kind": "uniform"},
    "proportional": {"kind": "proportional"},
    "unimax": {"kind": "unimax", "max_epochs": 1},
    "importance": {"kind": "importance", "targets": ["german"]},
    "schedule": {
        "kind": "schedule",
        "interpolate": "linear",
        "pieces": [
            {"step": 0, "weights": SHARES},
            {"step": 15, "weights": {"german": 0.1, "math": 0.9}},
        ],
    },
    "replay": {"kind": "replay", "log": "runs/pike-0/mixture_log.jsonl"},
    "pike-simplified": {"kind": "pike", "zeta_1": 0.3},
    "pike-exact-qp": {"kind": "pike", "form": "exact_qp"},
    "dga": {"kind": "dga", "targets": ["math"]},
    "dga-grape": {"kind": "dga", "targets": ["math", "japanese"], "several": "grape"},
    "doge": {"kind": "doge"},
    "rb": {"kind": "rb"},
    "doremi": {"kind": "doremi", "reference": dict.fromkeys(DOMAINS, 5.0)},
    "odm": {"kind": "odm"},
    "ado": {"kind": "ado", "fit_every": 1},
    "aioli": {"kind": "aioli"},
}


def recipe(name: str, *, workers: int = 0, **sections: Any) -> dict[str, Any]:
    """Return a recipe over four real domains whose steps take milliseconds."""
    document: dict[str, Any] = {
        "name": name,
        "seed": 7,
        "corpus": {
            "path": "corpora/bpe",
            "tokenizer": {"train": "bpe", "vocab_size": 512, "sample_bytes": 200_000},
            "domains": [
                {
                    "name": domain,
                    "train": f"sources/train/{domain}.parquet",
                    "valid": f"sources/valid/{domain}.parquet",
                }
                for domain in DOMAINS
            ],
        },
        "model": {
            "type": "llama",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        },
        "train": TRAIN,
        "eval": {"every": 10, "rows_per_domain": 2},
        # A fixed object store: the plan's cache is a part of it, not of this machine's memory.
        "cluster": {"workers": workers, "gpus_per_worker": 0, "object_store_bytes": 200_000_000},
        "run": {"dir": "runs/{name}", "tensorboard": False},
    }
    if sections.get("data", {}).get("mode") == "documents" and workers:
        assign = {"context": workers}
        sections["data"] = {**sections["data"], "assign": assign}
    return document | sections


def copy_sources(folder: Path) -> None:
    """Copy the text of the domains, of this file's checkout, so that all trees read the same."""
    for split in ("train", "valid"):
        (folder / "sources" / split).mkdir(parents=True)
        for domain in DOMAINS:
            name = f"{split}/{domain}.parquet"
            shutil.copyfile(_QUICKSTART / name, folder / "sources" / name)


def chat_recipe(folder: Path) -> dict[str, Any]:
    """Return a recipe of conversations and lines, by bytes: its loss is that of answers only."""
    random = np.random.default_rng(5)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for number in range(300):
            a, b = (int(n) for n in random.integers(0, 100, 2))
            chat = [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": f"{a} + {b} = {a + b} \u2713 {number}"},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    lines = [f"plain text, line {number}, of {number % 7} sevenths" for number in range(400)]
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    chats = {"name": "chat", "train": "chats.jsonl", "messages_column": "messages"}
    plain = {"name": "plain", "train": "lines.txt", "text_unit": "line"}
    return recipe(
        "chat",
        corpus={
            "path": "corpora/chat",
            "tokenizer": "byte",
            "chat_template": "chatml",
            "valid_fraction": 0.1,
            "domains": [chats, plain],
        },
        data=DOCUMENTS,
        mixer={"kind": "static", "weights": {"chat": 0.7, "plain": 0.3}},
    )


def write_recipe(path: Path, document: Mapping[str, Any]) -> str:
    """Write a recipe and return its file name."""
    path.write_text(yaml.safe_dump(dict(document), sort_keys=False), encoding="utf-8")
    return path.name


def write_mixture_table(path: Path, runs: int = 56) -> str:
    """Write losses of `runs` mixtures of four domains after 100, 200 and 400 steps.

    The law behind them has interactions and noise of 0.2 %, so that laws differ in their fits.
    """
    random = np.random.default_rng(11)
    d = len(DOMAINS)
    share_RD = random.dirichlet(np.full(d, 1.5), runs)
    mixing_VD = 0.2 + 0.8 * np.eye(d) + 0.1 * random.random((d, d))
    head = ["run", "step", *(f"share.{n}" for n in DOMAINS), *(f"loss.{n}" for n in DOMAINS)]
    rows = [",".join(head)]
    for run, share_D in enumerate(share_RD):
        for step in (100, 200, 400):
            seen_V = mixing_VD @ share_D
            loss_V = 1.5 + 2.5 * (0.05 + seen_V) ** -0.3 * (step / 100) ** -0.2
            loss_V = loss_V * np.exp(random.normal(0, 0.002, d))
            numbers = [repr(float(x)) for x in (*share_D, *loss_V)]
            rows.append(",".join([f"r{run:02d}", str(step), *numbers]))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path.name


_HIDDEN, _MLP, _LAYERS, _VOCABULARY = 16, 24, 3, 40
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _MLP,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": _VOCABULARY,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for layer in range(_LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (_HIDDEN, _HIDDEN),
            f"{at}.self_attn.k_proj.weight": (_HIDDEN // 2, _HIDDEN),
            f"{at}.self_attn.v_proj.weight": (_HIDDEN // 2, _HIDDEN),
            f"{at}.self_attn.o_proj.weight": (_HIDDEN, _HIDDEN),
            f"{at}.mlp.gate_proj.weight": (_MLP, _HIDDEN),
            f"{at}.mlp.up_proj.weight": (_MLP, _HIDDEN),
            f"{at}.mlp.down_proj.weight": (_HIDDEN, _MLP),
            f"{at}.input_layernorm.weight": (_HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (_HIDDEN,),
        }
    last = {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCABULARY, _HIDDEN)}
    return shapes | last


def write_models(folder: Path, tasks: int = 3) -> None:
    """Write a base model, `tasks` fine-tunes of it, and two LoRA adapters, all in fp32."""
    base_random = np.random.default_rng(1)
    base = {
        name: base_random.standard_normal(shape).astype(np.float32) * 0.1 + (len(shape) == 1)
        for name, shape in _shapes().items()
    }
    _write_model(folder / "base", base)
    for task in range(1, tasks + 1):
        random = np.random.default_rng([2, task])
        tuned = {
            name: weight + np.float32(0.02) * random.standard_normal(weight.shape, np.float32)
            for name, weight in base.items()
        }
        _write_model(folder / f"m{task}", tuned)
    for number in (1, 2):
        _write_adapter(folder / f"lora{number}", np.random.default_rng([3, number]))


def _write_model(folder: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    plain = {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def _write_adapter(folder: Path, random: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    rank, tensors = 2, {}
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(_LAYERS)]
    for module in modules:
        stem = f"base_model.model.{module}"
        for part, shape in (("A", (rank, _HIDDEN)), ("B", (_HIDDEN, rank))):
            tensors[f"{stem}.lora_{part}.weight"] = random.standard_normal(shape, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _merge(method: str, tasks: int = 3, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": "models/base",
        "models": [{"model": f"models/m{task}"} for task in range(1, tasks + 1)],
        "parameters": parameters,
    }


# Merged by the command line.
MERGES: dict[str, dict[str, Any]] = {
    "drm": _merge("drm", drop=[0.9, 0.5]),
    "ties": _merge("ties", density=0.4),
    "tsv": _merge("tsv"),
    "iso_c": _merge("iso_c"),
    "dare_ties": _merge("dare_ties", density=0.5, seed=3),
    "rules": _merge("drm", drop=0.8)
    | {
        "out_dtype": "bfloat16",
        "rules": [
            {"match": "down_proj", "merge_method": "ties", "parameters": {"density": 0.3}},
            {"match": "embed_tokens", "merge_method": "base"},
        ],
    },
}

# Merged one after the other in one process: with those above, no method is left out.
MORE_MERGES: dict[str, dict[str, Any]] = {
    "dare": _merge("dare", density=0.5, seed=4),
    "dare_linear": _merge("dare_linear", density=0.5, seed=5),
    "della": _merge("della", density=0.5, seed=6),
    "della_linear": _merge("della_linear", density=0.5, seed=7),
    "breadcrumbs": _merge("breadcrumbs", density=0.8, gamma=0.05),
    "breadcrumbs_ties": _merge("breadcrumbs_ties", density=0.8, gamma=0.05),
    "task_arithmetic": _merge("task_arithmetic", **{"lambda": 0.4}),
    "linear": {**_merge("linear", weight=1.0), "base_model": None},
    "slerp": {**_merge("slerp", tasks=2, t=0.3), "base_model": "models/m1"},
    "multislerp": _merge("multislerp"),
    "model_stock": _merge("model_stock"),
    "knots": _merge("knots"),
    "iso_cts": _merge("iso_cts"),
    "drm-float64": _merge("drm", drop=0.8, direction="vertical") | {"precision": "float64"},
    "drm-adapters": {
        "merge_method": "drm",
        "models": [{"model": "models/lora1"}, {"model": "models/lora2"}],
        "parameters": {"drop": 0.5},
    },
}
