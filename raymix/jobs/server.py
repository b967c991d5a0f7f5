"""Client of a Ray cluster's job server: submit, inspect, follow, stop.

A token (RAY_AUTH_MODE=token) is sent to this machine in any case, elsewhere only over TLS.
"""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import SplitResult, urlsplit

from raymix.errors import ClusterError
from raymix.jobs.package import pack
from raymix.jobs.submission import Submission

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_PORT = 8265
_CONNECT_S = 5.0
_POLL_S = 0.5
_RECONNECT_S = 60.0
# Time for a run to write its checkpoint after `stop`; Ray's default is 3 seconds.
_STOP_S = 120
_BEARER = re.compile(r"(?i)(bearer\s+)[^\s'\"<>,;]+")
# 130 as after Ctrl-C: a run that was stopped has a checkpoint and can go on.
_ENDS = {"SUCCEEDED": 0, "STOPPED": 130}


@dataclass(frozen=True, slots=True)
class JobEnd:
    """The state of a job."""

    job: str
    """Its name."""
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    exit_code: int | None
    """Of its command; None while it runs. 130 for a job that was stopped."""
    message: str
    """The cluster's message about it."""
    document: dict[str, Any]
    """All details, for `--json`."""


class JobServer:
    """The job server at an address."""

    def __init__(self, address: str | None = None, *, token_in_clear: bool = False) -> None:
        """Connect.

        Args:
            address: `http://HOST:PORT` of the cluster's dashboard; left out,
                RAY_API_SERVER_ADDRESS, else port 8265 of this machine.
            token_in_clear: Allow a token to cross the network without TLS.

        Raises:
            ClusterError: If the address is invalid, nothing answers there, or the token is refused.
        """
        chosen = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
        self.address = checked_address(chosen, token_in_clear=token_in_clear)
        _check_listening(self.address)
        self._client = _connect(self.address)

    def submit(self, submission: Submission) -> int:
        """Send the project and start the job; return the bytes of the archive.

        Raises:
            RecipeError: If the project is too large.
            ClusterError: If the cluster refuses it.
        """
        with tempfile.TemporaryDirectory(prefix="raymix-job-") as folder:
            archive = Path(folder) / "project.zip"
            size = pack(submission.listing, archive)
            environment = {
                "working_dir": str(archive),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), "PYTHONUNBUFFERED": "1"},
            }
            with _refusals("job", submission.name):
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=submission.name,
                    runtime_env=environment,
                    metadata={"raymix": submission.command},
                )
        return size

    def state(self, job: str) -> JobEnd:
        """Return the state of `job`.

        Raises:
            ClusterError: If there is no such job.
        """
        with _refusals("job", job):
            return _ended(self._client.get_job_info(job))

    def jobs(self) -> list[JobEnd]:
        """Return all jobs that were submitted, the newest first."""
        with _refusals("address", self.address):
            details: list[Any] = self._client.list_jobs()
            # Ray lists programs that called `ray.init`, too; they have no submission id.
            submitted = [_ended(item) for item in details if item.submission_id]
        return sorted(submitted, key=lambda item: -(item.document["started"] or 0.0))

    def logs(self, job: str) -> str:
        """Return the output of `job` so far."""
        with _refusals("job", job):
            return str(self._client.get_job_logs(job))

    def follow(self, job: str, write: Callable[[str], object]) -> JobEnd:
        """Pass the output of `job` to `write` until it ends, and return its final state.

        Reconnects after a lost connection; nothing is passed twice.

        Raises:
            ClusterError: If the server is unreachable for a minute; the job goes on.
        """
        done, lost_at = 0, None
        while True:
            try:
                # Ray sends a log from its start at each connection.
                for text in _stream(self._client, job, skip=done):
                    write(text)
                    done, lost_at = done + len(text), None
                # A stream may end before its job, so only the state tells that it is over.
                ended = self.state(job)
                if ended.exit_code is not None:
                    return ended
                lost_at = None
            except (ClusterError, RuntimeError, OSError) as error:
                # RuntimeError is what Ray's client raises when the socket closes midway.
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _RECONNECT_S:
                    raise ClusterError.at(
                        "job",
                        job,
                        f"the connection to {self.address} was lost: {_brief(error)}",
                        fix=f"The job may go on: raymix logs {job} --follow",
                    ) from error
            time.sleep(_POLL_S)

    def stop(self, job: str) -> JobEnd:
        """Stop `job`, waiting for a run to write its checkpoint, and return its final state.

        A job that has ended is left as it is.
        """
        with _refusals("job", job):
            self._client.stop_job(job)
        # Longer than Ray waits before it kills the job, so that its end is seen.
        deadline = time.monotonic() + _STOP_S + 30
        while (ended := self.state(job)).exit_code is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return ended


