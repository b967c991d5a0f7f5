"""Token files read in place against our own store, and a corpus of a terabyte opened in seconds.

Reading: blocks of a Megatron pair in place and of the same tokens prepared by us, every block once
in random order, each side in a process of its own, taking turns. Both verify: the store the CRC-32
of every block, in place the largest id. Opening: a Megatron pair whose `.bin` is a sparse file, so
that it takes no disk; `prepare` reads the index, a fresh process opens the corpus and reads a
thousand random blocks.

    python -m tests.benchmarks.formats [--tokens 100] [--terabytes 1] [--documents 1] [--repeats 5]

Tokens and documents are in millions.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks._report import print_table, ratio_spread, row, write_results
from tests.support.paths import ROOT

EOS = 256
_MB = 1e6


def write_index(path: Path, lengths: np.ndarray) -> None:
    """Write a Megatron index of uint16 documents of these lengths."""
    count = len(lengths)
    with open(path, "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1))
        file.write(lengths.astype("<i4").data)
        file.write(((np.cumsum(lengths, dtype=np.int64) - lengths) * 2).data)
        file.write(np.arange(count + 1, dtype="<i8").data)


def write_pair(folder: Path, tokens: int) -> None:
    """Write a pair of random ids in documents of about 1,000."""
    random = np.random.default_rng(0)
    lengths = random.integers(500, 1500, tokens // 1000)
    ids = random.integers(0, 256, lengths.sum(), dtype=np.uint16)
    ids[np.cumsum(lengths) - 1] = EOS
    ids.tofile(folder / "text.bin")
    write_index(folder / "text.idx", lengths)


def write_sparse_pair(folder: Path, size: int, documents: int) -> None:
    """Write a pair whose tokens are a hole of `size` bytes."""
    (folder / "text.bin").touch()
    length = size // 2 // documents
    os.truncate(folder / "text.bin", 2 * length * documents)
    write_index(folder / "text.idx", np.full(documents, length, np.int64))


def child(mode: str, folder: str) -> dict[str, Any]:
    """Run one side in a process of its own and return what it measured."""
    command = [sys.executable, "-m", "tests.benchmarks.formats", "--child", mode, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def prepare_corpus(folder: str, *, in_place: bool, **domain: Any) -> dict[str, Any]:
    """Prepare the corpus beside the pair in `folder`."""
    from raymix.corpus import prepare
    from raymix.recipe import CorpusConfig

    domains = [{"name": "d", "train": f"{folder}/text.bin", **domain}]
    path = f"{folder}/{'in-place' if in_place else 'copied'}"
    document = {"path": path, "in_place": in_place, "domains": domains}
    config = CorpusConfig.model_validate({**document, "deduplicate": False})
    began = time.perf_counter()
    prepare(config, parallelism=0)
    return {"seconds": time.perf_counter() - began, "memory": peak_bytes()}


def read_corpus(path: str, count: int | None) -> dict[str, Any]:
    """Open a corpus and read its blocks in random order, all or `count` of them."""
    from raymix.store import Corpus

    began = time.perf_counter()
    corpus = Corpus.open(path)
    blocks = corpus.split("d", "train").blocks
    opened = {"seconds": time.perf_counter() - began, "memory": peak_bytes()}
    order = np.random.default_rng(1).permutation(blocks)[:count].tolist()
    began = time.perf_counter()
    tokens = sum(len(corpus.read_block("d", "train", number).tokens) for number in order)
    seconds = time.perf_counter() - began
    return {"opened": opened, "seconds": seconds, "tokens": tokens, "memory": peak_bytes()}


def peak_bytes() -> dict[str, int]:
    """Return the peak of resident memory, mapped pages included, and of memory of our own."""
    status = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if " kB" in line}
    return {"peak": sizes["VmHWM"], "own": sizes["RssAnon"]}


def reading(folder: Path, tokens: int, repeats: int) -> list[dict[str, Any]]:
    write_pair(folder, tokens)
    copied = child("prepare-copied", str(folder))
    indexed = child("prepare-in-place", str(folder))
    sides: dict[str, list[dict[str, Any]]] = {"in-place": [], "copied": []}
    for _ in range(repeats):
        for name, runs in sides.items():
            runs.append(child("read", str(folder / name)))
    rate = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in sides.items()}
    ratio, spread = ratio_spread(rate["in-place"], rate["copied"])
    rows = [
        row("read, own store", float(np.median(rate["copied"])), "tokens/s"),
        row("read, in place", float(np.median(rate["in-place"])), "tokens/s", ratio=ratio,
            spread=spread, baseline="read, own store"),
        row("prepare, copied", copied["seconds"], "s"),
        row("prepare, in place", indexed["seconds"], "s",
            ratio=indexed["seconds"] / copied["seconds"], baseline="prepare, copied"),
    ]  # fmt: skip
    for name, runs in sides.items():
        own = max(run["memory"]["own"] for run in runs) / _MB
        rows.append(row(f"memory of a reader, {name}, without mapped files", own, "MB"))
    return rows


def opening(folder: Path, size: int, documents: int) -> list[dict[str, Any]]:
    write_sparse_pair(folder, size, documents)
    prepared = child("prepare-sparse", str(folder))
    read = child("read-some", str(folder / "in-place"))
    name = f"{size / 1e12:g} TB, {documents:,} documents"
    return [
        row(f"{name}: prepare", prepared["seconds"], "s"),
        row(f"{name}: prepare, peak memory", prepared["memory"]["peak"] / _MB, "MB"),
        row(f"{name}: open", read["opened"]["seconds"], "s"),
        row(f"{name}: open, peak memory", read["opened"]["memory"]["peak"] / _MB, "MB"),
        # Beyond it are pages of the file, which the kernel takes back when memory is short.
        row(f"{name}: 1,000 blocks read, without mapped files", read["memory"]["own"] / _MB, "MB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=100)
    parser.add_argument("--terabytes", type=float, default=1)
    parser.add_argument("--documents", type=float, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        mode, path = options.child
        print(json.dumps(_CHILDREN[mode](path)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = reading(Path(folder), int(options.tokens * 1e6), options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        size, documents = int(options.terabytes * 1e12), int(options.documents * 1e6)
        rows += opening(Path(folder), size, documents)
    print_table(rows)
    write_results("formats", rows)


_CHILDREN = {
    "prepare-copied": lambda path: prepare_corpus(path, in_place=False),
    "prepare-in-place": lambda path: prepare_corpus(path, in_place=True),
    "prepare-sparse": lambda path: prepare_corpus(path, in_place=True, eos_at="none"),
    "read": lambda path: read_corpus(path, None),
    "read-some": lambda path: read_corpus(path, 1000),
}

if __name__ == "__main__":
    main()
