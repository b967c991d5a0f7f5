"""Jobs on a real cluster with token authentication, by the commands a user types."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.local_cluster import LocalCluster, local_cluster
from tests.support.shell import steps_of, wait_for

pytestmark = pytest.mark.timeout(1500)

WORDS = "the quick brown fox jumps over the lazy dog and goes home to sleep until the morning. "


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster((2,)) as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jobs") / "project"
    (root / "data").mkdir(parents=True)
    for name in ("books", "notes"):
        lines = "".join(f"{name} {number}: {WORDS}\n" for number in range(400))
        (root / "data" / f"{name}.txt").write_text(lines)
    (root / "data" / "key.secret").write_text("hunter2")
    (root / ".gitignore").write_text("*.secret\n")
    (root / "my.yaml").write_text(yaml.safe_dump(recipe()))
    # What Python compiles there did not travel.
    body = "every = (p for p in Path('.').rglob('*') if p.is_file() and p.suffix != '.pyc')"
    body += "; print('TRAVELED', sorted(map(str, every)))"
    code = f"from pathlib import Path\nimport raymix\n\ndef recipe():\n    {body}\n"
    code += "    return raymix.load_recipe('my.yaml')\n"
    (root / "made.py").write_text(code)
    return root


def recipe() -> dict[str, Any]:
    domains = [
        {"name": name, "train": f"data/{name}.txt", "text_unit": "line"}
        for name in ("books", "notes")
    ]
    return {
        "name": "job",
        "corpus": {"path": "corpus", "domains": domains},
        "data": {"sequence_length": 32, "rows_per_step": 4},
        "model": {"config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
        "train": {"steps": 4},
        "cluster": {"workers": 0, "address": "10.1.2.3:6379"},
    }


class Here:
    """`raymix` as typed in the project."""

    def __init__(self, cluster: LocalCluster, project: Path, **environment: str) -> None:
        self._cluster, self._project = cluster, project
        self._environment = {**os.environ, **cluster.environment, **environment}

    def command(self, *words: str) -> list[str]:
        at = words.index("--") if "--" in words else len(words)
        address = ("--address", self._cluster.address)
        return [sys.executable, "-m", "raymix", *words[:at], *address, *words[at:]]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=self._project,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )

    def json(self, *words: str, code: int = 0) -> dict[str, Any]:
        done = self.run(*words[:1], "--json", *words[1:])
        assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            cwd=self._project,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Tests that a script runs in the background are deaf to Ctrl-C, and so are children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


@pytest.fixture(scope="module")
def here(cluster: LocalCluster, project: Path) -> Here:
    return Here(cluster, project)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


def test_a_run_is_submitted_followed_and_left_in_the_storage(
    here: Here, cluster: LocalCluster, storage: Path
) -> None:
    words = ("train", "my.yaml", "train.steps=6", "--storage", str(storage), "--follow")
    done = here.run("submit", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 6/6" in done.stdout
    assert "SUCCEEDED, exit code 0" in done.stdout
    run = storage / "runs" / "job"
    assert len(steps_of(run)) == 6
    assert (run / "report.json").exists()
    job = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("job: "))
    listed = here.json("status")["jobs"]
    assert job in [item["job"] for item in listed]
    assert here.json("status", job)["exit_code"] == 0
    assert here.json("logs", job)["logs"] in done.stdout
    # The token is nowhere but in its own file.
    token = (cluster.folder / "token").read_text()
    written = [p for p in [*storage.rglob("*"), *cluster.folder.rglob("*.log")] if p.is_file()]
    assert written
    assert not [path for path in written if token.encode() in path.read_bytes()]
    assert token not in done.stdout + done.stderr


def test_the_project_travels_and_what_is_ignored_does_not(here: Here) -> None:
    document = here.json(
        "submit", "validate", "made:recipe", "corpus.path=/c", "run.dir=/r", "--follow"
    )
    assert document["status"] == "SUCCEEDED"
    assert document["files"] == 5
    logs = here.json("logs", document["job"])["logs"]
    expected = ["'.gitignore'", "'data/books.txt'", "'data/notes.txt'", "'made.py'", "'my.yaml'"]
    assert ", ".join(expected) in logs
    assert "secret" not in logs


def test_the_exit_code_is_the_jobs(here: Here, storage: Path) -> None:
    wrong = ("data.max_epochs=0.0001", "--storage", str(storage), "--follow")
    document = here.json("submit", "train", "my.yaml", *wrong, code=2)
    assert (document["status"], document["exit_code"]) == ("FAILED", 2)
    assert "max_epochs" in here.json("logs", document["job"])["logs"]
    options = here.json(
        *("submit", "train", "my.yaml", "--follow", "--storage", str(storage)),
        *("--", "--no-such-option"),
        code=2,
    )
    assert options["status"] == "FAILED"


def test_ctrl_c_leaves_the_job_and_stop_ends_it_with_a_checkpoint(
    here: Here, storage: Path
) -> None:
    words = ("train", "my.yaml", "train.steps=100000", "--storage", str(storage), "--follow")
    run = storage / "runs" / "job"
    following = here.start("submit", *words)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(steps_of(run)) > 20,
             seconds=500, what="twenty steps")  # fmt: skip
    following.send_signal(signal.SIGINT)
    said, _ = following.communicate(timeout=180)
    assert following.returncode == 130
    assert "The job goes on" in said
    job = next(line.split()[1] for line in said.splitlines() if line.startswith("job: "))
    assert here.json("status", job)["status"] == "RUNNING"
    assert here.json("stop", job)["status"] == "STOPPED"
    assert list((run / "checkpoints").glob("step-*"))
    assert here.json("stop", job)["status"] == "STOPPED"
    assert here.run("logs", job, "--follow").returncode == 130


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "Invalid"),
    ],
)
def test_without_the_token_nobody_gets_in(
    cluster: LocalCluster, project: Path, environment: dict[str, str], says: str
) -> None:
    stranger = Here(cluster, project, **environment)
    for words in (("status",), ("logs", "x"), ("submit", "validate", "my.yaml")):
        done = stranger.run(*words)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_an_unknown_job_is_bad_input(here: Here) -> None:
    for name in ("status", "logs", "stop"):
        done = here.run(name, "nope")
        assert done.returncode == 2, done.stderr
        assert "nope" in done.stderr
        assert "no such job" in done.stderr
