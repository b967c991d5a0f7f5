"""What happens to a run leaves no trace in what it reads: rows of `make bench-faults`, one each.

A row takes one to three minutes, so they are run by `make test-slow`; the faults that matter most
are in every run by `tests/e2e/ray/test_faults.py`.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from tests.benchmarks.faults import workspace
from tests.support.faults import FAULTS, STEPS, endure
from tests.support.shell import Shell

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

CHECKPOINT_EVERY = 12


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shell, Path]:
    """Return a shell and a run that nothing happened to."""
    return workspace(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", FAULTS)
def test_no_token_is_lost_or_read_twice(
    calm: tuple[Shell, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    shell, expected = calm
    at = random.Random(zlib.crc32(name.encode())).randrange(5, STEPS - 25)
    ending = endure(shell, name, FAULTS[name], at, expected)
    assert ending.differing == 0
    assert set(ending.tokens.values()) == {0}
    # Another number of workers adds in another order.
    assert ending.loss < 1e-5
    # A run that is killed again while it catches up repeats no more than that twice.
    assert ending.repeated <= 2 * CHECKPOINT_EVERY
