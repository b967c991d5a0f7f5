"""The private API that `raymix._utils.compat` uses is where it was: each test names one use."""

from __future__ import annotations

import inspect
import json
import re
import sys

import pytest

from tests.support.paths import ROOT

PRIVATE = re.compile(
    r"\b(ray\._private|ray\.[\w.]*\._internal|torch\._(?!_)\w+|iter_internal_ref_bundles"
    r"|__pyx_capi__|ctypes\.CDLL|_global_node|_TorchBackend|threading\._\w+|atexit\._\w+)"
)


def test_private_api_is_used_in_compat_only() -> None:
    for path in (ROOT / "raymix").rglob("*.py"):
        if "compat" not in path.parts:
            code = "\n".join(
                line for line in path.read_text("utf-8").splitlines() if "`" not in line
            )
            assert not PRIVATE.search(code), path


def test_ray_decides_by_a_constant_whether_it_may_be_a_cluster() -> None:
    from ray._private import ray_constants

    from raymix._utils.compat.ray_core import single_machine_mode

    before = ray_constants.ENABLE_RAY_CLUSTER
    with single_machine_mode():
        assert ray_constants.ENABLE_RAY_CLUSTER is False
    assert before is ray_constants.ENABLE_RAY_CLUSTER
    from ray._private import services

    assert "ENABLE_RAY_CLUSTER" in inspect.getsource(services)


def test_ray_asks_a_constant_whether_workers_get_an_environment_of_uv() -> None:
    from ray._private import ray_constants, worker

    from raymix._utils.compat.ray_core import without_uv_environment

    assert "ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV" in inspect.getsource(worker)
    before = ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    with without_uv_environment():
        assert ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV is False
    assert before is ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV


def test_rays_node_of_this_process_tells_dead_processes() -> None:
    from ray._private import worker
    from ray._private.node import Node

    from raymix._utils.compat.ray_core import dead_processes

    assert hasattr(worker, "_global_node")
    for name in ("dead_processes", "start_monitor", "start_log_monitor", "start_api_server"):
        assert callable(getattr(Node, name))
    assert dead_processes() == []


def test_rays_node_takes_the_scripts_of_workers_from_its_parameters() -> None:
    from ray._private import ray_constants, services
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    from raymix._utils.fork_server import setup_worker

    assert "ray_params" in inspect.signature(Node.__init__).parameters
    assert {"worker_path", "setup_worker_path"} <= set(inspect.signature(RayParams).parameters)
    assert callable(RayParams.update_if_absent)
    assert "setup_worker_path,\n        ]" in inspect.getsource(services.start_raylet)
    # The raylet leaves out an argument with this name where there is nothing to set up.
    assert setup_worker.__file__.endswith(ray_constants.SETUP_WORKER_FILENAME)


def test_a_runtime_environment_is_told_to_rays_setup_script() -> None:
    from ray._private.runtime_env.context import RuntimeEnvContext

    assert json.loads(RuntimeEnvContext(env_vars={"A": "1"}).serialize()) == {
        "command_prefix": [],
        "env_vars": {"A": "1"},
        "py_executable": sys.executable,
        "override_worker_entrypoint": None,
        "java_jars": [],
    }


def test_cpython_ends_a_process_by_these() -> None:
    import atexit
    import threading

    assert callable(atexit._run_exitfuncs)
    assert callable(vars(threading)["_shutdown"])


def test_ray_trains_torch_backend_sets_up_the_process_group() -> None:
    from raymix._utils.compat import ray_train

    assert list(inspect.signature(ray_train.TorchBackend.on_start).parameters)[1:] == [
        "worker_group",
        "backend_config",
    ]
    assert list(inspect.signature(ray_train.set_up_process_group).parameters) == [
        "backend",
        "world_rank",
        "world_size",
        "init_method",
        "timeout_s",
    ]
    assert not inspect.signature(ray_train.set_torch_environment).parameters


def test_ray_train_has_what_a_lean_trainer_leaves_out() -> None:
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy

    from raymix._utils.compat import ray_train

    for name in ("_create_default_callbacks", "_initialize_and_run_controller"):
        assert callable(getattr(ray_train.TorchTrainer, name))
    for name in ("after_controller_start", "_maybe_send_resource_request"):
        assert callable(getattr(ScalingPolicy, name))


def test_ray_train_raises_a_startup_timeout() -> None:
    from raymix._utils.compat.ray_train import WorkerGroupStartupTimeoutError

    assert issubclass(WorkerGroupStartupTimeoutError, Exception)


def test_ray_data_yields_references_of_blocks() -> None:
    from ray.data import Dataset
    from ray.data._internal.execution.interfaces import RefBundle
    from ray.data._internal.execution.interfaces.ref_bundle import BlockEntry

    assert callable(Dataset.iter_internal_ref_bundles)
    assert "blocks" in inspect.signature(RefBundle).parameters
    assert "ref" in inspect.signature(BlockEntry).parameters


def test_fused_optimizers_leave_out_a_step_by_found_inf() -> None:
    import torch

    from raymix._utils.compat.torch import step_unless

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for skip, steps in ((False, 1), (True, 1), (False, 2)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), float("nan") if skip else 1.0)
        step_unless(optimizer, torch.tensor(skip))
        assert torch.equal(before, weight) == skip
        assert int(optimizer.state[weight]["step"]) == steps
    assert weight.isfinite().all()
    assert not hasattr(optimizer, "found_inf")


def test_torch_has_fake_tensors_among_real_ones() -> None:
    import torch

    from raymix._utils.compat.torch import fake_tensors

    real = torch.ones(3)
    with fake_tensors():
        assert (torch.empty(1 << 40, 3) + real).shape == (1 << 40, 3)


def test_glibc_has_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    from raymix._utils.compat.native import M_MMAP_THRESHOLD, mallopt

    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert mallopt(M_MMAP_THRESHOLD, 128 << 10)  # glibc's default
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    assert not mallopt(M_MMAP_THRESHOLD, 128 << 10)


@pytest.mark.parametrize("name", ["dsytrd", "dstevd"])
def test_scipy_publishes_the_address_of(name: str) -> None:
    from raymix._utils.compat.native import lapack_function

    assert callable(lapack_function(name))
