"""The lock file, by which every fresh machine is set up."""

from __future__ import annotations

import tomllib
from collections import Counter

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
]


def test_each_package_is_pinned_once() -> None:
    counts = Counter(canonicalize_name(pin.name) for pin in PINS)
    assert [name for name, count in counts.items() if count > 1] == []


def test_pins_are_in_the_ranges_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        *project["dependency-groups"].values(),
    ]
    ranges = [Requirement(text) for part in parts for text in part]
    version = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in PINS}
    outside = [
        str(wanted)
        for wanted in ranges
        if (pinned := version.get(canonicalize_name(wanted.name))) is not None
        and not wanted.specifier.contains(pinned)
    ]
    assert outside == []
