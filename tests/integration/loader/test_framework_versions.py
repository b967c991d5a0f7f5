"""A framework of an unknown version is one clear error, before anything of it is imported."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from raymix.errors import TrainingError
from raymix.integrations._versions import require


def installed_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Make `transformers` count as installed in a version."""
    about = tmp_path / f"transformers-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "raymix.integrations.huggingface", raising=False)


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0", "unknown"])
def test_an_unknown_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    installed_as(tmp_path, monkeypatch, version)
    with pytest.raises(TrainingError) as error:
        importlib.import_module("raymix.integrations.huggingface")
    assert f"transformers = {version!r}: a version that this" in str(error.value)
    assert "transformers >=5,<6" in str(error.value)
    assert "pip install 'raymix[huggingface]'" in str(error.value)


def test_a_later_minor_version_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed_as(tmp_path, monkeypatch, "5.99.0.dev0")
    require("transformers", ">=5,<6", "raymix[huggingface]")


def test_a_missing_framework_is_named() -> None:
    with pytest.raises(TrainingError, match=r"torchtitania.*not installed.*pip install 'it'"):
        require("torchtitania", ">=0.3", "it")
