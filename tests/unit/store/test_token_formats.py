"""Token files written by the formats' own libraries, read as those libraries read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.token_corpora import CASES, FIXTURES, IN_PLACE, check_copy, check_in_place


@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_every_token_and_document_is_the_librarys(case: str, tmp_path: Path) -> None:
    check_in_place(FIXTURES, case, tmp_path / "corpus")


@pytest.mark.parametrize("case", CASES)
def test_prepare_copies_every_document(case: str, tmp_path: Path) -> None:
    check_copy(FIXTURES, case, tmp_path / "corpus")
