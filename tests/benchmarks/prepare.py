"""`prepare` against the bare `tokenizers` library on the same cores, and its memory as it grows.

The corpus is the shared real one, copied with a marker in every document (so that none is a
duplicate) to the size asked for; the tokenizer a byte-level BPE of GPT-2's size trained on it.
The bare side reads the same Parquet files and calls `encode_batch_fast` with all cores, and does
nothing with the result but count it. Ours is a whole `prepare`: reading, cleaning, hashing,
tokenizing, deduplicating, sharding, entropies, manifest. The two take turns.

    python -m tests.benchmarks.prepare [--megabytes 100] [--repeats 3] [--growth 10]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks._report import print_table, ratio_spread, row, write_results
from tests.support.paths import SHARED_DATA

SHARED = SHARED_DATA / "corpus_small" / "train"
VOCABULARY = 50_257
BATCH_BYTES = 4 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


def make_corpus(target: Path, megabytes: float) -> int:
    """Write the shared domains, copied with a marker until they hold `megabytes`; return bytes."""
    tables = {path.stem: pq.read_table(path, columns=["text"]) for path in SHARED.glob("*.parquet")}
    size = sum(len(t.encode()) for table in tables.values() for t in table["text"].to_pylist())
    copies = max(1, round(megabytes * 1e6 / size))
    if megabytes * 1e6 < size / 2:
        tables = {name: table.slice(0, 20) for name, table in tables.items()}
    target.mkdir(parents=True)
    total = 0
    for name, table in tables.items():
        texts = table["text"].to_pylist()
        schema = pa.schema([("text", pa.string())])
        with pq.ParquetWriter(target / f"{name}.parquet", schema, compression="zstd") as writer:
            for copy in range(copies):
                marked = [f"[{copy}]\n{text}" if copy else text for text in texts]
                total += sum(len(text.encode()) for text in marked)
                writer.write_table(pa.table({"text": marked}, schema=schema))
    return total


def bare(source: str, tokenizer: str) -> None:
    """Print tokens and seconds of the bare library over all files; run in its own process."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(tokenizer)
    loaded.encode_batch_fast(["warm up"] * 100)
    began, tokens = time.perf_counter(), 0
    for batch in _batches(source):
        encodings = loaded.encode_batch_fast(batch, add_special_tokens=False)
        tokens += sum(map(len, encodings))
    print(tokens, time.perf_counter() - began)


def _batches(source: str) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for path in sorted(Path(source).glob("*.parquet")):
        for records in pq.ParquetFile(path).iter_batches(256, columns=["text"]):
            for text in records.column(0).to_pylist():
                batch.append(text)
                size += len(text)
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


class Watch:
    """Counts the CPU time of this process and its descendants; samples memory where asked to."""

    def __init__(self, *, memory: bool) -> None:
        self.peak_bytes = 0
        self._memory = memory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Watch:
        self._before = cpu_seconds()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.cpu_s = cpu_seconds() - self._before

    def _loop(self) -> None:
        while self._memory and not self._stop.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, driver_and_workers_bytes())


def _tree() -> dict[int, list[str]]:
    """Return the fields of /proc/PID/stat after the name, for this process and descendants."""
    stats: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stats[int(entry.name)] = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
    ours = {os.getpid()}
    for _ in range(6):
        ours |= {pid for pid, fields in stats.items() if int(fields[1]) in ours}
    return {pid: stats[pid] for pid in ours if pid in stats}


def cpu_seconds() -> float:
    return sum(sum(int(x) for x in fields[11:15]) for fields in _tree().values()) / TICK


def driver_and_workers_bytes() -> int:
    """Return the private memory of this process and of Ray's workers (not of its daemons)."""
    total = 0
    for pid in _tree():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if pid != os.getpid() and not command.startswith(b"ray::"):
                continue
            resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
        except OSError:
            continue
        total += (resident - shared) * PAGE
    return total


def ours(
    source: Path, tokenizer: Path, work: Path, parallelism: int | None, *, memory: bool = False
) -> tuple[float, float, int]:
    """Return tokens per second, CPU seconds per million tokens, and peak bytes of a prepare."""
    from raymix.corpus import prepare
    from raymix.recipe import CorpusConfig

    target = work / "prepared"
    shutil.rmtree(target, ignore_errors=True)
    document: dict[str, Any] = {
        "path": str(target),
        "tokenizer": {"path": str(tokenizer), "eos_token": "<|endoftext|>"},
        "domains": [
            {"name": path.stem, "train": str(path)} for path in sorted(source.glob("*.parquet"))
        ],
    }
    with Watch(memory=memory) as watch:
        began = time.perf_counter()
        manifest = prepare(CorpusConfig.model_validate(document), parallelism=parallelism)
        seconds = time.perf_counter() - began
    splits = [s for info in manifest.domains.values() for s in (info.train, info.valid)]
    tokens = sum(split.tokens for split in splits)
    assert not sum(info.duplicates for info in manifest.domains.values()) > 0.01 * tokens
    return tokens / seconds, watch.cpu_s / tokens * 1e6, watch.peak_bytes


