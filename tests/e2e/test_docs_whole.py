"""The documentation builds without a warning, and its code runs, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.paths import QUICKSTART, ROOT
from tests.support.shell import Shell

DOCS = ROOT / "docs"

# What the parts of docs/extending.md do when used, after its blocks have run.
AT_WORK = """
import raymix
from raymix.laws import MixtureTable
from raymix.merging.registry import get_method
from raymix.schedule import Layout, preset, MODELS, NETWORKS

random = np.random.default_rng(0)
share = random.dirichlet(np.ones(3), 30)
table = MixtureTable(domains=("a", "b", "c"), targets=("a", "b"),
                     runs=tuple(f"r{i}" for i in range(30)), share_RD=share,
                     loss_RV=np.exp(1 - 0.3 * np.log(share[:, :2] + 0.05)))
fitted, report = raymix.fit_law(table, law="nearest")
assert fitted.predict(share).shape == (30, 2)
assert report.mean.spearman > 0.5, report.mean

schedule = raymix.plan_batch([5, 90, 40, 7], Layout(2, 4), preset(MODELS[0] if
    isinstance(MODELS, (list, tuple)) else next(iter(MODELS)), next(iter(NETWORKS))),
    planner="in_turn")
assert schedule.seconds > 0

merge = get_method("median")
deltas = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), torch.tensor([2.0, 9.0])]
assert merge.function(None, deltas, merge.options(scale=2.0)).tolist() == [4.0, 4.0]
"""


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_mixer_of_the_docs_trains_a_run(tmp_path: Path) -> None:
    """Word by word in an empty directory: the package, the recipe, the commands."""
    text = (DOCS / "extending.md").read_text()
    (tmp_path / "hardest.py").write_text(blocks(text, "python")[0])
    (tmp_path / "pyproject.toml").write_text(blocks(text, "toml")[0])
    (tmp_path / "my.yaml").write_text(blocks(text, "yaml")[0])
    for domain, source in (("books", "books"), ("code", "python")):
        (tmp_path / "data" / domain).mkdir(parents=True)
        shutil.copy(QUICKSTART / "valid" / f"{source}.parquet", tmp_path / "data" / domain)
    install, train = (line.split() for line in blocks(text, "bash")[0].splitlines())
    # Not into the environment of these tests, and without a download of the build back end.
    site = str(tmp_path / "site")
    options = ["--quiet", "--no-build-isolation", "--target", site]
    install = [word for word in install if word != "-e"]
    subprocess.run([sys.executable, "-m", *install, *options], cwd=tmp_path, check=True)
    shell = Shell(tmp_path, env={"PYTHONPATH": os.pathsep.join([site, str(ROOT)])})
    shell.ok(*train[1:])
    log = [json.loads(line) for line in (tmp_path / "runs/my/mixture_log.jsonl").open()]
    assert len(log) >= 3
    shares = log[-1]["shares"]
    assert min(shares.values()) >= 0.05 / 2
    assert shares["books"] != 0.5
    refused = shell.run("plan", "my.yaml", "mixer.temperature=-1")
    assert refused.returncode == 2
    assert "mixer.temperature = -1" in refused.stderr


def test_what_is_said_of_extending_runs(tmp_path: Path) -> None:
    text = (DOCS / "extending.md").read_text()
    code = blocks(text, "python")
    assert len(code) == 4
    script = tmp_path / "extending.py"
    script.write_text("\n".join([*code, AT_WORK]))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    build = [
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "-q",
        "-d",
        str(tmp_path / "trees"),
    ]
    done = subprocess.run(
        [sys.executable, *build, str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "recipes.html").exists()
