"""Record what a tree of raymix computes, and compare two records: a refactor changes no result.

    python -m tests.support.unchanged record OUT.json
    python -m tests.support.unchanged compare BEFORE.json AFTER.json

The tree under test is the first directory on PYTHONPATH, else the working directory, that holds
`raymix/`. All of its code runs in processes of their own, by the command line or by
`unchanged_probe`, in a temporary directory and on inputs made from seeds. Times, versions,
machines and directories are left out of what is recorded.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import unchanged_inputs as inputs
from tests.support.unchanged_tree import FAILED, Tree, digests, failure

_MAX_DIFF_LINES = 12

# Keys by what makes them differ between two recordings of one tree.
_TIMES = {"seconds", "tokens_per_s", "tokens_per_s_smooth", "data_wait", "data_wait_smooth"} | {
    "measured_s", "cpu_s", "plan_ms", "peak_bytes", "started",
}  # fmt: skip
_MACHINE = {"machine", "versions", "python", "revision", "raymix", "resources", "disk_free_bytes"}
_VOLATILE = _TIMES | _MACHINE

Section = Callable[[Tree], Iterator[tuple[str, Any]]]


def without(value: Any, keys: set[str] = _VOLATILE) -> Any:
    """Return a JSON value without some keys, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    if isinstance(value, list):
        return [without(item, keys) for item in value]
    return value


