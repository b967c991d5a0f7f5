"""Shared fixtures: tiers by folder, one Ray cluster per session, the shared real data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

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
TIERS = ("unit", "ray", "e2e", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        if tier in TIERS:
            item.add_marker(tier)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = TESTS.parent.parent / "shared" / "data"
    if not path.exists():
        pytest.skip(f"the shared real data is not at {path}")
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

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
