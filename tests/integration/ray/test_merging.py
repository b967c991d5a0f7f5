"""Merging as Ray tasks: the same bytes as on this machine alone, and errors that arrive whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymix.errors import MergeError
from raymix.merging.run.engine import merge
from tests.support.merging import DOWN, digests, weights, write_adapter, write_family, write_model
from tests.unit.merging.test_lora import factors

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    return write_family(tmp_path / "family", shards=2)


@pytest.mark.parametrize("method", ["drm", "dare_ties"])
def test_ray_writes_the_bytes_that_one_machine_writes(
    method: str, family: dict[str, Any], tmp_path: Path
) -> None:
    parameters = {"density": 0.5} if method == "dare_ties" else {"direction": "auto"}
    file = {
        "merge_method": method, "parameters": parameters, "max_shard_bytes": 9000, **family,
    }  # fmt: skip
    merge(file, tmp_path / "local")
    document = merge(file, tmp_path / "ray", on="ray")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    assert document["peak_bytes"] > 0


def test_adapters_merge_on_ray(tmp_path: Path) -> None:
    for at, name in enumerate("ab"):
        write_adapter(tmp_path / name, factors(at))
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    for on in ("local", "ray"):
        merge({"merge_method": "drm", "models": models}, tmp_path / on, on=on)
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


class Planted(Exception):
    """A crash that the engine does not expect."""


def test_a_crash_of_the_driver_is_resumed(family: dict[str, Any], tmp_path: Path) -> None:
    def crash(done: int, total: int, job: str) -> None:
        if done == 10:
            raise Planted

    file = {"merge_method": "ties", "parameters": {"density": 0.4}, **family}
    merge(file, tmp_path / "whole")
    with pytest.raises(Planted):
        merge(file, tmp_path / "out", on="ray", progress=crash)
    assert merge(file, tmp_path / "out", on="ray")["resumed"] >= 10
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_error_in_a_task_is_ours(family: dict[str, Any], tmp_path: Path) -> None:
    tensors = weights(2)
    tensors[DOWN][0, 0] = float("nan")
    write_model(tmp_path / "family" / "bad", tensors)
    family["models"][1]["model"] = str(tmp_path / "family" / "bad")
    with pytest.raises(MergeError, match="holds NaN") as caught:
        merge({"merge_method": "ties", **family}, tmp_path / "out", on="ray")
    assert len(caught.value.problems) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["family"]
