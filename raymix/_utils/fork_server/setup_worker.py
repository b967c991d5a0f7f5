"""A process of Ray, forked by the server of `server.py` instead of started by Python.

Ray's node manager runs this file in place of its own two scripts: one that sets the environment of
a worker, whose name this file must have, because the node manager leaves it out by its name where
there is nothing to set, and one that is the worker. It asks the server, waits until the fork has
ended, and ends in the same way. It is a script, so it imports nothing of raymix.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import sys

# Set by `raymix._utils.compat.ray_core.workers_from`: the server, and Ray's own two scripts.
SERVER, SETUP_SCRIPT, WORKER_SCRIPT = (
    f"RAYMIX_FORK_{name}" for name in ("SERVER", "SETUP_SCRIPT", "WORKER_SCRIPT")
)
_ANSWER = struct.Struct("!i")
_CONTEXT = "--serialized-runtime-env-context="


def main() -> None:
    """Ask for a fork; start the worker as Ray would where there is none to be had."""
    given = sys.argv[1:]
    arguments = [each for each in given if each != __file__ and not each.startswith("--language=")]
    context = next((each for each in arguments if each.startswith(_CONTEXT)), None)
    if context is not None:
        arguments.remove(context)
    worker = [os.environ[WORKER_SCRIPT], *arguments]
    environment = dict(os.environ)
    if context is not None and not _apply(json.loads(context[len(_CONTEXT) :]), environment):
        language = [each for each in given if each.startswith("--language=")]
        _execute([os.environ[SETUP_SCRIPT], context, *language, *worker])
    # Ray reads these two when it is loaded, so they must be the same in all forks of a process.
    job = ":".join(environment.get(name, "") for name in ("RAY_RAYLET_PID", "RAY_JOB_ID"))
    request = {"argv": worker, "env": environment, "cwd": os.getcwd(), "group": job}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(os.environ[SERVER])
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        forked = bool(connection.recv(_ANSWER.size))
    except OSError:
        forked = False
    if not forked:
        os.environ.update(environment)
        _execute(worker)
    answer = connection.recv(_ANSWER.size)
    code = _ANSWER.unpack(answer)[0] if answer else 1
    if code < 0:
        os.kill(os.getpid(), -code)
        signal.pause()
    sys.exit(code)


def _apply(context: dict[str, object], environment: dict[str, str]) -> bool:
    """Set the variables of a runtime environment; return False if it asks for more than those."""
    variables = context.pop("env_vars", None)
    if context.pop("py_executable", None) not in (None, sys.executable) or any(context.values()):
        return False
    for name, value in variables.items() if isinstance(variables, dict) else ():
        # As Ray's own script: values may refer to other variables, and unset ones are empty.
        environment[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    return True


def _execute(command: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main()
