"""The files of `cluster/`: what Kubernetes, Ray's launcher and a shell would say, said offline."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.support.commands import parse, raymix_lines
from tests.support.paths import ROOT

CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
NAMES = [str(path.relative_to(CLUSTER)) for path in FILES]
KUBERNETES = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
SCHEMA = json.loads((ROOT / "tests" / "support" / "data" / "kuberay-1.7.0.schema.json").read_text())
CLUSTER_SCHEMA = SCHEMA["properties"]["spec"]["properties"]["rayClusterSpec"]
CORES = len(os.sched_getaffinity(0))
LOCKED = dict(
    line.split("==")
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if "==" in line
)


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def faults(document: dict[str, Any]) -> list[str]:
    """Return what KubeRay's definition says against a RayJob or a RayCluster."""
    schema = SCHEMA
    if document["kind"] == "RayCluster":
        schema = copy.deepcopy(SCHEMA)
        schema["properties"]["spec"] = CLUSTER_SCHEMA
    errors = Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def spec_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec if document["kind"] == "RayCluster" else spec["rayClusterSpec"]


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = spec_of(document)
    yield spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["template"]["spec"]
    if document["kind"] == "RayJob":
        yield document["spec"]["submitterPodTemplate"]["spec"]


@pytest.fixture(params=["raycluster.yaml", "rayjob.yaml", "rayjob-bucket.yaml"])
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(CLUSTER / "kubernetes" / request.param)


def test_kuberay_takes_the_manifests(manifest: dict[str, Any]) -> None:
    assert manifest["apiVersion"] == "ray.io/v1"
    assert faults(manifest) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("headGroupSpec", "rayStartParms"), {}),
        (("headGroupSpec", "template", "spec", "containers", 0, "volumeMount"), []),
        (("workerGroupSpecs", 0, "maxReplicas"), "many"),
        (("workerGroupSpecs", 1, "template", "spec", "tolerations", 0, "effects"), "NoSchedule"),
        (("authOptions", "mode"), "open"),
        (("rayStartParams",), {}),
    ],
)
def test_the_schema_finds_planted_faults(
    manifest: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    node: Any = spec_of(manifest)
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert faults(manifest)


def test_the_schema_wants_what_kuberay_wants(manifest: dict[str, Any]) -> None:
    del spec_of(manifest)["workerGroupSpecs"][0]["minReplicas"]
    assert any("minReplicas" in fault for fault in faults(manifest))


def test_rays_autoscaler_reads_the_groups(manifest: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config

    cluster = {
        "metadata": {"name": "raymix", "namespace": "default"},
        "spec": copy.deepcopy(spec_of(manifest)),
    }
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["data"]["resources"]["CPU"] == 8
    assert types["gpu"]["resources"]["GPU"] == 8
    assert types["gpu"]["min_workers"] == 0


def test_pods_are_bounded_and_have_no_rights(manifest: dict[str, Any]) -> None:
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert set(container["resources"]) == {"requests", "limits"}
            mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounts <= {volume["name"] for volume in pod.get("volumes", ())}
    spec = spec_of(manifest)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["rayStartParams"]["object-spilling-directory"] == "/spill"
        mounts = str(group["template"]["spec"]["containers"][0]["volumeMounts"])
        assert ("/shared" in mounts) is ("/scratch" not in mounts)


def test_a_run_in_a_bucket_shares_no_volume_and_holds_no_key() -> None:
    manifest = load(CLUSTER / "kubernetes" / "rayjob-bucket.yaml")
    *nodes, _ = pods(manifest)
    for pod in nodes:
        assert pod["serviceAccountName"] == "raymix"
        assert "persistentVolumeClaim" not in str(pod)
        (container,) = pod["containers"]
        assert container["env"] == [{"name": "TMPDIR", "value": "/scratch"}]
    given = parse(manifest["spec"]["entrypoint"])
    assert given["overrides"] == [
        "cluster.address=auto",
        "corpus.path=s3://BUCKET/corpus",
        "run.dir=s3://BUCKET/runs/{name}",
    ]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_volume_is_the_one_that_pods_mount(name: str) -> None:
    manifest = load(CLUSTER / "kubernetes" / name)
    volume_claim = load(CLUSTER / "kubernetes" / "storage.yaml")
    assert volume_claim["kind"] == "PersistentVolumeClaim"
    assert volume_claim["spec"]["accessModes"] == ["ReadWriteMany"]
    named = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods(manifest)
        for volume in pod.get("volumes", ())
        if "persistentVolumeClaim" in volume
    }
    assert named == {volume_claim["metadata"]["name"]}


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_rays_launcher_takes_its_files(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(path)
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="worker_typo"):
        validate_config(prepare_config({**config, "worker_typo": 1}))
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert any(line.startswith("RAY_AUTH_MODE=token ray start") for line in commands)
    assert "--dashboard-host=127.0.0.1" in str(config["head_start_ray_commands"])
    assert set(config["available_node_types"]) == {"head", "data", "gpu"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_images_are_of_the_locked_ray(path: Path) -> None:
    text = path.read_text()
    tags = re.findall(r"raymix:([\d.]+)-(\w+)", text)
    assert {version for version, _ in tags} <= {LOCKED["ray"]}
    assert {kind for _, kind in tags} <= {"cpu", "cuda"}
    assert set(re.findall(r"rayVersion: (\S+)", text)) <= {LOCKED["ray"]}
    assert not re.search(r"(image|FROM)\S* \S+:latest", text)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_open_and_nothing_secret_lies_about(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"0\.0\.0\.0|::/0|\[::\]", text)
    secret = r"(?i)(AKIA[0-9A-Z]{16}|-----BEGIN|(password|secret_key|token)\s*[:=]\s*['\"]?\w{16,})"
    assert not re.search(secret, text)
    assert "kind: Secret" not in text
    assert "RAY_AUTH_MODE=disabled" not in text


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix in {".yaml", ".sh"}], ids=lambda path: path.name
)
def test_each_opens_with_the_commands_to_type(path: Path) -> None:
    lines = path.read_text().splitlines()
    opening = lines[: next(at for at, line in enumerate(lines) if not line.startswith("#"))]
    assert len([line for line in opening if line.startswith("#   ")]) >= 1
    text = "\n".join(opening)
    for line in raymix_lines(text):
        parse(line)
    for named in re.findall(r"cluster/[\w./-]+\w", text):
        assert (ROOT / named).exists(), named


