"""`raymix schedule simulate` as a user runs it: names, files, a recipe's corpus, and mistakes."""

from __future__ import annotations

import json
import re

from raymix.schedule import MODELS, preset, save_cost_model
from tests.support.shell import Shell

KEYS = {
    "speedup_over_default",
    "speedup_over_packed",
    "share_of_bound",
    "memory_violations",
    "plan_ms",
}
SMALL = ("--groups", "2", "--context", "4", "--batch", "24", "--steps", "1")


def test_a_distribution_with_its_page(shell: Shell) -> None:
    result = shell.json(
        "schedule", "simulate", "chatqa2", *SMALL, "--out", "page.html", "--network", "slow"
    )
    assert set(result["planners"]) >= {"refine", "skrull", "hdp", "flexsp", "packed", "default"}
    for row in result["planners"].values():
        assert set(row) >= KEYS
        assert row["memory_violations"] == 0
    assert result["planners"]["refine"]["speedup_over_packed"] >= 1
    page = (shell.cwd / "page.html").read_text()
    assert page.count("<svg") == 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not re.search(r"\bnan\b", page, flags=re.IGNORECASE)
    twin = json.loads((shell.cwd / "page.json").read_text())
    assert twin["planners"].keys() == result["planners"].keys()


def test_a_recipe_stands_for_the_documents_of_its_corpus(shell: Shell) -> None:
    result = shell.json(
        "schedule", "simulate", "tiny.yaml", *SMALL, "--planners", "packed,hdp",
        "--memory-tokens", "512", "data.sequence_length=1024",
    )  # fmt: skip
    assert result["source"] == "tiny.yaml"
    assert set(result["planners"]) == {"default", "packed", "hdp"}
    assert 0 < result["planners"]["packed"]["most_tokens"] <= 512


def test_a_file_of_lengths_and_a_fitted_cost_model(shell: Shell) -> None:
    (shell.cwd / "lengths.csv").write_text("length\n" + "\n".join(["9000", "400", "30"] * 20))
    save_cost_model(preset(next(iter(MODELS)), "nvlink"), shell.cwd / "cost.json")
    result = shell.json(
        "schedule", "simulate", "lengths.csv", *SMALL, "--cost", "cost.json",
        "--planners", "refine", "--longest", "5000", "--widths", "2", "--barrier", "none",
    )  # fmt: skip
    assert result["layout"]["widths"] == [1, 2, 4]
    assert result["layout"]["barrier"] == "none"
    assert result["planners"]["refine"]["share_of_bound"] > 0.5


def test_a_mistake_is_refused_in_one_line(shell: Shell) -> None:
    done = shell.run("schedule", "simulate", "lmsis")
    assert done.returncode == 2
    assert "Did you mean 'lmsys'?" in done.stderr
    assert "Traceback" not in done.stderr