def checked_address(address: str, *, token_in_clear: bool = False) -> str:
    """Return the URL of a job server.

    Args:
        address: `http://HOST:PORT`, `https://...`, or `HOST:PORT`.
        token_in_clear: Allow a token to cross the network without TLS.

    Raises:
        ClusterError: If it is invalid, holds a password, or a token would go to another machine
            over plain HTTP.
    """
    # Without a scheme `urlsplit` takes `head:8265` for scheme and path.
    url = _split(address if "://" in address else f"http://{address}")
    if url is None:
        raise ClusterError.at(
            "address",
            _public(address),
            "no job server's",
            allowed="Allowed: http://HOST:PORT or https://HOST:PORT of the cluster's dashboard",
        )
    if url.hostname == "auto":
        fix = "Leave it out for this machine's, or that of RAY_API_SERVER_ADDRESS"
        raise ClusterError.at("address", address, "no job server's, but one of `ray.init`", fix=fix)
    # Addresses are printed and put into documents, where a password must not appear.
    if url.username or url.password:
        raise ClusterError.at(
            "address",
            _public(address),
            "an address is no place for a password",
            fix="Use RAY_AUTH_MODE=token and a token file",
        )
    host = url.hostname or ""
    # Any mode but "disabled": one that is unknown here may send a token as well.
    token = os.environ.get("RAY_AUTH_MODE", "disabled").lower() != "disabled"
    if token and url.scheme == "http" and not token_in_clear and not _loopback(host):
        raise ClusterError.at(
            "address",
            address,
            "the token would cross the network in the clear",
            fix=(
                "Use https, or a tunnel (kubectl port-forward, ssh -L) and 127.0.0.1, or say "
                "--token-in-clear where the network is yours"
            ),
        )
    # `urlsplit` removes the brackets of an IPv6 address.
    name = f"[{host}]" if ":" in host else host
    port = url.port or (443 if url.scheme == "https" else _PORT)
    return f"{url.scheme}://{name}:{port}{url.path.rstrip('/')}"


def _split(address: str) -> SplitResult | None:
    with suppress(ValueError):
        url = urlsplit(address)
        # Reading the port raises for one that is none.
        if url.scheme in ("http", "https") and url.hostname and (url.port or 1) > 0:
            return None if url.query or url.fragment else url
    return None


def _public(address: str) -> str:
    """Return an address without user name and password."""
    scheme, mark, rest = address.rpartition("://")
    # The last @ separates: a password that was not encoded may hold one.
    return scheme + mark + rest.rpartition("@")[2]


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    # Names are not looked up: the answer may be another when the request is sent.
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _check_listening(address: str) -> None:
    url = urlsplit(address)
    try:
        socket.create_connection((url.hostname or "", url.port or _PORT), _CONNECT_S).close()
    except OSError as error:
        raise ClusterError.at(
            "address",
            address,
            f"no job server answers there ({error.strerror or error})",
            fix="It is part of the dashboard: `ray start --head` where ray[default] is installed",
        ) from None