def test_the_image_is_built_in_stages_and_does_not_run_as_root() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    steps = re.findall(r"^(FROM|USER|ARG|COPY|CMD|EXPOSE)\s+(.*)$", text, flags=re.MULTILINE)
    stages = [argument for step, argument in steps if step == "FROM"]
    assert [stage.split(" AS ")[1] for stage in stages] == ["base", "build", "run"]
    assert [argument for step, argument in steps if step == "USER"] == ["ray"]
    assert "ACCELERATOR=cpu" in [argument for step, argument in steps if step == "ARG"]
    shipped = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert shipped[0] == "*"
    for step, argument in steps:
        if step == "COPY" and not argument.startswith("--from"):
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in shipped


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_refuse_an_empty_line(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    done = subprocess.run([str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr
    subprocess.run([Path(sys.executable).with_name("shellcheck"), str(path)], check=True)


@pytest.mark.parametrize(
    ("devices", "shape"),
    [
        ("0,1,2", ["cluster.workers=3", "cluster.gpus_per_worker=1"]),
        ("", [f"cluster.workers={CORES}", "cluster.gpus_per_worker=0"]),
    ],
)
def test_local_takes_a_worker_per_gpu(tmp_path: Path, devices: str, shape: list[str]) -> None:
    """What the script would run, said by a `raymix` that only says it."""
    says = tmp_path / "raymix"
    says.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    says.chmod(0o755)
    done = subprocess.run(
        [str(CLUSTER / "local.sh"), "my.yaml", "train.steps=5"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": devices},
        capture_output=True,
        text=True,
        check=True,
    )
    first, *words = done.stdout.splitlines()
    assert first == " ".join(shape)
    assert words == ["train", "my.yaml", "cluster.address=local", *shape, "train.steps=5"]
    parse("raymix " + " ".join(words))
