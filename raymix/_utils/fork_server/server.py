"""The server: a process that has loaded modules, and forks for whoever asks at its socket.

A request is one message, a JSON document {"argv": [script, ...], "env": {...}, "cwd": path}, with
the three standard streams as descriptors. The answers are the new process' id, and its exit code
when it has ended. A request with a "group" is for a process of Ray, which reads its job from the
environment when it is loaded: each group has a process between the server and its forks, which
loads Ray for that job once.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from raymix._utils.compat.cpython import end_process
from raymix._utils.imports import import_modules

ANSWER = struct.Struct("!i")
MAX_REQUEST_BYTES = 1 << 17
_STREAMS = 3
_BACKLOG = 64
_REQUEST_TIMEOUT_S = 10.0
_START = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from {__name__} import serve
serve()
"""
# A job's process has nothing to do once the job has ended, but a job may pause between actors.
_IDLE_GROUP_S = 20.0


@dataclass(frozen=True, slots=True)
class Preload:
    """What the processes have loaded when they start."""

    modules: Sequence[str]
    """By the server, so they must be free of Ray."""
    group_modules: Sequence[str] = field(default=())
    """By the process of each group."""
    loader: str = f"{__name__}:load"
    """`module:function` that loads those, and returns False if the process must not be forked."""
    hook: str = ""
    """`module:function`, called in each process of a group before its script runs."""


def can_fork() -> bool:
    """Return whether processes can be forked from one that has loaded torch.

    Only on Linux, whose process descriptors the server waits on, and not where there is a GPU: CUDA
    does not survive a fork, and libraries may start it when they are loaded.
    """
    return hasattr(os, "pidfd_open") and not Path("/proc/driver/nvidia").exists()


@contextmanager
def spawned_server(preload: Preload) -> Iterator[str]:
    """Run a server and yield the path of its socket, which it answers once it has its modules.

    A process of its own and no fork of this one: it loads them while this one goes on.
    """
    with _socket() as (path, listener):
        # With the same path: the working directory may hold modules of any name.
        given = [json.dumps(sys.path), str(listener.fileno()), json.dumps(asdict(preload))]
        server = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *given],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )
        listener.close()
        try:
            yield path
        finally:
            assert server.stdin is not None
            server.stdin.close()
            # It may still be loading, and would see only then that nobody needs it.
            server.terminate()
            server.wait()


@contextmanager
def _socket() -> Iterator[tuple[str, socket.socket]]:
    # A directory that only this user can enter: whoever reaches the socket can run code. In /tmp,
    # because a socket's path has at most 107 bytes, and schedulers set TMPDIR to long ones. Not a
    # TemporaryDirectory: the first fork that ends would remove it, as Python does at its end.
    directory = Path(tempfile.mkdtemp(prefix="raymix-", dir="/tmp"))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            path = str(directory / "fork")
            listener.bind(path)
            listener.listen(_BACKLOG)
            yield path, listener
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def load(modules: Sequence[str]) -> bool:
    """Import modules and return True."""
    import_modules(modules)
    return True


@dataclass(frozen=True, slots=True)
class _Request:
    document: dict[str, Any]
    streams: list[int]
    connection: socket.socket

    def close(self) -> None:
        """Close the descriptors here; the connection's other ends stay open."""
        for descriptor in self.streams:
            os.close(descriptor)
        self.connection.close()


