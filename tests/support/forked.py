"""`python ...` as a fork of a process that has loaded what most commands need.

Half of what a test of the command line takes is loading torch and transformers. A command that is
forked has the same arguments, environment, streams and exit code. Where its environment says
something that a library reads when it is loaded, it is started by Python as usual.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from raymix._utils.fork_server.server import ANSWER, can_fork, spawned_server
from raymix.training.launch.preload import PRELOAD

_MAIN = str(Path(__file__).with_name("forked_main.py"))
_MODULES = (
    "transformers.models.llama.modeling_llama",
    "scipy.optimize",
    "matplotlib.figure",
    "raymix.training.api",
    "raymix.training.launch.local",
    "raymix.report",
    "raymix.corpus",
    "raymix.merging",
    "raymix.laws",
)
# Read by Ray, which is loaded after the fork, and by pytest.
_LATE = {"RAY_ADDRESS", "PYTEST_CURRENT_TEST"}


@functools.cache
def fork_server() -> tuple[str, dict[str, str]]:
    """Return the path of this process' server, and the environment that it was started in."""
    stack = ExitStack()
    preload = replace(PRELOAD, modules=[*PRELOAD.modules, *_MODULES])
    path = stack.enter_context(spawned_server(preload))
    atexit.register(stack.close)
    return path, _early(os.environ)


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _LATE}


def run_python(
    arguments: Sequence[str],
    *,
    cwd: Path | str,
    environment: Mapping[str, str],
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` to its end, and return its exit code and output."""
    command = [sys.executable, *arguments]
    if not can_fork() or _early(environment) != fork_server()[1]:
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    # Files, because nobody reads a pipe while the command runs.
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        open(os.devnull) as null,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
    ):
        request = {"argv": [_MAIN, *arguments], "env": dict(environment), "cwd": str(cwd)}
        connection.settimeout(timeout)
        connection.connect(fork_server()[0])
        streams = [null.fileno(), out.fileno(), err.fileno()]
        socket.send_fds(connection, [json.dumps(request).encode()], streams)
        started = connection.recv(ANSWER.size)
        ended = connection.recv(ANSWER.size)
        assert started, "the server of forks has ended"
        assert ended, "the server of forks has ended"
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode().replace("\r\n", "\n"))
        return subprocess.CompletedProcess(command, ANSWER.unpack(ended)[0], *texts)
