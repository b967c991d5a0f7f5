"""Mixture tables: what is read, and what is refused with row and column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymix.errors import LawError
from raymix.laws import make_table, read_table

GOOD = """run,step,size,share.a,share.b,loss.a,loss.b
x,100,1M,0.25,0.75,4.5,3.5
x,200,1M,0.25,0.75,4.25,
y,100,9M,1,0,3.0,6.5
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "t.csv"
    path.write_text(text, "utf-8")
    return path


def test_a_table_is_read(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, GOOD))
    assert (table.domains, table.targets, table.runs) == (("a", "b"), ("a", "b"), ("x", "x", "y"))
    assert table.share_RD.tolist() == [[0.25, 0.75], [0.25, 0.75], [1, 0]]
    assert np.isnan(table.loss_RV[1, 1])
    assert table.has_steps
    assert table.run_count == 2


def test_rows_can_be_chosen_by_any_column(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    assert read_table(path, where={"size": "1M"}).runs == ("x", "x")
    with pytest.raises(LawError, match=r"where = '2M': no row .* There is: 1M, 9M"):
        read_table(path, where={"size": "2M"})
    with pytest.raises(LawError, match="Did you mean 'size'"):
        read_table(path, where={"sizes": "1M"})


def test_faults_of_chosen_rows_name_the_rows_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "y,100,9M,1,0,3.0,6.5\n")
    with pytest.raises(LawError, match="row 5, column run = 'y': the same run and step as row 4"):
        read_table(path, where={"size": "9M"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("0.25,0.75,4.5", "0.25,0.65,4.5"), r"row 2, column share\.\* = 0\.9: .* not sum to 1"),
        (("0.25,0.75,4.5", "-0.25,1.25,4.5"), r"row 2, column share\.a = -0\.25: not a share"),
        (("4.5,3.5", "nan,3.5"), r"row 2, column loss\.a = 'nan': not finite"),
        (("4.5,3.5", "inf,3.5"), r"row 2, column loss\.a = 'inf': not finite"),
        (("4.5,3.5", "low,3.5"), r"row 2, column loss\.a = 'low': not a number"),
        (("4.5,3.5", "-4.5,3.5"), r"row 2, column loss\.a = -4\.5: not a loss"),
        (("0.25,0.75,4.5", ",0.75,4.5"), r"row 2, column share\.a = '': missing"),
        (("x,200", "x,100"), r"row 3, column run = 'x': the same run and step as row 2"),
        (("x,200", "x,-200"), r"row 3, column step = -200\.0: not a step"),
        (("y,100,9M,1,0,3.0,6.5", "x,300,9M,1,0,3.0,6.5"), r"row 4, .* other shares than in row 2"),
        (("loss.a,loss.b", "lost.a,lost.b"), r"no loss\.<target> column"),
        (("share.a,share.b", "part.a,part.b"), r"no share\.<domain> column"),
        (("loss.a,loss.b", "loss.a,loss.a"), r"column 'loss\.a' appears twice"),
        ((",3.5\n", ",3.5,1\n"), "row 2 has 8 cells, the header 7"),
    ],
)
def test_bad_tables_name_row_and_column(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(LawError, match=message):
        read_table(written(tmp_path, GOOD.replace(*change)))


def test_many_faults_are_cut_short() -> None:
    bad = {"share.a": ["x"] * 50, "share.b": [0.5] * 50, "loss.a": [1.0] * 50}
    with pytest.raises(LawError) as raised:
        make_table(bad)
    assert len(raised.value.problems) == 21
    assert raised.value.problems[-1] == "... and 30 more faults"


@pytest.mark.parametrize("text", ["", "\x00\x01", "a,b\n1\n"])
def test_no_table_at_all(tmp_path: Path, text: str) -> None:
    with pytest.raises(LawError):
        read_table(written(tmp_path, text))
    with pytest.raises(LawError, match="cannot be read"):
        read_table(tmp_path / "absent.csv")


def test_written_and_read_it_is_the_same(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, GOOD))
    table.write(tmp_path / "again.csv")
    again = read_table(tmp_path / "again.csv")
    assert again.runs == table.runs
    np.testing.assert_array_equal(again.share_RD, table.share_RD)
    np.testing.assert_array_equal(again.loss_RV, table.loss_RV)
    np.testing.assert_array_equal(again.step_R, table.step_R)
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_parquet_is_read_alike(tmp_path: Path) -> None:
    columns = {"run": ["x", "y"], "share.a": [0.5, 1.0], "share.b": [0.5, 0.0]}
    pq.write_table(pa.table({**columns, "loss.a": [4.0, None]}), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert table.runs == ("x", "y")
    assert np.isnan(table.loss_RV[1, 0])


def test_parts_of_tables(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, GOOD))
    assert table.last_rows().step_R is not None
    assert table.last_rows().runs == ("x", "y")
    assert table.with_targets(["b"]).targets == ("b",)
    with pytest.raises(LawError, match="target = 'c': not a loss of the table"):
        table.with_targets(["c"])
