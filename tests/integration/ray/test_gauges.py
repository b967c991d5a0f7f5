"""A run in a cluster that reports metrics: Prometheus, asking the node, gets the run's gauges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymix.training.run.gauges import METRICS
from tests.support.loops import train_corpus
from tests.support.scripts import run_script

SCRIPT = """
import json, sys, threading, time, urllib.request
from pathlib import Path
import ray
from raymix.recipe import Recipe
from raymix.training.api import train

document = json.loads(sys.stdin.read())
wanted = document.pop("wanted")
ray.init(
    address="local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False,
    log_to_driver=False, _system_config={"metrics_report_interval_ms": 500},
)
recipe = Recipe.model_validate(document)
thread = threading.Thread(target=lambda: train(recipe, report=False), daemon=True)
thread.start()
run, values = Path(recipe.run_dir), {}
deadline = time.monotonic() + 400
while time.monotonic() < deadline and thread.is_alive() and len(values) < wanted:
    time.sleep(0.5)
    port = ray.nodes()[0]["MetricsExportPort"]
    if port <= 0:  # the node has not yet said where it listens
        continue
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines() if line.startswith("ray_raymix_") and 'run="scraped"' in line
    }
(run / ".stop").touch()
thread.join(60)
print("found " + json.dumps(values))
ray.shutdown()
"""


def labels(series: str) -> tuple[str, str | None]:
    """Return the name and the domain of a series of Prometheus' text."""
    name, _, label_text = series.partition("{")
    domains = [
        part[8:-1] for part in label_text.rstrip("}").split(",") if part.startswith("domain=")
    ]
    return name, domains[0] if domains else None


def test_prometheus_finds_the_gauges_of_a_run(tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", {"a": 30_000, "b": 20_000})
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    document = {
        "name": "scraped",
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 16, "rows_per_step": 4},
        "model": {"config": shape},
        "train": {"steps": 200_000},
        "eval": {"rows_per_domain": 2},
        "cluster": {"workers": 1, "gpus_per_worker": 0},
        "run": {"dir": str(tmp_path / "scraped"), "tensorboard": False},
        "wanted": sum(2 if metric.by_domain else 1 for metric in METRICS),
    }
    done = run_script(SCRIPT, tmp_path, json.dumps(document))
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    assert lines[0] != "found {}", done.stderr[-4000:]
    values = {labels(series): value for series, value in json.loads(lines[0][6:]).items()}
    for metric in METRICS:
        for domain in ("a", "b") if metric.by_domain else (None,):
            assert (f"ray_{metric.name}", domain) in values, (metric.name, sorted(values))
    assert values["ray_raymix_share", "a"] == pytest.approx(0.6, abs=0.02)
    assert values["ray_raymix_step", None] >= 1
    read = [values["ray_raymix_domain_tokens", domain] for domain in ("a", "b")]
    assert sum(read) == values["ray_raymix_tokens", None]
    assert values["ray_raymix_domain_epochs", "b"] == pytest.approx(read[1] / 20_000, rel=0.01)
