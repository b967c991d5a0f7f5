"""Mixture tables and files of laws, damaged: read, or refused in the house's form."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from raymix.laws import fit_law, read_table
from raymix.laws.files import load_law, save_law
from tests.support.fuzzing import damaged, outcome
from tests.support.tables import as_table, draw_shares

CASES = [250, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]


def arrow_table() -> pa.Table:
    random = np.random.default_rng(0)
    share = random.dirichlet(np.ones(3), 12)
    columns = {"run": [f"r{at // 2}" for at in range(12)], "step": [100, 200] * 6}
    for at in range(12):
        share[at] = share[at // 2 * 2]
    columns |= {f"share.{name}": share[:, at] for at, name in enumerate("abc")}
    columns |= {f"loss.{name}": 3 - np.log(share[:, at] + 0.1) for at, name in enumerate("ab")}
    return pa.table(columns)


def as_csv() -> bytes:
    sink = io.BytesIO()
    pa.csv.write_csv(arrow_table(), sink)
    return sink.getvalue()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(arrow_table(), sink)
    return sink.getvalue()


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("suffix", "write"), [("csv", as_csv), ("parquet", as_parquet)])
def test_tables(suffix: str, write: object, cases: int, tmp_path: Path) -> None:
    raw, path = write(), tmp_path / f"t.{suffix}"  # type: ignore[operator] # one of the two above
    path.write_bytes(raw)
    assert read_table(path).run_count == 6
    for case in range(cases):
        path.write_bytes(damaged(raw, case))
        actual = outcome(lambda: read_table(path), f"{suffix} case {case}")
        if actual is not None:
            assert np.allclose(actual.share_RD.sum(axis=1), 1, atol=1e-3)
            assert np.isfinite(actual.share_RD).all()
            assert not (actual.loss_RV <= 0).any()


@pytest.mark.parametrize("cases", CASES)
def test_laws(cases: int, tmp_path: Path) -> None:
    share = draw_shares(24, 3)
    fitted, report = fit_law(as_table(share, 3 - np.log(share + 0.1)), law="bimix")
    path = tmp_path / "law.json"
    save_law(path, fitted, report)
    raw = path.read_bytes()
    for case in range(cases):
        path.write_bytes(damaged(raw, case))
        actual = outcome(lambda: load_law(path), f"law case {case}")
        if actual is not None:
            # A file may hold other numbers and be sound: what they predict is theirs.
            with np.errstate(all="ignore"):
                outcome(lambda actual=actual: actual.predict(share[:2]), f"predicting, case {case}")
    assert json.loads(raw)
