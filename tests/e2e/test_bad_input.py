"""Bad input: one clear error, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.shell import QUICKSTART, Shell, write_recipe
from tests.unit.cli.test_cli import call

Refused = Callable[..., None]


@pytest.fixture
def refused(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Return a call of the command line, in this process, that must end as bad input does."""
    monkeypatch.chdir(shell.cwd)

    def check(*args: str, says: tuple[str, ...]) -> None:
        code, (out, err) = call(*args), capsys.readouterr()
        assert code == 2, f"{args}: {code}\n{out}\n{err}"
        assert "Traceback" not in out + err
        for words in says:
            assert words in err, f"{words!r} not in {err!r}"

    return check


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stesp=5", ("train.stesp", "train.steps")),
        ("mixer={kind: pyke}", ("mixer.kind", "pyke", "static")),
        ("corpus.domains.0.train=nowhere/x.parquet", ("nowhere/x.parquet",)),
        ("corpus.domains.0.train=nowhere/*.parquet", ("nowhere/*.parquet",)),
        ("mixer={kind: static, weights: {books: 0.5, python: 0.2}}", ("0.7",)),
        ("mixer={kind: static, weights: {boks: 1.0}}", ("boks", "books")),
        ("train.steps=abc", ("train.steps", "abc")),
        ("train.lr=-1", ("train.lr", "-1")),
    ],
)
def test_validate_or_prepare_refuses(
    override: str, says: tuple[str, ...], shell: Shell, refused: Refused
) -> None:
    refused("prepare", "tiny.yaml", "corpus.path=bad", override, says=says)
    assert not (shell.cwd / "bad" / "manifest.json").exists()


def test_wrong_column_lists_those_found(shell: Shell, refused: Refused) -> None:
    refused(
        "prepare",
        "tiny.yaml",
        "corpus.path=bad-column",
        "corpus.domains.0.text_column=content",
        says=("content", "id", "text"),
    )


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data.max_epochs=0.01",), ("max_epochs",)),
        (("data.sequence_length=4096", "model.config.max_position_embeddings=128"), ("128",)),
        (("corpus.tokenizer={train: bpe, vocab_size: 600}",), ("tokenizer",)),
        (("cluster.workers=64", "data.rows_per_step=64"), ("takes 64 CPUs", "this machine has")),
    ],
)
def test_plan_and_train_refuse(
    command: str, overrides: tuple[str, ...], says: tuple[str, ...], shell: Shell, refused: Refused
) -> None:
    refused(command, "tiny.yaml", "name=refused", *overrides, says=says)
    assert not (shell.cwd / "runs" / "refused" / "metrics.jsonl").exists()


def test_empty_domain(shell: Shell, refused: Refused) -> None:
    (shell.cwd / "empty.jsonl").write_text("")
    refused(
        "prepare",
        "tiny.yaml",
        "corpus.path=bad-empty",
        f"corpus.domains.0.train={shell.cwd / 'empty.jsonl'}",
        says=("books",),
    )


def test_run_directory_of_another_recipe(shell: Shell, refused: Refused) -> None:
    few = ("cluster.workers=0", "train.steps=3", "name=taken")
    shell.ok("train", "tiny.yaml", *few)
    refused("train", "tiny.yaml", *few, "train.lr=0.5", says=("train.lr", "--if-exists"))


def test_disk_full_while_preparing(shell: Shell, tmp_path: Path) -> None:
    """A file-size limit stands for a full disk: the write fails and nothing is left behind."""
    recipe = write_recipe(tmp_path / "full.yaml")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from raymix.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", str(recipe), "--parallelism", "0"],
        cwd=tmp_path,
        env=shell.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "corpus" / "manifest.json").exists()


def test_glob_without_match_says_what_is_there(shell: Shell, refused: Refused) -> None:
    refused(
        "prepare",
        "tiny.yaml",
        "corpus.path=bad-glob",
        f"corpus.domains.0.train={QUICKSTART / 'train' / '*.jsonl'}",
        says=("*.jsonl", "books.parquet"),
    )
