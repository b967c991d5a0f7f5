"""The command line without a cluster: these tests run two at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Shell


@pytest.fixture(scope="session")
def shell(workspace: Path) -> Shell:
    return Shell(workspace)
