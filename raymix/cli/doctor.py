"""`raymix doctor`: checks of this machine and its Ray cluster."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated, Any, Literal

import typer

from raymix.cli._run import Json, run_command

Verdict = Literal["ok", "warn", "fail"]
PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "pydantic",
    "numpy",
    "scipy",
)
_GB = 1e9
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the output: the check, its status, what it observed, advice."""

    name: str
    verdict: Verdict
    observed: str
    advice: str = ""


def command(
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="Ray cluster; or RAY_ADDRESS."),
    ] = None,
    json: Json = False,
) -> None:
    """Check this machine and its Ray cluster: versions, cores, memory, disk, GPUs, limits.

    Exit code 1 if something would stop a run.
    """

    def work() -> dict[str, Any]:
        checks = []
        for check in examine(address):
            checks.append(check)
            # Printed one by one: the last check may wait long for a cluster.
            print(line(check, color=sys.stdout.isatty()))
        return {
            "ok": all(check.verdict != "fail" for check in checks),
            "checks": [asdict(check) for check in checks],
        }

    # A warning ends with 0: a small machine is slow, but it works.
    run_command(work, json=json, failed=lambda document: not document["ok"])


def line(check: Check, *, color: bool) -> str:
    """Return a check as one line for people, its advice on a second."""
    verdict = check.verdict.ljust(4)
    if color:
        verdict = typer.style(verdict, fg=_COLORS[check.verdict], bold=True)
    # 21 columns are the verdict and the name, with the space after each.
    advice = f"\n{'':21}{check.advice}" if check.advice else ""
    return f"{verdict} {check.name:15} {check.observed}{advice}"


def examine(address: str | None) -> Iterator[Check]:
    """Yield every check, the quick ones first."""
    yield _python()
    yield from _packages()
    quick: tuple[Callable[[], Check], ...] = (_cores, _memory, _shared_memory, _disk, _open_files)
    for check in quick:
        yield check()
    # The slow ones: torch has to be imported, then a cluster may have to answer.
    yield _gpus()
    yield _cluster(address)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    needed = {}
    # As the installed package declares them, so that no second list of versions gets old here.
    for text in metadata.requires("raymix") or ():
        requirement = Requirement(text)
        # A marker belongs to an extra, or to another system or Python.
        if requirement.marker is None:
            needed[requirement.name] = requirement.specifier
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, "fail", "not installed", f"pip install '{name}'")
            continue
        required = needed.get(name)
        # Nightly builds are pre-releases, which `contains` rejects unless told otherwise.
        if required is None or required.contains(version, prereleases=True):
            yield Check(name, "ok", version)
        else:
            yield Check(name, "fail", version, f"pip install '{name}{required}'")


def _cores() -> Check:
    from raymix.training.host.machine import cores

    count = cores()
    if count >= 2:
        return Check("cores", "ok", f"{count}")
    advice = "Ray's own processes share it with the work: cluster.workers=0 is fastest here."
    return Check("cores", "warn", f"{count}", advice)


def _memory() -> Check:
    from raymix.training.host.machine import memory

    total, free = memory()
    observed = f"{total / _GB:.1f} GB, {free / _GB:.1f} GB available"
    if free >= 4 * _GB:
        return Check("memory", "ok", observed)
    advice = "Ray takes 30 % of memory for its object store; set cluster.object_store_bytes."
    return Check("memory", "warn", observed, advice)


def _shared_memory() -> Check:
    from raymix.training.host.machine import SHM, disk_free, memory

    if not SHM.exists():
        return Check("object store", "warn", f"no {SHM}", "Ray will use files in /tmp, slower.")
    free, required = disk_free(str(SHM)) or 0, int(0.3 * memory()[0])
    observed = f"{SHM} has {free / _GB:.1f} GB free, Ray takes {required / _GB:.1f} GB by default"
    if free >= required:
        return Check("object store", "ok", observed)
    advice = (
        "Set cluster.object_store_bytes below what is free, or start the container with a larger "
        f"--shm-size ({required / _GB:.0f}g); else Ray uses files in /tmp, slower."
    )
    return Check("object store", "warn", observed, advice)


def _disk() -> Check:
    from raymix.training.host.machine import disk_free

    here, temporary = disk_free(os.getcwd()) or 0, disk_free("/tmp/ray") or 0
    observed = f"{here / _GB:.1f} GB free here, {temporary / _GB:.1f} GB where Ray logs"
    if min(here, temporary) >= 5 * _GB:
        return Check("disk", "ok", observed)
    return Check("disk", "warn", observed, "Free some: corpora and checkpoints need room.")


def _open_files() -> Check:
    # Not at the top of the file: the module exists on Unix only.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # RLIM_INFINITY is -1 in Python, so a comparison alone takes "no limit" for the lowest one.
    if soft >= 4096 or soft == resource.RLIM_INFINITY:
        return Check("open files", "ok", f"ulimit -n {soft}")
    more = f"ulimit -n {min(65_536, hard) if hard > 0 else 65_536}"
    return Check("open files", "warn", f"ulimit -n {soft}", f"Ray opens many: run `{more}` first.")


def _gpus() -> Check:
    try:
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except (ImportError, OSError, RuntimeError) as error:
        # OSError: a shared library of torch is missing. RuntimeError: CUDA does not start.
        return Check("gpus", "fail", f"torch does not load: {error}", "Reinstall torch.")
    if names:
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return Check("gpus", "ok", f"{kinds}, CUDA {torch.version.cuda}")
    return Check("gpus", "ok", "none: training runs on the CPU with gloo")


def _cluster(address: str | None) -> Check:
    from raymix.errors import ClusterError
    from raymix.training.host.machine import ray_address, resources

    observed = ray_address(address)
    if observed is None:
        return Check("ray cluster", "ok", "no address: runs start a private one on this machine")
    try:
        has = resources(observed)
    except ClusterError as error:
        return Check("ray cluster", "fail", str(error))
    what = f"{has.cpus:g} CPUs, {has.gpus:g} GPUs, {has.memory_bytes / _GB:.1f} GB"
    return Check("ray cluster", "ok", f"{observed}: {has.nodes} nodes with {what}")
