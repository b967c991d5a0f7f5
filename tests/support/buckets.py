"""An S3-compatible store on this machine: moto's server in a process of its own."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs
import pytest

BUCKET = "raymix-tests"
SECRET = "planted-secret-key"
_READY = re.compile(rb"Running on (http://127\.0\.0\.1:\d+)")


@contextmanager
def bucket() -> Iterator[dict[str, str]]:
    """Yield the environment that finds the store, which has one empty bucket: `BUCKET`.

    Like any user's, it holds address and credentials; nothing else in a test names them.
    """
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield _environment(_address(server, log.fileno()))
        finally:
            server.terminate()
            server.wait(30)


def _address(server: subprocess.Popen[bytes], log: int) -> str:
    """Return the address the server says that it listens at."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and server.poll() is None:
        if match := _READY.search(os.pread(log, 1 << 16, 0)):
            return match[1].decode()
        time.sleep(0.05)
    pytest.fail(f"moto's server does not start: {os.pread(log, 1 << 16, 0).decode()}")


def _environment(address: str) -> dict[str, str]:
    makes = pafs.S3FileSystem(
        access_key="maker",
        secret_key="maker",
        endpoint_override=address,
        region="us-east-1",
        allow_bucket_creation=True,
    )
    makes.create_dir(BUCKET)
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def forbidding() -> Iterator[None]:
    """Have the store let in only whom it knows, which is nobody."""
    _let_in(0)
    try:
        yield
    finally:
        _let_in(math.inf)


def _let_in(requests: float) -> None:
    """Have the store check credentials after so many requests."""
    url = os.environ["AWS_ENDPOINT_URL"] + "/moto-api/reset-auth"
    plain = {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, str(requests).encode(), plain, method="POST")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def put(url: str, directory: Path) -> None:
    """Copy a directory to a URL."""
    copy(directory.as_uri(), url)


def copy(source: str, target: str) -> None:
    """Copy what lies at a URL to another."""
    (here, path), (there, place) = (pafs.FileSystem.from_uri(url) for url in (source, target))
    pafs.copy_files(path, place, source_filesystem=here, destination_filesystem=there)