def _connect(address: str) -> JobSubmissionClient:
    # Ray's client needs it to follow logs, and says so too late.
    if importlib.util.find_spec("aiohttp") is None:
        wrong, advice = "installed without what jobs need", "pip install 'raymix[cluster]'"
        raise ClusterError.at("ray", "ray[default]", wrong, fix=advice)
    from ray.job_submission import JobSubmissionClient

    # Ray's client says on stderr what it uploads and when a stream ends; the commands say it.
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    with _refusals("address", address), _only(address):
        return JobSubmissionClient(address)


@contextmanager
def _only(address: str) -> Iterator[None]:
    """Keep Ray's client from preferring an address of the environment to the one it is given."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _refusals(field: str, value: str) -> Iterator[None]:
    """Turn what Ray's client raises into a ClusterError."""
    from ray.exceptions import AuthenticationError

    try:
        with _no_proxy_to_loopback():
            yield
    except AuthenticationError as error:
        raise ClusterError.at(
            field,
            value,
            f"the cluster refused the request: {_brief(error)}",
            fix=(
                "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the "
                "cluster's token "
                "(by default ~/.ray/auth_token)"
            ),
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, ClusterError):
            raise
        # Ray's client has no class for a missing job: only the text of its RuntimeError tells.
        text = str(error)
        if "404" in text and "does not exist" in text:
            raise ClusterError.at(
                field, value, "no such job there", fix="`raymix status` lists them"
            ) from error
        raise ClusterError.at(
            field, value, f"the cluster said: {_brief(error)}", fix=_proxy_advice(value)
        ) from error


@contextmanager
def _no_proxy_to_loopback() -> Iterator[None]:
    """Have requests to this machine go there directly, whatever proxy the environment names."""
    names = ("NO_PROXY", "no_proxy")
    before = {name: os.environ.get(name) for name in names}
    # Either spelling is read, and the first that is set wins.
    given = [value for value in before.values() if value]
    os.environ.update(dict.fromkeys(names, ",".join([*given, *_LOOPBACK_NAMES])))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _proxy_advice(address: str) -> str:
    """Return what to do about the proxy that requests to an address go through, if any."""
    # Values that are no address, such as a job's name, have no scheme.
    url = urlsplit(address)
    names = (f"{url.scheme}_proxy", f"{url.scheme}_proxy".upper(), "ALL_PROXY", "all_proxy")
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None or not url.hostname or _loopback(url.hostname):
        return ""
    return (
        f"The request went through the proxy of {name}; NO_PROXY={url.hostname} would go around it"
    )


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    # A server, or a proxy before it, may answer with what it was sent.
    return _BEARER.sub(r"\1...", lines[0] if lines else type(error).__name__)[:300]


def _stream(client: JobSubmissionClient, job: str, *, skip: int) -> Iterator[str]:
    """Yield what `job` prints beyond the first `skip` characters, until its log ends."""
    tail = cast("AsyncGenerator[str, None]", client.tail_job_logs(job))
    # One event loop for all of the log: a socket belongs to the loop in which it was opened.
    with asyncio.Runner() as runner:
        try:
            while (text := runner.run(_next(tail))) is not None:
                if skip < len(text):
                    yield text[skip:]
                skip = max(0, skip - len(text))
        finally:
            runner.run(tail.aclose())


async def _next(tail: AsyncGenerator[str, None]) -> str | None:
    return await anext(tail, None)


def _ended(details: Any) -> JobEnd:
    status = str(details.status)
    code = _ENDS.get(status)
    if status == "FAILED":
        code = details.driver_exit_code
        # A command that a signal ended, or one that never began, has no code of its own.
        code = code if code is not None and 0 < code < 256 else 1
    message = (details.message or "").strip()
    document = {
        "job": details.submission_id,
        "status": status,
        "exit_code": code,
        "message": message,
        "started": _seconds(details.start_time),
        "ended": _seconds(details.end_time),
        "entrypoint": details.entrypoint,
    }
    return JobEnd(details.submission_id, status, code, message, document)


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
