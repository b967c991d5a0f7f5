"""Merging against mergekit: CPU seconds, wall and anonymous memory of whole commands.

`python -m tests.benchmarks.merge [--sizes small wide layers accuracy] [--methods NAMES]
[--repeats N]`, by default all, twice.
Every run is a command in its own process, start-up included, on the same synthetic family (a base
and three fine-tunes in bf16, deltas of a decaying part plus dense noise). mergekit is run from the
environment that `make .venv-mergekit` makes, or by the Python named in RAYMIX_MERGEKIT; in fp32
arithmetic, as ours is. All libraries get one thread, where mergekit needs the least CPU time; ours
works on as many parameters at a time as there are cores. Memory is the largest sum of anonymous
resident memory over the process and its children, sampled every 20 ms: input files that are mapped
do not count. Sizes: `small` 97 M parameters, `wide` two layers of a 7B model's widths (or
`--wide-layers N`), `layers` the small one at 1, 2 and 4 times the layers; `accuracy` is no run but
the error of DRM's merged delta against fp64 throughout, and the CPU time of one matrix, by
decomposition. At the wide size `drm-h` runs only where `--methods` names it: it decomposes two
matrices of 11,008 rows per layer. Inputs and outputs are written to bench-results/, tensor by
tensor, and removed afterwards: 1.2 GB, or 2 GB per wide layer. Each run is also said on stderr as
it ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks._merge_inputs import SMALL, WIDE, Size, task_delta, write_family
from tests.benchmarks._report import ROOT, print_table, row, write_results

THEIRS = Path(os.environ.get("RAYMIX_MERGEKIT", ROOT / ".venv-mergekit" / "bin" / "python"))
MERGEKIT_VERSION = (
    "from importlib.metadata import version as v; "
    "print('mergekit', v('mergekit'), 'torch', v('torch'), 'transformers', v('transformers'))"
)

METHODS = {
    "linear": ("linear", "{weight: 1.0}", "{}"),
    "ties": ("ties", "{weight: 1.0, density: 0.2}", "{}"),
    "drm-auto": ("drm", "{}", "{direction: auto, drop: 0.8}"),
    "drm-h": ("drm", "{}", "{direction: horizontal, drop: 0.8}"),
}
SHARED = ("linear", "ties")
"""What mergekit has, too."""


@dataclass(frozen=True)
class Cost:
    """What one command took."""

    cpu_s: float
    wall_s: float
    anonymous_bytes: int


def anonymous(root: int) -> int:
    """Return the anonymous resident memory of a process and its children."""
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        try:
            text = Path(f"/proc/{pid}/status").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        # A process that has ended but was not waited for has no such line.
        total += int((text.partition("RssAnon:")[2].split() or ["0"])[0]) * 1024
    return total


def measured(command: list[str], cwd: Path) -> Cost:
    """Run a command to its end and return what it took.

    Raises:
        SystemExit: If it failed; its words come with it.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT) if command[0] == sys.executable else "",
    }
    with tempfile.TemporaryFile("w+") as log:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start, most = time.perf_counter(), 0
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            time.sleep(0.02)
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{command}:\n{log.read()[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = f"{' '.join(command[1:5])}: {cpu:.1f} CPU s, {wall:.1f} s, {most / 1e6:.0f} MB"
    print(said, file=sys.stderr, flush=True)
    return Cost(cpu, wall, most)


def merge_file(place: Path, name: str, folders: list[Path]) -> Path:
    """Write a merge file that both understand (those of DRM only ours does)."""
    method, each, shared = METHODS[name]
    base, *tasks = folders
    lines = [f"merge_method: {method}"]
    if method != "linear":
        lines.append(f"base_model: {base}")
    lines.append("models:")
    for task in tasks:
        lines += [f"  - model: {task}", f"    parameters: {each}"]
    lines += [f"parameters: {shared}", "dtype: float32", "out_dtype: bfloat16", ""]
    place.write_text("\n".join(lines))
    return place


def command_of(who: str, file: Path, out: Path) -> list[str]:
    """Return the command line of a merge by `raymix` or `mergekit`."""
    if who == "raymix":
        ours = [sys.executable, "-m", "raymix", "merge", str(file)]
        return [*ours, "--out", str(out), "--no-plot"]
    # Without a tokenizer to copy, so that neither does more than merge.
    theirs = [str(THEIRS), "-m", "mergekit.scripts.run_yaml", str(file), str(out)]
    return [*theirs, "--quiet", "--no-copy-tokenizer"]


def compare(
    folder: Path, label: str, size: Size, methods: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Return the rows of a family: every method by both, the repeats interleaved."""
    folders = write_family(folder / label, size, 3)
    costs: dict[tuple[str, str], list[Cost]] = {}
    for _ in range(repeats):
        for name in methods:
            file = merge_file(folder / f"{name}.yaml", name, folders)
            for who in ("mergekit", "raymix"):
                if who == "mergekit" and (name not in SHARED or not THEIRS.exists()):
                    continue
                out = folder / "out"
                costs.setdefault((name, who), []).append(
                    measured(command_of(who, file, out), folder)
                )
                shutil.rmtree(out)
    shutil.rmtree(folder / label)
    return [line for name in methods for line in rows_of(label, name, costs)]


def rows_of(
    label: str, name: str, costs: dict[tuple[str, str], list[Cost]]
) -> list[dict[str, Any]]:
    """Return the rows of one method: CPU, wall and memory, ours as a part of theirs."""
    rows = []
    units = (("cpu_s", "CPU s", 1.0), ("wall_s", "wall s", 1.0), ("anonymous_bytes", "MB", 1e6))
    for field, unit, scale in units:
        for who in ("mergekit", "raymix"):
            taken = [getattr(cost, field) / scale for cost in costs.get((name, who), [])]
            theirs = [getattr(cost, field) / scale for cost in costs.get((name, "mergekit"), [])]
            if not taken:
                continue
            ratio = spread = None
            if who == "raymix" and theirs:
                pairs = [ours / other for ours, other in zip(taken, theirs, strict=True)]
                ratio, spread = statistics.median(pairs), (min(pairs), max(pairs))
            baseline = f"{label} {name} mergekit, {unit}" if ratio is not None else None
            title = f"{label} {name} {who}, {unit}"
            value = statistics.median(taken)
            rows.append(row(title, value, unit, ratio=ratio, spread=spread, baseline=baseline))
    return rows


def by_layers(folder: Path, methods: list[str]) -> list[dict[str, Any]]:
    """Return the memory of our merges as the layers grow 1, 2 and 4 times."""
    rows: list[dict[str, Any]] = []
    for name in methods:
        first = 0.0
        for times in (1, 2, 4):
            size = dataclasses.replace(SMALL, layers=4 * times, vocab=4000)
            folders = write_family(folder / f"layers{times}", size, 3)
            file = merge_file(folder / f"{name}.yaml", name, folders)
            cost = measured(command_of("raymix", file, folder / "out"), folder)
            shutil.rmtree(folder / "out")
            most = cost.anonymous_bytes / 1e6
            first = first or most
            title = f"{name}, {4 * times} layers, peak anonymous memory"
            base = f"{name}, 4 layers, peak anonymous memory"
            rows.append(row(title, most, "MB", ratio=most / first, baseline=base))
            shutil.rmtree(folder / f"layers{times}")
    return rows


def helps(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Return what it takes to print the help text."""
    ours = [sys.executable, "-m", "raymix", "merge", "--help"]
    theirs = [str(THEIRS), "-m", "mergekit.scripts.run_yaml", "--help"]
    rows = []
    for name, command in (("raymix merge --help", ours), ("mergekit-yaml --help", theirs)):
        if command is ours or THEIRS.exists():
            walls = [measured(command, folder).wall_s for _ in range(repeats + 1)]
            rows.append(row(name, min(walls), "wall s"))
    return rows


def accuracy() -> list[dict[str, Any]]:
    """Return error and cost of DRM-H on single matrices of the small family, by decomposition."""
    import torch

    from raymix.merging.methods.drm import DrmOptions, drm

    torch.set_num_threads(1)
    rows = []
    names = ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj")
    for name in names:
        deltas = [task_delta(SMALL, f"model.layers.0.{name}.weight", k) for k in (1, 2, 3)]
        exact = _merged(drm(None, [d.double() for d in deltas], DrmOptions(decomposition="svd")))
        m, n = deltas[0].shape
        for way in ("gram", "svd", "gram_fp32", "svd_fp32"):
            start = time.process_time()
            got = _merged(drm(None, deltas, DrmOptions.model_validate({"decomposition": way})))
            spent = time.process_time() - start
            error = float((got.double() - exact).norm() / exact.norm())
            rows.append(row(f"{m}x{n} {way}, fp32 merge, relative error", error, ""))
            rows.append(row(f"{m}x{n} {way}, fp32 merge, CPU", spent, "s"))
        got = _merged(drm(None, [d.double() for d in deltas], DrmOptions()))
        error = float((got - exact).norm() / exact.norm())
        rows.append(row(f"{m}x{n} gram, fp64 merge, relative error", error, ""))
    return rows


def _merged(result: Any) -> Any:
    return getattr(result, "delta", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["small", "wide", "layers", "accuracy"])
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--wide-layers", type=int, default=WIDE.layers)
    args = parser.parse_args()
    methods = args.methods or list(METHODS)
    if THEIRS.exists():
        done = subprocess.run([str(THEIRS), "-c", MERGEKIT_VERSION], check=True)
        assert done.returncode == 0
    else:
        print(f"no mergekit at {THEIRS}: only our rows (`make .venv-mergekit`)")
    rows: list[dict[str, Any]] = []
    # On a disk, not in a memory file system: the inputs must not count twice.
    (ROOT / "bench-results").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "bench-results") as name:
        folder = Path(name)
        rows += helps(folder, args.repeats)
        if "small" in args.sizes:
            rows += compare(folder, "97M", SMALL, methods, args.repeats)
        if "wide" in args.sizes:
            wide = dataclasses.replace(WIDE, layers=args.wide_layers)
            label = f"7B widths, {wide.layers} layers"
            named = args.methods or [method for method in METHODS if method != "drm-h"]
            rows += compare(folder, label, wide, named, args.repeats)
        if "layers" in args.sizes:
            rows += by_layers(folder, [m for m in ("ties", "drm-auto") if m in methods])
    if "accuracy" in args.sizes:
        rows += accuracy()
    print_table(rows)
    write_results("merge", rows)


if __name__ == "__main__":
    main()
