"""The command line against the session's Ray cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.shell import Shell


@pytest.fixture(scope="session")
def shell(workspace: Path, ray_cluster: None) -> Shell:
    import ray

    return Shell(workspace, ray.get_runtime_context().gcs_address)
