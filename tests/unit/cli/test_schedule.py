"""`raymix schedule simulate` in this process: what it prints, and mistakes before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymix.schedule import known_distributions
from tests.unit.cli.test_cli import call

SMALL = ("--groups", "1", "--context", "2", "--batch", "6", "--steps", "1", "--planners", "packed")


def test_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schedule", "simulate", "longalign", *SMALL) == 0
    shown = capsys.readouterr().out
    assert "1 batches of 6 sequences on 1 x 2 ranks of 26,000 tokens" in shown
    assert "assumed: 0.5b, nvlink" in shown
    rows = [line.split()[0] for line in shown.splitlines() if line]
    assert {"packed", "default"} <= set(rows)
    assert max(map(len, shown.splitlines())) <= 120


def test_json_is_one_document(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(map(str, range(10, 300, 7))))
    assert call("schedule", "simulate", str(lengths), *SMALL, "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["source"] == str(lengths)
    assert document["sequences"] == 6
    assert document["files"] == []
    assert document["cost"]["memory_tokens"] == 26_000


def test_the_help_names_every_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schedule", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in known_distributions())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lmsis",), "Did you mean 'lmsys'?"),
        (("lmsys", "--planners", "refin"), "Did you mean 'refine'?"),
        (("lmsys", "--widths", "3"), "3 does not divide the 8 ranks of a group"),
        (("lmsys", "--widths", "x"), "not whole numbers, separated by commas"),
        (("lmsys", "--barrier", "everyone"), "'group', 'all', 'none'"),
        (("lmsys", "--model", "70b"), "Known: 0.5b, 7b"),
        (("lmsys", "--cost", "no.json"), "no such file"),
        (("lmsys", "--longest", "999999"), "can hold;"),
        (("lmsys", "--out", "page.pdf"), "not an HTML file"),
        (("lmsys", "--out", "nowhere/page.html"), "its directory does not exist"),
        (("lmsys", "train.steps=2"), "only a recipe has fields to change"),
        (("absent.yaml",), "absent.yaml"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("schedule", "simulate", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