class _Forker:
    """A loop that forks for each request, and tells whoever asked how the fork ended."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.running = 0

    def leave(self) -> None:
        """Close, in a new process, what belongs to the one that it was forked from."""
        for key in list(self.selector.get_map().values()):
            os.close(key.fd)
        self.selector.close()

    def fork(self, request: _Request, hook: str) -> None:
        """Start the process that a request asks for."""
        connection = request.connection
        pid = os.fork()
        if pid == 0:
            self.leave()
            connection.close()
            _run_script(request, hook)
        for descriptor in request.streams:
            os.close(descriptor)
        self.running += 1
        ended = os.pidfd_open(pid)
        with suppress(OSError):
            connection.send(ANSWER.pack(pid))

        def finish() -> None:
            self.running -= 1
            self.selector.unregister(ended)
            os.close(ended)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(KeyError):
                self.selector.unregister(connection)
            with suppress(OSError):
                connection.send(ANSWER.pack(code))
            connection.close()

        def abandon() -> None:
            # Whoever asked was killed, and cannot have meant this process to go on without it.
            self.selector.unregister(connection)
            signal.pidfd_send_signal(ended, signal.SIGKILL)

        self.selector.register(ended, selectors.EVENT_READ, finish)
        self.selector.register(connection, selectors.EVENT_READ, abandon)


class _Server(_Forker):
    """The server's process."""

    def __init__(self, listener: socket.socket, lifeline: int, preload: Preload) -> None:
        """Take over the process.

        Args:
            listener: The socket that requests come to.
            lifeline: A descriptor at whose end of file the server ends.
            preload: Modules and hook of the groups.
        """
        super().__init__()
        self._listener = listener
        self._lifeline = lifeline
        self._preload = preload
        self._groups: dict[str, socket.socket] = {}

    def run(self) -> None:
        """Load the modules, then answer requests until the lifeline ends."""
        with suppress(OSError):
            # Ctrl-C in a terminal is for the command, which ends its processes in order.
            os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        load(self._preload.modules)
        # Objects made so far stay shared between the processes: no collection writes to them.
        gc.freeze()
        self.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self.selector.register(self._lifeline, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.data is None:
                    return
                key.data()

    def _accept(self) -> None:
        connection = self._listener.accept()[0]
        connection.settimeout(_REQUEST_TIMEOUT_S)
        try:
            text, streams, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, _STREAMS)
            request = _Request(json.loads(text), streams, connection)
        except (OSError, ValueError):
            connection.close()
            return
        group = request.document.get("group")
        if group is None:
            self.fork(request, "")
            return
        if group not in self._groups:
            self._groups[group] = self._start_group(group, request)
        # Without its process the request is dropped, and whoever asked starts one without a fork.
        with suppress(OSError):
            socket.send_fds(self._groups[group], [text], [*streams, connection.fileno()])
        request.close()

    def _start_group(self, group: str, first: _Request) -> socket.socket:
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            self.leave()
            own.close()
            first.close()
            try:
                _Group(other, self._preload).run(first.document)
            finally:
                os._exit(0)
        other.close()
        ended = os.pidfd_open(pid)

        def finish() -> None:
            self.selector.unregister(ended)
            os.close(ended)
            os.waitpid(pid, 0)
            self._groups.pop(group).close()

        self.selector.register(ended, selectors.EVENT_READ, finish)
        return own

    def leave(self) -> None:
        """Close what belongs to the server."""
        super().leave()
        for channel in self._groups.values():
            channel.close()


class _Group(_Forker):
    """The process of one job of Ray."""

    def __init__(self, channel: socket.socket, preload: Preload) -> None:
        """Take over the process; the server sends its requests through `channel`."""
        super().__init__()
        self._channel = channel
        self._preload = preload

    def run(self, first: dict[str, Any]) -> None:
        """Load the modules in the environment of the first request, and answer requests."""
        _set_environment(first)
        if not _function(self._preload.loader)(self._preload.group_modules):
            return
        gc.freeze()
        self.selector.register(self._channel, selectors.EVENT_READ)
        while True:
            events = self.selector.select(_IDLE_GROUP_S)
            if not events and not self.running:
                return
            for key, _ in events:
                if key.data is not None:
                    key.data()
                    continue
                text, descriptors, _, _ = socket.recv_fds(
                    self._channel, MAX_REQUEST_BYTES, _STREAMS + 1
                )
                if not text:
                    return
                *streams, connection = descriptors
                self.fork(
                    _Request(json.loads(text), streams, socket.socket(fileno=connection)),
                    self._preload.hook,
                )


def _set_environment(document: dict[str, Any]) -> None:
    os.chdir(document["cwd"])
    os.environ.clear()
    os.environ.update(document["env"])


def _run_script(request: _Request, hook: str) -> NoReturn:
    """Become the process that was asked for, and end with its exit code."""
    code = 1
    try:
        # Ray ends a worker with all of its process group.
        os.setpgid(0, 0)
        for number, descriptor in enumerate(request.streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _set_environment(request.document)
        if "numpy" in sys.modules:
            # Unlike that of `random`, its global generator goes on in a fork with the same numbers.
            sys.modules["numpy"].random.seed()
        if hook:
            _function(hook)()
        sys.argv = list(request.document["argv"])
        # As where Python starts a script.
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = _exit_code(end)
    except BaseException:  # noqa: BLE001 - the end of a process, where Python prints any error
        traceback.print_exc()
    end_process(code)


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _exit_code(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def serve() -> None:
    """Be the server that `spawned_server` has started."""
    listener, preload = int(sys.argv[2]), Preload(**json.loads(sys.argv[3]))
    _Server(socket.socket(fileno=listener), 0, preload).run()
