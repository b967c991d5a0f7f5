"""Run directories as training writes them, small and made in milliseconds: input for reports.

The weights, the rows per domain and the shares are those of the real sampler; losses follow a
power law with noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raymix.sampling import Allocator, MixtureEntry, MixtureLog, fixed_point
from raymix.store import DomainInfo, Manifest, SplitInfo, TokenizerInfo

LENGTH = 128
ROWS = 16
ENTROPY = 5.5


def write_run(
    path: Path,
    *,
    domains: Sequence[str] = ("books", "code", "maths"),
    pieces: Sequence[tuple[int, Sequence[float]]] | None = None,
    steps: int = 60,
    evaluate_every: int = 20,
    seed: int = 0,
    finished: bool = True,
    max_epochs: float | None = None,
) -> Path:
    """Write a run of `steps` steps whose shares are those of `pieces`: (first step, weights)."""
    path.mkdir(parents=True)
    even = [(0, [1 / len(domains)] * len(domains))]
    log = MixtureLog(tuple(domains))
    for version, (first_step, weights) in enumerate(pieces or even):
        log.append(MixtureEntry(version, first_step, tuple(weights), "schedule"))
    corpus = write_manifest(path / "corpus", domains)
    recipe = {
        "name": path.name,
        "seed": seed,
        "corpus": {"path": str(corpus)},
        "data": {"mode": "packed", "sequence_length": LENGTH, "rows_per_step": ROWS}
        | ({} if max_epochs is None else {"max_epochs": max_epochs}),
        "mixer": {"kind": "schedule"},
        "model": {"kind": "config", "type": "llama"},
        "train": {"steps": steps if finished else 2 * steps},
        "cluster": {"workers": 2},
    }
    (path / "resolved.yaml").write_text(yaml.safe_dump(recipe))
    environment = {
        "python": "3.11.7",
        "platform": "Linux",
        "cores": 2,
        "memory_bytes": 24 << 30,
        "packages": {"raymix": "0.1.0", "ray": "2.60.0", "torch": "2.13.0"},
        "parameters": 1_050_000,
    }
    (path / "environment.json").write_text(json.dumps(environment))
    (path / "mixture_log.jsonl").write_text("".join(f"{line}\n" for line in log.to_lines()))
    rows = [_tokens(at) // LENGTH for at in range(len(domains))]
    limit_D = None if max_epochs is None else np.array([int(max_epochs * n) for n in rows])
    lines = metrics(Allocator(len(domains), limit_D), log, steps, evaluate_every, seed)
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def metrics(
    allocator: Allocator, log: MixtureLog, steps: int, evaluate_every: int, seed: int
) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    lines = [evaluation(log.domains, 0, random)]
    for step in range(steps):
        entry = log.at(step)
        counts = allocator.allocate(fixed_point(entry.weights), ROWS).tolist()
        lines.append(
            {
                "step": step + 1,
                "loss": 4 + 3.6 * (step + 1) ** -0.5 + float(random.normal(0, 0.08)),
                "lr": 1e-3 * min(1, (step + 1) / 10),
                "tokens": (step + 1) * ROWS * LENGTH,
                "tokens_per_s": float(random.normal(12_000, 500)),
                "data_wait": float(random.uniform(0, 0.02)),
                "mixture_version": entry.version,
                "shares": dict(zip(log.domains, entry.weights, strict=True)),
                "counts": {
                    name: rows * LENGTH
                    for name, rows in zip(log.domains, counts, strict=True)
                    if rows
                },
                "grad_norm": 0.4 + 2 * (step + 1) ** -0.5,
                "domain_loss": {
                    name: 4 + 0.1 * (at % 5) + 3.6 * (step + 1) ** -0.5
                    for at, (name, rows) in enumerate(zip(log.domains, counts, strict=True))
                    if rows
                },
                "batch_hash": f"{step:016x}",
            }
        )
        if (step + 1) % evaluate_every == 0 or step + 1 == steps:
            lines.append(evaluation(log.domains, step + 1, random))
    return lines


def evaluation(domains: Sequence[str], step: int, random: np.random.Generator) -> dict[str, Any]:
    table = {}
    for at, name in enumerate(domains):
        loss = 4 + 0.1 * (at % 5) + 3.6 * (step + 1) ** -0.4 + float(random.normal(0, 0.01))
        table[name] = {"loss": loss, "bits_per_byte": loss / 2.4 / np.log(2), "tokens": 4096}
    return {"step": step, "eval": table}


def write_manifest(path: Path, domains: Sequence[str]) -> Path:
    path.mkdir(parents=True)

    def split(tokens: int) -> SplitInfo:
        return SplitInfo(
            documents=10,
            tokens=tokens,
            bytes=3 * tokens,
            blocks=1,
            shards=(),
            length_quantiles={},
            length_histogram={},
            unigram_entropy=ENTROPY,
            bigram_entropy=3.5,
        )

    infos = {
        name: DomainInfo(
            train=split(_tokens(at)),
            valid=split(5_000),
            records_read=20,
            rejected=0,
            duplicates=0,
            too_short=0,
            too_long=0,
        )
        for at, name in enumerate(domains)
    }
    tokenizer = TokenizerInfo(kind="bpe", fingerprint="t" * 32, vocab_size=2048, eos_id=0)
    manifest = Manifest(
        fingerprint="0123456789abcdef", tokenizer=tokenizer, block_tokens=LENGTH, domains=infos
    )
    (path / "manifest.json").write_text(manifest.model_dump_json())
    return path


def _tokens(at: int) -> int:
    return 20_000 * (1 + at % 7)
