"""The command line's frame and its light commands: output, exit codes, the one document."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from raymix._utils.json import jsonable
from raymix.cli import doctor
from raymix.cli._run import explain, run_command
from raymix.cli.main import COMMANDS, app
from raymix.errors import CorpusError, RecipeError, TrainingError
from raymix.recipe import load_recipe
from tests.support.recipes import write


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*args: str) -> int:
    """Return the exit code of the command line run in this process."""
    with pytest.raises(SystemExit) as caught:
        app(list(args), prog_name="raymix")
    return int(caught.value.code or 0)


def finish(work: Any, *, json: bool = False, **options: Any) -> int:
    """Return the exit code of `run_command`."""
    try:
        run_command(work, json=json, **options)
    except typer.Exit as leave:
        return leave.exit_code
    return 0


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    shown = capsys.readouterr().out
    width = max(len(name) for commands in COMMANDS.values() for name in commands)
    for section, commands in COMMANDS.items():
        assert f"{section}:" in shown
        for name, line in commands.items():
            assert f"  {name.ljust(width)}  {line}" in shown
    assert "Examples:\n    raymix init my.yaml" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    assert "raymix plan my.yaml" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == "raymix 0.1.0\n"


@pytest.mark.parametrize("command", [name for names in COMMANDS.values() for name in names])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: raymix {command} [OPTIONS]")
    assert "--json" in shown
    for internal in ("{", "<str>", "list[", "Typer"):
        assert internal not in shown.split("Options:")[0]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["pln"], "No such command 'pln'. Did you mean 'plan'?"),
        (["--foo"], "No such option: --foo"),
        (["plan"], "Missing argument 'RECIPE'"),
        (["validate", "r.yaml", "--jsn"], "No such option: --jsn"),
    ],
)
def test_usage_errors(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*args) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out


def test_validate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "r.yaml")
    assert call("validate", "r.yaml") == 0
    assert capsys.readouterr().out == "r.yaml is valid: run 'demo', 2 domains.\n"
    assert call("validate", "r.yaml", "train.steps=7", "--set", "seed=3", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recipe"]["train"]["steps"] == 7
    assert document["recipe"]["seed"] == 3


def test_validate_lists_every_problem(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "r.yaml")
    assert call("validate", "r.yaml", "train.lr=-1", "--set", "seed=-1") == 2
    shown = capsys.readouterr()
    assert shown.err == (
        "error: seed = -1: too small. Allowed: a whole number of at least 0 and below 2**63.\n"
        "error: train.lr = -1: too small. Allowed: a number above 0.\n"
        "2 problems.\n"
    )
    assert not shown.out


def test_a_failure_is_one_document_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("validate", "none.yaml", "--json") == 2
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "error": "RecipeError",
        "problems": ["recipe = 'none.yaml': no such file."],
    }


def test_init(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("init", "my run.yaml") == 0
    assert "Next: " in capsys.readouterr().out
    assert load_recipe("my run.yaml").name == "my-run"
    assert json.loads((here / "raymix.schema.json").read_text())["title"] == "raymix recipe"
    (here / "my run.yaml").write_text("mine")
    assert call("init", "my run.yaml") == 2
    assert "exists. Use --force" in capsys.readouterr().err
    assert (here / "my run.yaml").read_text() == "mine"
    assert call("init", "my run.yaml", "--force") == 0
    assert call("init", ".") == 2


@pytest.mark.parametrize("name", ["x.yaml", "_.yaml", "Ünï cödé.yml", "-a.b-.yaml", "sub/x.yaml"])
def test_init_finds_a_name_for_any_file(here: Path, name: str) -> None:
    assert call("init", "--", name) == 0
    load_recipe(name)


def test_schema(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["train"]
    assert call("schema", "--json") == 0
    assert json.loads(capsys.readouterr().out) == schema
    assert call("schema", "--out", "s.json") == 0
    assert json.loads((here / "s.json").read_text()) == schema


def test_doctor_reports_checks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert call("doctor", "--json") == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {"python", "ray", "torch", "cores", "memory", "disk", "gpus", "ray cluster"} <= {
        check["name"] for check in checks
    }
    for check in checks:
        assert check["verdict"] == "ok" or check["advice"]


def test_doctor_fails_where_no_cluster_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--address", "127.0.0.1:1") == 1
    assert "no Ray cluster answers there" in capsys.readouterr().out


def test_a_check_is_a_line_and_its_advice_another() -> None:
    check = doctor.Check("disk", "warn", "1 GB", "Free some.")
    assert doctor.line(check, color=False) == (
        "warn disk            1 GB\n                     Free some."
    )
    assert "\x1b[" in doctor.line(check, color=True)


@pytest.mark.parametrize(
    ("error", "code"),
    [(RecipeError("x"), 2), (CorpusError("x"), 2), (TrainingError("x"), 1), (KeyError("x"), 1),
     (OSError(errno.ENOSPC, "No space left on device", "/d/f"), 2), (KeyboardInterrupt(), 130)],
)  # fmt: skip
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Mapping[str, Any]:
        raise error

    assert finish(work) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_document_may_stand_for_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(lambda: {"ok": False}, json=True, failed=lambda d: not d["ok"]) == 1
    assert json.loads(capsys.readouterr().out) == {"ok": False}


def test_a_full_disk_is_explained() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/d/f")
    assert explain(error)[1] == [
        "/d/f: No space left on device. Free space there, or choose another directory."
    ]


def test_an_unexpected_error_leaves_its_traceback_in_a_file() -> None:
    def fail() -> None:
        raise KeyError("surprise")

    with pytest.raises(KeyError) as caught:
        fail()
    name, (message,), code = explain(caught.value)
    assert (name, code) == ("KeyError", 1)
    file = Path(message.rsplit(" ", 1)[-1])
    assert "in fail" in file.read_text()
    file.unlink()


def test_an_error_of_ours_is_found_inside_a_wrapper() -> None:
    inner = CorpusError("shard-0 = 3: corrupt.")
    outer = RuntimeError("worker died")
    outer.__cause__ = inner
    assert explain(outer) == ("CorpusError", ["shard-0 = 3: corrupt."], 2)
    wrapped = RuntimeError("task failed")
    wrapped.cause = inner  # type: ignore[attr-defined] # as Ray's task errors carry it
    assert explain(wrapped)[0] == "CorpusError"


def test_documents_become_plain_json() -> None:
    import numpy as np

    given = {"a": np.float64("nan"), "b": np.arange(2), "c": Path("x"), 3: (1.5, float("inf"))}
    assert jsonable(given) == {"a": None, "b": [0, 1], "c": "x", "3": [1.5, None]}
    assert jsonable({"t": True, "n": None, "i": np.int64(3)}) == {"t": True, "n": None, "i": 3}


NOISY = """
import os, subprocess, sys, threading
from raymix.cli import _run
def work():
    print("for people")
    os.write(1, b"raylet\\n")
    subprocess.run(["echo", "a child"], check=True)
    return {"answer": 42, "text": "\\u00e9"}
if __name__ == "__main__":
    _run.own_process()
    _run.run_command(work, json="--json" in sys.argv)
    os.write(1, b"after the work\\n")
"""


def test_with_json_stdout_is_one_document_whoever_writes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISY, "--json"], capture_output=True, check=True, text=True
    )
    assert json.loads(done.stdout) == {"answer": 42, "text": "é"}
    for words in ("for people", "raylet", "a child", "after the work"):
        assert words in done.stderr


def test_without_json_stdout_is_for_people() -> None:
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, check=True, text=True)
    assert set(done.stdout.splitlines()) == {"raylet", "a child", "for people", "after the work"}


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m raymix schema | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
