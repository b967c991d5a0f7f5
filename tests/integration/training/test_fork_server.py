"""Processes that are forked end, fail and are killed as processes that are started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymix._utils.fork_server import setup_worker
from raymix._utils.fork_server.server import Preload, can_fork, spawned_server

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes cannot be forked here")

# What a worker of Ray may be: tells about itself, then ends as its first argument says.
SCRIPT = """
import json, os, sys, time
print(json.dumps({
    "pid": os.getpid(), "group": os.getpgid(0), "parent": os.getppid(), "argv": sys.argv,
    "x": os.environ.get("X"), "cwd": os.getcwd(), "loaded": "fractions" in sys.modules,
}), flush=True)
how = sys.argv[1]
if how == "wait":
    time.sleep(60)
if how == "signal":
    os.kill(os.getpid(), 9)
if how == "raise":
    raise ValueError("as it was asked")
if how == "words":
    sys.exit("no more")
sys.exit(int(how))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with spawned_server(Preload([], ["fractions"], hook="gc:collect")) as path:
        yield path


def asking(
    server: str, tmp_path: Path, *arguments: str, **variables: str
) -> subprocess.Popen[bytes]:
    """Start what Ray's node manager starts in place of a worker."""
    (tmp_path / "worker.py").write_text(SCRIPT)
    (tmp_path / "setup.py").write_text("import sys; print('set up by Ray', sys.argv[1:])")
    environment = {
        **os.environ,
        setup_worker.SERVER: server,
        setup_worker.WORKER_SCRIPT: str(tmp_path / "worker.py"),
        setup_worker.SETUP_SCRIPT: str(tmp_path / "setup.py"),
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, setup_worker.__file__, *arguments],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen[bytes]) -> tuple[int, dict[str, object], str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, json.loads(out), err.decode()


def test_a_fork_is_the_process_that_was_asked_for(server: str, tmp_path: Path) -> None:
    process = asking(server, tmp_path, "3", "--more=1", X="given")
    code, seen, err = ended(process)
    assert (code, err) == (3, "")
    assert seen["argv"] == [str(tmp_path / "worker.py"), "3", "--more=1"]
    assert seen["x"] == "given"
    assert seen["cwd"] == str(tmp_path)
    assert seen["loaded"] is True
    # A group of its own: Ray ends a worker by its process group.
    assert seen["group"] == seen["pid"] != process.pid


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("0", 0, ""),
        ("signal", -signal.SIGKILL, ""),
        ("raise", 1, "ValueError: as it was asked"),
        ("words", 1, "no more"),
    ],
)
def test_it_ends_as_a_process_would(
    server: str, tmp_path: Path, how: str, code: int, words: str
) -> None:
    returned, _, err = ended(asking(server, tmp_path, how))
    assert returned == code
    assert words in err


def test_it_is_killed_with_the_one_that_asked(server: str, tmp_path: Path) -> None:
    process = asking(server, tmp_path, "wait")
    assert process.stdout is not None
    pid = json.loads(process.stdout.readline())["pid"]
    process.kill()
    process.communicate()
    until = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_forks_of_a_job_have_one_parent(server: str, tmp_path: Path) -> None:
    parents = [
        ended(asking(server, tmp_path, "0", RAY_JOB_ID=job))[1]["parent"] for job in ("1", "1", "2")
    ]
    assert parents[0] == parents[1] != parents[2]


def test_a_runtime_environment_of_variables_is_set(server: str, tmp_path: Path) -> None:
    context = {"env_vars": {"X": "${TERM}-${UNSET_VARIABLE}"}, "py_executable": sys.executable}
    option = f"--serialized-runtime-env-context={json.dumps(context)}"
    process = asking(server, tmp_path, "0", option, "--language=PYTHON", TERM="dumb")
    code, seen, _ = ended(process)
    assert (code, seen["x"]) == (0, "dumb-")
    assert seen["argv"] == [str(tmp_path / "worker.py"), "0"]


def test_more_than_variables_is_set_up_by_ray(server: str, tmp_path: Path) -> None:
    context = {"env_vars": {"X": "1"}, "py_executable": "uv run python"}
    option = f"--serialized-runtime-env-context={json.dumps(context)}"
    out, _ = asking(server, tmp_path, "0", option, "--language=PYTHON").communicate(timeout=60)
    given = [option, "--language=PYTHON", str(tmp_path / "worker.py"), "0"]
    assert out.decode().strip() == f"set up by Ray {given}"


def test_without_a_server_the_worker_starts_as_usual(tmp_path: Path) -> None:
    process = asking(str(tmp_path / "none"), tmp_path, "5", X="given")
    code, seen, _ = ended(process)
    assert (code, seen["x"], seen["loaded"]) == (5, "given", False)
    assert seen["pid"] == process.pid


def test_forks_draw_numbers_of_their_own(tmp_path: Path) -> None:
    script = tmp_path / "draw.py"
    script.write_text(
        "import random, sys, numpy as np, ray\n"
        "assert 'ray.data' in sys.modules\n"
        "print(ray.WorkerID.from_random().hex(), random.random(), np.random.rand())\n"
    )
    loader = "raymix._utils.compat.ray_core:load_before_forks"
    with spawned_server(Preload([], ["ray.data"], loader)) as path:
        own = {setup_worker.SERVER: path, setup_worker.WORKER_SCRIPT: str(script)}
        drawn = [
            subprocess.run(
                [sys.executable, setup_worker.__file__],
                env={**os.environ, **own, "RAY_JOB_ID": "1"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            for _ in range(2)
        ]
    assert all(len(one) == 3 for one in drawn)
    assert not set(drawn[0]) & set(drawn[1])


OWNER = """
import sys, time
from raymix._utils.fork_server.server import Preload, spawned_server
with spawned_server(Preload(["json"])) as path:
    print(path, flush=True)
    time.sleep(60)
"""


def test_the_server_ends_with_its_owner() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        path = owner.stdout.readline().decode().strip()
        owner.kill()
    until = time.monotonic() + 30
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            try:
                client.connect(path)
            except ConnectionRefusedError:
                break
        assert time.monotonic() < until
        time.sleep(0.05)
    Path(path).unlink()
    Path(path).parent.rmdir()


def test_nothing_is_left_of_a_server(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("")
    with spawned_server(Preload(["json"])) as path:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(path)
                request = {"argv": [str(script)], "env": {}, "cwd": "/"}
                socket.send_fds(client, [json.dumps(request).encode()], [0, 1, 2])
                assert client.recv(4)
                assert client.recv(4) == bytes(4)
    assert not Path(path).parent.exists()