def run_bare(source: Path, tokenizer: Path) -> tuple[float, float]:
    """Return tokens per second and CPU seconds per million tokens of the bare library."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.prepare",
        "--bare",
        str(source),
        str(tokenizer),
    ]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    tokens, seconds = (float(value) for value in done.stdout.split())
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return tokens / seconds, cpu / tokens * 1e6


def start_ray() -> None:
    # Ray has its workers yield to everything else on the machine; the bare side does not.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so Ray spells it
    import ray

    ray.init(
        num_cpus=len(os.sched_getaffinity(0)),
        object_store_memory=150_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=40,
    )


def make_tokenizer(path: Path) -> None:
    """Write a byte-level BPE of GPT-2's size, trained on half of the shared corpus."""
    from raymix.corpus.tokenizers.tokenizer import train_bpe

    tables = (pq.read_table(file, columns=["text"]) for file in sorted(SHARED.glob("*.parquet")))
    texts = (text for table in tables for text in table["text"].to_pylist()[::2])
    train_bpe(texts, VOCABULARY).save(str(path))


def measure(work: Path, megabytes: float, repeats: int, growth: int) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    import ray

    tokenizer = work / "tokenizer.json"
    make_tokenizer(tokenizer)
    make_corpus(work / "tiny", 1)
    size = make_corpus(work / "corpus", megabytes)
    print(f"{size / 1e6:.0f} MB of text, {len(os.sched_getaffinity(0))} cores", flush=True)
    began = time.perf_counter()
    start_ray()
    ray_s = time.perf_counter() - began
    began = time.perf_counter()
    ours(work / "tiny", tokenizer, work, None)
    first_s = time.perf_counter() - began
    print(f"Ray took {ray_s:.1f} s to start, its first prepare {first_s:.1f} s", flush=True)
    library: list[tuple[float, float]] = []
    on_ray: list[tuple[float, float, int]] = []
    here: list[tuple[float, float, int]] = []
    for repeat in range(repeats):
        library.append(run_bare(work / "corpus", tokenizer))
        on_ray.append(ours(work / "corpus", tokenizer, work, None))
        here.append(ours(work / "corpus", tokenizer, work, 0))
        figures = ", ".join(f"{runs[-1][0]:,.0f}" for runs in (library, on_ray, here))
        print(f"repeat {repeat + 1}: bare, Ray, in process: {figures} tokens/s", flush=True)
    rows = _speed_rows(library, on_ray, here) if repeats else []
    rows.append(row("start of a Ray cluster, once", ray_s, "s"))
    rows.append(row("first prepare on it, 1 MB or so", first_s, "s"))
    if growth > 1:
        make_corpus(work / "x1", megabytes / 4)
        small = ours(work / "x1", tokenizer, work, None, memory=True)
        make_corpus(work / "x10", megabytes / 4 * growth)
        large = ours(work / "x10", tokenizer, work, None, memory=True)
        rows += _memory_rows(small[2], large, growth)
    ray.shutdown()
    return rows


def _speed_rows(
    library: list[tuple[float, float]],
    on_ray: list[tuple[float, float, int]],
    here: list[tuple[float, float, int]],
) -> list[dict[str, Any]]:
    name = "bare tokenizers"
    base = [speed for speed, _ in library]
    rows = [row(name, sorted(base)[len(base) // 2], "tokens/s")]
    for label, runs in (("prepare on Ray Data", on_ray), ("prepare in process", here)):
        speeds = [entry[0] for entry in runs]
        ratio, spread = ratio_spread(speeds, base)
        middle = sorted(speeds)[len(speeds) // 2]
        rows.append(row(label, middle, "tokens/s", ratio=ratio, spread=spread, baseline=name))
    cpu = [cost for _, cost in library]
    rows.append(row(f"{name}, CPU", sorted(cpu)[len(cpu) // 2], "s/Mtoken"))
    for label, runs in (("prepare on Ray Data, CPU", on_ray), ("prepare in process, CPU", here)):
        costs = [entry[1] for entry in runs]
        ratio, spread = ratio_spread(costs, cpu)
        middle = sorted(costs)[len(costs) // 2]
        rows.append(
            row(label, middle, "s/Mtoken", ratio=ratio, spread=spread, baseline=f"{name}, CPU")
        )
    return rows


def _memory_rows(small: int, large: tuple[float, float, int], growth: int) -> list[dict[str, Any]]:
    name = "peak memory of driver and workers, 1x"
    ratio = large[2] / small
    return [
        row(name, small / 1e6, "MB"),
        row(
            f"the same, {growth}x the corpus",
            large[2] / 1e6,
            "MB",
            ratio=ratio,
            spread=(ratio, ratio),
            baseline=name,
        ),
        row(f"prepare on Ray Data, {growth}x", large[0], "tokens/s"),
    ]


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        bare(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description="Benchmark `prepare`.")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--growth", type=int, default=10)
    options = parser.parse_args()
    if not SHARED.exists():
        print(f"skipped: the shared real data is not at {SHARED}")
        return
    work = Path(tempfile.mkdtemp(prefix="raymix-bench-prepare-"))
    try:
        rows = measure(work, options.megabytes, options.repeats, options.growth)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print()
    print_table(rows)
    write_results("prepare", rows)


if __name__ == "__main__":
    main()
