"""Shared fixtures: markers by folder, one Ray cluster per session, a prepared corpus.

Fixtures import what they need themselves: pytest loads this file before the environment is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.shell import Shell

# Read when Ray, torch and numpy are imported, so they must stand before any test module is.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="20",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_ENABLE_AUTO_CONNECT="0",
    RAY_AIR_NEW_OUTPUT="0",
    TOKENIZERS_PARALLELISM="true",
    HF_HUB_OFFLINE="1",
    # Threads that wait by spinning take the cores of the other test process.
    GOMP_SPINCOUNT="1000",
    OPENBLAS_NUM_THREADS="1",
)

# How long an example takes is the machine's affair; timing is never asserted in unit tests.
# Where nobody looks for the cause at once, a run fails for the code alone, not for what was drawn.
settings.register_profile("raymix", deadline=None, derandomize="CI" in os.environ)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("raymix")

TESTS = Path(__file__).parent
MARKERS = {"unit", "integration", "e2e", "gpu", "ray"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the folders it lies in."""
    for item in items:
        for folder in MARKERS.intersection(item.path.relative_to(TESTS).parts):
            item.add_marker(folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    from tests.support.paths import SHARED_DATA

    if not SHARED_DATA.exists():
        pytest.skip(f"no larger real corpora at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that holds a prepared corpus and the recipe `tiny.yaml`."""
    from tests.support.shell import Shell, write_recipe

    path = tmp_path_factory.mktemp("workspace")
    write_recipe(path / "tiny.yaml")
    Shell(path).ok("prepare", "tiny.yaml")
    return path


@pytest.fixture(scope="session")
def shell(workspace: Path) -> Shell:
    """Return the command line without a cluster; tests under `ray/` have one with it."""
    from tests.support.shell import Shell

    return Shell(workspace)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """Start an S3-compatible server, and return the URL of its bucket."""
    from tests.support import buckets

    with buckets.bucket() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"s3://{buckets.BUCKET}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    from contextlib import ExitStack

    import ray

    from raymix._utils.compat.ray_core import workers_from
    from raymix._utils.fork_server.server import can_fork
    from tests.support.forked import fork_server

    with ExitStack() as stack:
        # A test's command has half a dozen processes, which would load their modules one by one.
        if can_fork():
            stack.enter_context(workers_from(fork_server()[0]))
        ray.init(
            num_cpus=4,
            object_store_memory=200_000_000,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            namespace="raymix-tests",
        )
        yield
        ray.shutdown()
