"""The documentation builds without a warning, and its code runs, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

DOCS = ROOT / "docs"

# What the parts of docs/extending.md do when used, after its blocks have run.
AT_WORK = """
import raymix
from raymix.laws import MixtureTable
from raymix.merging.registry import get_method
from raymix.mixers import DomainStats, MixerContext
from raymix.recipe import Recipe
from raymix.schedule import Layout, preset, MODELS, NETWORKS

context = MixerContext(domains=("a", "b", "c"), tokens_D=np.array([5, 5, 5]), total_tokens=9,
                       total_steps=9)
recipe = Recipe.model_validate({"name": "x", "corpus": {"path": "c"}, "train": {"steps": 1},
                                "mixer": {"kind": "hardest", "temperature": 0.5}})
mine = raymix.build_mixer(recipe.mixer, context)
stats = DomainStats(step=0, window=1, tokens_D=np.array([1, 1, 0]),
                    loss_D=np.array([3.0, 2.0, np.nan]))
shares = mine.update(stats)
assert abs(shares.sum() - 1) < 1e-12 and shares[0] > shares[1] and shares[2] == 1 / 3
other = raymix.build_mixer(recipe.mixer, context)
other.load_state_dict(mine.state_dict())
assert (other.update(stats) == mine.update(stats)).all()

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


def test_what_is_said_of_extending_runs(tmp_path: Path) -> None:
    text = (DOCS / "extending.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
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
