"""A private cluster: what it leaves behind, and what is said when it dies."""

from __future__ import annotations

from pathlib import Path

from tests.support.scripts import run_script

AFTER = """
import os
from raymix.recipe import ClusterConfig
from raymix.training.launch.cluster import ray_cluster

reported = "RAY_enable_metrics_collection"
config = ClusterConfig(workers=1, address="local")
with ray_cluster(config):
    within = os.environ[reported]
    with ray_cluster(config):  # of a Ray that is joined already, nothing is changed
        pass
    still = os.environ[reported]
print("told", within, still, os.environ.get(reported))
"""

KILLED = """
import os, signal, time
from pathlib import Path
from raymix.errors import ClusterLostError
from raymix.recipe import ClusterConfig
from raymix.training.launch.cluster import check_private_cluster, ray_cluster, redirect_ray_output

try:
    config = ClusterConfig(workers=1, address="local")
    with redirect_ray_output(Path("ray.log")), ray_cluster(config):
        import ray._private.worker as worker

        check_private_cluster()
        os.kill(worker._global_node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            check_private_cluster()
            time.sleep(0.1)
except ClusterLostError as error:
    print(error)
"""


def test_a_cluster_started_after_a_private_one_reports_metrics(tmp_path: Path) -> None:
    done = run_script(AFTER, tmp_path)
    assert "told 0 0 None" in done.stdout.splitlines(), done.stderr[-4000:]


def test_the_death_of_rays_node_manager_is_told_in_one_line(tmp_path: Path) -> None:
    done = run_script(KILLED, tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout + done.stderr[-4000:]
    assert lines[0].startswith("cluster.address = 'local': Ray's node manager (raylet) was killed")
