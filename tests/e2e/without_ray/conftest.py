"""The command line without a cluster: these tests run two at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import buckets
from tests.e2e.conftest import Shell


@pytest.fixture(scope="session")
def shell(workspace: Path) -> Shell:
    return Shell(workspace)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """Start an S3-compatible server, and return the URL of its bucket."""
    with buckets.bucket() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"s3://{buckets.BUCKET}"