def help_texts(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield the help of every command, the schema of recipes, and the recipe of `init`."""
    first = tree.text("--help")
    yield "help/raymix", first.splitlines()
    # A command is a word, indented by two columns, before its text; so is no other line.
    for name in re.findall(r"^  ([a-z]+) {2,}\S", first, flags=re.MULTILINE):
        yield f"help/{name}", tree.text(name, "--help").splitlines()
    yield "schema", json.loads(tree.text("schema"))
    yield "init/said", tree.text("init", "mine.yaml").splitlines()
    yield "init/recipe", (tree.folder / "mine.yaml").read_text("utf-8").splitlines()


def prepared(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield the fingerprint, the statistics and the bytes of two corpora."""
    folder = tree.folder
    inputs.copy_sources(folder)
    chat = inputs.write_recipe(folder / "chat.yaml", inputs.chat_recipe(folder))
    packed = inputs.write_recipe(
        folder / "packed.yaml", inputs.recipe("packed", **inputs.RUNS["packed"])
    )
    for name, path in (("bpe", packed), ("chat", chat)):
        document = tree.json("prepare", path)
        yield f"prepare/{name}/fingerprint", document["fingerprint"]
        yield f"prepare/{name}/document", without(document)
        # prepare.json holds the directories of the sources.
        files = digests(folder / "corpora" / name)
        yield f"prepare/{name}/files", {k: v for k, v in files.items() if k != "prepare.json"}


def trained(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield packed, document-mode and PiKE runs, each in one process and by two workers."""
    recipes = {}
    for workers in (0, 2):
        for kind, sections in inputs.RUNS.items():
            name = f"{kind}-{workers}"
            document = inputs.recipe(name, workers=workers, **sections)
            recipes[name] = inputs.write_recipe(tree.folder / f"{name}.yaml", document)
    # By the command line, which starts a private cluster; the others share one.
    for name in ("packed-0", "packed-2"):
        yield f"runs/{name}/summary", without(tree.json("train", recipes.pop(name)))
        yield from run_results(tree, name)
    yield from _library_runs(tree, recipes, cluster=True, report=True)
    both = ["runs/packed-0", "runs/pike-0", "runs/documents-2"]
    tree.json("report", *both, "--out", "several.html")
    yield "report/several", without(_read(tree, "several.json"))
    yield "eval", without(tree.json("eval", "runs/packed-0"))
    tree.json("export", "runs/packed-0", "exported")
    yield "export", digests(tree.folder / "exported", "*.safetensors")


def mixed(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield a run in one process by every mixer, and one of conversations."""
    recipes = {"chat": "chat.yaml"}
    for name, mixer in inputs.MIXERS.items():
        document = inputs.recipe(name, data=inputs.PACKED, mixer=mixer, train=inputs.MANY_WINDOWS)
        recipes[name] = inputs.write_recipe(tree.folder / f"{name}.yaml", document)
    yield from _library_runs(tree, recipes, cluster=False, report=False)


def _library_runs(
    tree: Tree, recipes: dict[str, str], **options: bool
) -> Iterator[tuple[str, Any]]:
    """Yield runs by `raymix.train`, one after the other in one process."""
    for name, value in tree.probe("runs", {"recipes": recipes, **options}):
        yield name, without(value)
    for name in recipes:
        try:
            yield from run_results(tree, name)
        except (OSError, ValueError) as error:
            yield f"runs/{name}/failure", failure(error)


def run_results(tree: Tree, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a run's files say, floats in full."""
    folder = tree.folder / "runs" / name
    lines = _lines(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    yield f"runs/{name}/batches", [[line["step"], line["batch_hash"]] for line in steps]
    yield f"runs/{name}/losses", [[line["step"], line["loss"]] for line in steps]
    yield f"runs/{name}/metrics", without(lines)
    yield f"runs/{name}/mixture_log", _lines(folder / "mixture_log.jsonl")
    if (folder / "report.json").exists():
        yield f"runs/{name}/report", without(_read(tree, f"runs/{name}/report.json"))


def planned(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield plans of the tree's own recipes, from its sources, and of prepared corpora."""
    store = "cluster.object_store_bytes=200000000"
    folder = tree.root / "pipelines"
    recipes = {
        path.stem: [str(path), store, "corpus.path=not-prepared"]
        for path in sorted(folder.glob("*.yaml"))
    }
    recipes |= {f"prepared-{name}": [f"{name}-2.yaml"] for name in inputs.RUNS}
    for name, value in tree.probe("plans", recipes):
        yield name, without(value)
    for name in ("quickstart", "longctx"):
        document = tree.json("plan", *recipes[name])
        yield f"plan/{name}/by-command", without(document)


def refused(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield the messages about recipes that cannot work, several faults at once."""
    path = "packed.yaml"
    recipes = {
        "unknown-fields": [path, "train.stepz=3", "mixer.kind=pikey", "model.sort=llama"],
        "wrong-values": [path, "train.lr=-1", "train.steps=x", "cluster.workers=1.5"],
        "bad-shares": [path, "mixer={kind: static, weights: {german: 0.5, rusian: 0.4}}"],
        "no-target": [path, "mixer={kind: dga}"],
        "pieces": [path, "mixer={kind: schedule, pieces: [{step: 3, weights: {math: 1}}]}"],
        "length-twice": [path, "train.tokens=1000"],
        "no-source": [path, "corpus.domains.0.train=sources/none/*", "corpus.path=none"],
        "other-corpus": [path, "corpus.tokenizer=byte"],
        "widths": ["documents-2.yaml", "data.assign.widths=[3]", "data.assign.context=3"],
        "epochs": [path, "data.max_epochs=0.1", "train.steps=4000"],
        "replayed-log": [path, "mixer={kind: replay, log: absent.jsonl}"],
        "no-file": ["sources/absent.yaml"],
        "no-fault": [path],
    }
    yield from tree.probe("messages", recipes)


def laws(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield fits, predictions and optima of every law, and those of the command line."""
    table = inputs.write_mixture_table(tree.folder / "mixtures.csv")
    for name, value in tree.probe("laws", table):
        yield name, without(value)
    fitted = tree.json("fit", table, "--law", "additive", "--out", "law.json")
    yield "fit/additive", without(fitted)
    yield "fit/additive/law", without(_read(tree, "law.json"))
    auto = tree.json("fit", table, "--target", "german,math")
    yield "fit/auto", without(auto)
    limits = ["--cap", "math=0.4", "--floor", "german=0.2", "--horizon", "1000"]
    yield "optimize", without(tree.json("optimize", "law.json", *limits))


def scheduled(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield the plans of every planner, and the comparison of the command line."""
    yield from tree.probe("planners", None)
    options = ["--planners", "refine,packed,hdp,default", "--batch", "64", "--steps", "2"]
    document = tree.json("schedule", "simulate", "wikipedia", *options, "--out", "schedule.html")
    yield "schedule/simulate", without(document, {"plan_ms"})


def merged(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield the bytes and the report of merges by the command line and by the library."""
    inputs.write_models(tree.folder / "models")
    for name, document in inputs.MERGES.items():
        path = inputs.write_recipe(tree.folder / f"merge-{name}.yaml", document)
        plot = [] if name == "drm" else ["--no-plot"]
        summary = tree.json("merge", path, "--out", f"merged/{name}", *plot)
        yield f"merges/{name}/summary", without(summary)
    for name, value in tree.probe("merges", inputs.MORE_MERGES):
        yield name, without(value)
    for name in [*inputs.MERGES, *inputs.MORE_MERGES]:
        folder = tree.folder / "merged" / name
        yield f"merges/{name}/bytes", digests(folder, "*.safetensors")
        yield f"merges/{name}/report", without(_read(tree, f"merged/{name}/merge_report.json"))


SECTIONS: dict[str, Section] = {
    "help": help_texts,
    "prepare": prepared,
    "runs": trained,
    "mixers": mixed,
    "plan": planned,
    "messages": refused,
    "laws": laws,
    "schedule": scheduled,
    "merges": merged,
}


def _read(tree: Tree, name: str) -> Any:
    return json.loads((tree.folder / name).read_text("utf-8"))


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value; floats count with every digit, key order does not."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def failed(value: Any) -> bool:
    """Return whether a result stands for one that could not be computed."""
    return isinstance(value, dict) and FAILED in value


def record(out: Path, only: list[str]) -> int:
    """Write the results of the tree under test to `out`; return 1 if one could not be computed."""
    began = time.monotonic()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="raymix-unchanged-") as folder:
        tree = Tree.under_test(Path(folder))
        print(f"# the tree under test is {tree.root}", flush=True)
        for section in only or SECTIONS:
            print(f"# {section} ({time.monotonic() - began:.0f} s)", flush=True)
            try:
                for name, raw in SECTIONS[section](tree):
                    value = tree.without_places(raw)
                    results[name] = {"sha256": digest(value), "value": value}
                    note = f"  FAILED {value[FAILED]}" if failed(value) else ""
                    print(f"{name}  {results[name]['sha256']}{note}", flush=True)
            except (RuntimeError, OSError, ValueError, LookupError) as error:
                value = failure(error)
                results[f"{section}/failure"] = {"sha256": digest(value), "value": value}
                print(f"{section}/failure  FAILED {error}", flush=True)
    out.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")
    faults = sum(failed(result["value"]) for result in results.values())
    seconds = time.monotonic() - began
    print(f"# {len(results)} results, {faults} failed, {seconds:.0f} s: {out}")
    return int(faults > 0)


def compare(before: Path, after: Path) -> int:
    """Print per result whether it is the same in two records; return 1 if one is not."""
    old, new = (json.loads(p.read_text("utf-8"))["results"] for p in (before, after))
    changed = 0
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            changed += 1
            print(f"CHANGED  {name}: only in {(before if name in old else after).name}")
        elif old[name]["sha256"] != new[name]["sha256"]:
            changed += 1
            print(f"CHANGED  {name}")
            print("".join(difference(old[name]["value"], new[name]["value"])), end="")
        elif failed(new[name]["value"]):
            changed += 1
            print(f"FAILED   {name}: in both, so nothing is known of it")
        else:
            print(f"equal    {name}")
    print(f"# {len(old.keys() | new.keys())} results, {changed} not equal")
    return int(changed > 0)


def difference(old: Any, new: Any) -> Iterator[str]:
    """Yield the first lines in which two JSON values differ."""
    texts = [
        json.dumps(value, sort_keys=True, indent=0, ensure_ascii=False).splitlines()
        for value in (old, new)
    ]
    lines = list(difflib.unified_diff(*texts, lineterm="", n=1))[2:]
    for line in lines[:_MAX_DIFF_LINES]:
        yield f"    {line[:200]}\n"
    if len(lines) > _MAX_DIFF_LINES:
        yield f"    ... and {len(lines) - _MAX_DIFF_LINES} more lines\n"


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.unchanged")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write the results of the tree under test")
    recording.add_argument("out", type=Path)
    recording.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=list(SECTIONS),
        help="some sections; runs, mixers, plan and messages need those before them",
    )
    comparing = commands.add_parser("compare", help="compare two records; exit 1 on any change")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        return record(given.out, given.only)
    return compare(given.before, given.after)


if __name__ == "__main__":
    sys.exit(main())
