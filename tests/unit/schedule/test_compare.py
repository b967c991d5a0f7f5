"""Lengths from names and files, and all planners on the same batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raymix.errors import ScheduleError
from raymix.schedule import (
    Layout,
    compare_planners,
    known_distributions,
    plan_batch,
    preset,
    sample_lengths,
)
from raymix.schedule.length_source import known_source, read_lengths
from raymix.schedule.planners.flexsp import bucket_ends
from tests.support.scheduling import PLAIN

ROW = {
    "speedup_over_default",
    "speedup_over_packed",
    "share_of_bound",
    "memory_violations",
    "plan_ms",
}
QUICK = ("refine", "packed", "hdp", "skrull", "sorted")

# Shares of sequences below 1K, 4K, 8K and 32K tokens, as published.
PUBLISHED = {
    "wikipedia": (0.8788, 0.9934, 0.9992, 0.9999),
    "lmsys": (0.8712, 0.9935, 0.9987, 0.9998),
    "chatqa2": (0.2192, 0.3148, 0.4043, 0.9986),
    "flexsp_wiki": (0.788, 0.956, 0.984, 0.9987),
    "magi": (0.7138, 0.9437, 0.9742, 0.9956),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_distributions_have_the_published_shares(name: str) -> None:
    lengths = sample_lengths(name, 200_000, seed=0)
    for end, share in zip((1024, 4096, 8192, 32_768), PUBLISHED[name], strict=True):
        assert (lengths < end).mean() == pytest.approx(share, abs=0.012)


def test_the_llama_mix_is_short_but_for_one_in_nine_hundred() -> None:
    lengths = sample_lengths("llama3", 400_000, seed=0)
    long = lengths > 8192
    assert long.mean() == pytest.approx(0.0011, rel=0.15)
    assert lengths[~long].mean() < 1000
    assert lengths[long].mean() == pytest.approx(37_000, rel=0.02)


@pytest.mark.parametrize("name", known_distributions())
def test_draws_repeat_and_are_cut(name: str) -> None:
    one, again = (sample_lengths(name, 1000, seed=7, longest=9000) for _ in range(2))
    assert np.array_equal(one, again)
    assert 1 <= one.min() <= one.max() <= 9000
    assert not np.array_equal(one, sample_lengths(name, 1000, seed=8, longest=9000))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.txt", "3\n 5\n\n7\n"),
        ("a.txt", "\ufeff# lengths of web\n3\n5.0 # cut\n\n0\n7.00\n0\n"),
        ("a.csv", "# by hand\nname,tokens\n\nx,3\ny,5.0\nz,0\nz,7\n"),
        ("a.csv", "3.0\n\n5\n0\n7\n"),
        ("a.json", "[3.0, 0, 5, 7]"),
        ("a.csv", "3\n5\n7\n"),
        ("a.csv", "name,Length\nx,3\ny,5\nz,7\n"),
        ("a.csv", "size\n3\n5\n7\n"),
        ("a.json", "[3, 5, 7]"),
        ("a.JSON", '{"tokens": [3, 5, 7]}'),
    ],
)
def test_files_of_lengths(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    assert read_lengths(str(tmp_path / file)).tolist() == [3, 5, 7]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.txt", "", "the file holds no lengths"),
        ("a.csv", "", "the file holds no lengths"),
        (
            "a.txt",
            "3\n\n-1\n",
            r"line 3, '-1', is not a length\. Allowed: a whole number of tokens",
        ),
        ("a.txt", "# x\n3\n²\n", r"line 3, '²', is not a length"),
        ("a.txt", "3\n5.5\n", r"line 2, '5\.5', is not a length"),
        ("a.txt", "3\n1e3\n", r"line 2, '1e3', is not a length"),
        ("a.txt", "3\nnan\n", r"line 2, 'nan', is not a length"),
        ("a.txt", f"3\n{2**40 + 1}\n", r"line 2, '1099511627777', is not a length"),
        ("a.txt", "0\n0\n", "all 2 lengths in it are 0"),
        ("a.csv", "3x\n5\n", r"line 1, '3x', is not a length"),
        ("a.csv", 'name,tokens\n"a\nb",1\n\nx,-2\n', r"line 5, '-2', is not a length"),
        ("a.json", "[1, 2.5]", r"entry 2, 2\.5"),
        ("a.json", "[1, true]", "entry 2, True"),
        ("a.json", "{}", "no list of lengths"),
        ("a.json", "{", "not JSON"),
        ("a.csv", "x,y\n1,2\n", "no column of lengths among x, y"),
        ("a.csv", "x,tokens\n1\n", "line 2, ''"),
    ],
)
def test_files_without_lengths_are_refused(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ScheduleError, match=message):
        read_lengths(str(tmp_path / file))


def test_lengths_of_zero_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0\n3\n0\n5\n")
    notes: list[str] = []
    assert read_lengths(str(tmp_path / "a.txt"), note=notes.append).tolist() == [3, 5]
    assert notes == [f"{tmp_path}/a.txt: 2 of 4 lengths are 0, and left out"]


def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"Did you mean 'wikipedia'\?"):
        read_lengths("wikpedia")
    with pytest.raises(ScheduleError, match="no such file"):
        read_lengths("nowhere.txt")
    assert known_source("magi")
    assert known_source("x.csv")
    assert not known_source("recipe.yaml")


def test_a_comparison_has_the_promised_keys() -> None:
    cost, layout = preset("0.5b", "slow"), Layout(2, 4)
    lengths = sample_lengths("longalign", 500, seed=0, longest=4 * cost.memory_tokens)
    comparison = compare_planners(lengths, layout, cost, batch=32, steps=2, planners=QUICK)
    document = comparison.document()
    rows = document["planners"]
    assert set(rows) == {*QUICK, "default"}
    for row in rows.values():
        assert set(row) >= ROW
        assert row["memory_violations"] == 0
        assert 0 < row["share_of_bound"] <= 1
        assert row["most_tokens"] <= cost.memory_tokens
    assert rows["default"]["speedup_over_default"] == 1
    assert rows["packed"]["speedup_over_packed"] == 1
    assert next(iter(rows)) == "refine"
    assert rows["refine"]["speedup_over_packed"] >= 1


def test_a_comparison_adds_up_its_steps() -> None:
    lengths = list(range(1, 31))
    comparison = compare_planners(
        lengths, Layout(2, 2), PLAIN, batch=10, steps=3, planners=["packed"]
    )
    assert comparison.totals["packed"].steps == 3
    # Three batches of ten use every sequence once.
    rng = np.random.default_rng(0)
    order = rng.permutation(30)
    batches = [np.array(lengths)[order[at : at + 10]] for at in (0, 10, 20)]
    expected = sum(plan_batch(batch, Layout(2, 2), PLAIN, "packed").seconds for batch in batches)
    assert comparison.totals["packed"].seconds == pytest.approx(expected)


def test_planners_that_cannot_are_left_out_with_the_reason() -> None:
    comparison = compare_planners(
        [10] * 200, Layout(4, 8), PLAIN, batch=128, steps=1, planners=["milp", "packed"]
    )
    assert "milp" not in comparison.document()["planners"]
    assert "use planner='refine'" in comparison.left_out["milp"]


def test_small_corpora_come_round_again() -> None:
    comparison = compare_planners(
        [5, 6], Layout(1, 2), PLAIN, batch=5, steps=2, planners=["packed"]
    )
    assert comparison.totals["packed"].steps == 2


def test_a_comparison_needs_something_to_compare() -> None:
    with pytest.raises(ScheduleError, match=r"lengths = 0: at least one is needed"):
        compare_planners([], Layout(1), PLAIN, batch=1, steps=1)
    with pytest.raises(ScheduleError, match=r"steps = 0"):
        compare_planners([1], Layout(1), PLAIN, batch=1, steps=0)


def test_buckets_add_the_fewest_tokens() -> None:
    lengths = np.array([1, 2, 3, 10, 11, 30])
    assert bucket_ends(lengths, 3).tolist() == [3, 11, 30]
    assert bucket_ends(lengths, 6).tolist() == lengths.tolist()
    assert bucket_ends(lengths, 1).tolist() == [30]
    assert bucket_ends(np.array([7, 7]), 16).tolist() == [7]


def test_they_add_fewer_than_buckets_of_equal_counts() -> None:
    lengths = sample_lengths("flexsp_wiki", 256, seed=1, longest=100_000)
    ends = bucket_ends(lengths, 16)
    rounded = ends[np.searchsorted(ends, lengths)]
    assert (rounded >= lengths).all()
    even = np.sort(lengths)[15::16]
    naive = even[np.searchsorted(even, lengths)]
    assert rounded.sum() - lengths.sum() < 0.2 * (naive.sum() - lengths.sum())
