"""Token files written right now by the libraries that own the formats, and read by them and us.

`make .venv-formats` makes their environment; RAYMIX_FORMATS names another one's Python.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.token_corpora import CASES, IN_PLACE, check_copy, check_in_place

PYTHON = Path(os.environ.get("RAYMIX_FORMATS", ROOT / ".venv-formats" / "bin" / "python"))

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(),
    reason="the formats' libraries are not installed: `make .venv-formats`, or set RAYMIX_FORMATS",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files that the libraries wrote."""
    folder = tmp_path_factory.mktemp("formats") / "written"
    script = ROOT / "tests" / "support" / "token_file_libraries.py"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(PYTHON), "-W", "ignore", str(script), str(folder)], env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_every_token_and_document_is_the_librarys(
    case: str, written: Path, tmp_path: Path
) -> None:
    check_in_place(written, case, tmp_path / "corpus")


@pytest.mark.parametrize("case", CASES)
def test_prepare_copies_every_document(case: str, written: Path, tmp_path: Path) -> None:
    check_copy(written, case, tmp_path / "corpus")
