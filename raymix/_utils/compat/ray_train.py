"""Private API of Ray Train V2, read in Ray 2.60."""

from __future__ import annotations

from typing import Any

from ray.train.torch.config import (
    _set_torch_distributed_env_vars as set_torch_environment,
)
from ray.train.torch.config import (
    _setup_torch_process_group as set_up_process_group,
)
from ray.train.torch.config import _TorchBackend as TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.torch.torch_trainer import TorchTrainer

__all__ = [
    "LeanTorchTrainer",
    "TorchBackend",
    "WorkerGroupStartupTimeoutError",
    "set_torch_environment",
    "set_up_process_group",
]
# TorchBackend, set_torch_environment, set_up_process_group: the public TorchConfig lets PyTorch's
# store listen on all addresses; a subclass of the backend is the only place to change that.
# WorkerGroupStartupTimeoutError: how Train says that the cluster has no place for the workers; it
# is not exported, and its message alone would have to be parsed.


class LeanTorchTrainer(TorchTrainer):
    """A TorchTrainer without the helper processes of features that a run does not use.

    Each is an actor that takes two seconds of a core to start. No option of Ray leaves them out.

    Args of the constructor:
        alone: Whether the cluster is private to this process. Then no other work competes for its
            resources, and nothing in it survives this process.
        args, options: Those of TorchTrainer, without `datasets`.
    """

    def __init__(self, *args: Any, alone: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._alone = alone

    def _create_default_callbacks(self) -> list[Any]:
        # The first shares out datasets, and there are none.
        unused: list[type] = [DatasetsCallback]
        # Frees the placement group of a controller that was killed: here it ends with the cluster.
        if self._alone:
            unused.append(PlacementGroupCleanerCallback)
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, tuple(unused))]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        policy = options["scaling_policy"]
        if self._alone and isinstance(policy, FixedScalingPolicy):
            options["scaling_policy"] = _UnannouncedScalingPolicy(policy.scaling_config)
        return super()._initialize_and_run_controller(**options)


class _UnannouncedScalingPolicy(FixedScalingPolicy):
    """A fixed number of workers, not announced to the actor that coordinates autoscaling."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass
