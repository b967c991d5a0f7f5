"""The doctor's verdicts on machines that are fit and machines that are not."""

from __future__ import annotations

import resource
from importlib import metadata
from pathlib import Path

import pytest

from raymix.cli import doctor
from raymix.training.host import machine

GB = 10**9


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make this machine a small one: one core, little memory, little of everything."""
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr(machine, "memory", lambda: (4 * GB, 1 * GB))
    monkeypatch.setattr(machine, "disk_free", lambda path: 10**8)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1_048_576))
    return monkeypatch


def verdicts(checks: list[doctor.Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def test_a_small_machine_is_warned_with_what_to_do(small: pytest.MonkeyPatch) -> None:
    small.delenv("RAY_ADDRESS", raising=False)
    checks = list(doctor.examine(None))
    verdict_of = verdicts(checks)
    for name in ("cores", "memory", "object store", "disk", "open files"):
        assert verdict_of[name] == "warn", name
    advice = {check.name: check.advice for check in checks}
    assert "cluster.workers=0" in advice["cores"]
    assert "cluster.object_store_bytes" in advice["memory"]
    assert "--shm-size (1g)" in advice["object store"]
    assert "ulimit -n 65536" in advice["open files"]
    assert "fail" not in verdict_of.values()


def test_a_large_machine_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 64)
    monkeypatch.setattr(machine, "memory", lambda: (100 * GB, 90 * GB))
    monkeypatch.setattr(machine, "disk_free", lambda path: 50 * GB)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, -1))
    assert set(verdicts(list(doctor.examine(None))).values()) == {"ok"}


def test_without_shared_memory_ray_is_slower(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small.setattr(machine, "SHM", tmp_path / "none")
    check = doctor._shared_memory()
    assert check.verdict == "warn"
    assert "slower" in check.advice


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "torch" else installed(name)

    monkeypatch.setattr(metadata, "version", version)
    checks = {check.name: check for check in doctor._packages()}
    assert checks["scipy"].verdict == "fail"
    assert checks["scipy"].advice == "pip install 'scipy'"
    assert (checks["torch"].verdict, checks["torch"].observed) == ("fail", "1.0")
    assert checks["torch"].advice.startswith("pip install 'torch>=")
    assert checks["ray"].verdict == "ok"


def test_ray_address_of_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert doctor._cluster(None).verdict == "fail"
    assert doctor._cluster("local").verdict == "ok"
