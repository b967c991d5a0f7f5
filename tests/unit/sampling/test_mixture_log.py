"""The mixture log: what may follow what, look-up, and its lines on disk."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.errors import CorpusError
from raymix.sampling import MixtureEntry, MixtureLog

FIRST = MixtureEntry(0, 0, (0.5, 0.5), "static")
SECOND = MixtureEntry(1, 100, (0.9, 0.1), "asked", {"loss": [1.5, None]})
THIRD = MixtureEntry(2, 150, (0.1, 0.9), "pike")


def example() -> MixtureLog:
    return MixtureLog(("web", "books"), [FIRST, SECOND, THIRD])


def test_each_step_has_the_entry_that_started_last() -> None:
    log = example()
    assert [log.at(step).version for step in (0, 99, 100, 149, 150, 10**9)] == [0, 0, 1, 1, 2, 2]
    assert [log.until(step) for step in (0, 99, 100, 150)] == [100, 100, 150, None]


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        (MixtureEntry(3, 150, (1, 0), "x"), "not after"),
        (MixtureEntry(5, 200, (1, 0), "x"), "does not follow"),
        (MixtureEntry(2, 200, (1, 0), "x"), "does not follow"),
        (MixtureEntry(3, 200, (1,), "x"), "1 weights for 2 domains"),
    ],
)
def test_what_does_not_follow_is_refused_and_leaves_the_log_as_it_was(
    entry: MixtureEntry, wrong: str
) -> None:
    log = example()
    with pytest.raises(ValueError, match=wrong):
        log.append(entry)
    assert log.entries == [FIRST, SECOND, THIRD]


def test_a_log_that_begins_later_has_no_weights_before() -> None:
    log = MixtureLog(("web", "books"), [SECOND])
    with pytest.raises(ValueError, match="no weights for step 99"):
        log.at(99)
    with pytest.raises(CorpusError, match="the first entry must start at step 0"):
        MixtureLog.from_lines(log.to_lines())


CHANGED = MixtureEntry(
    3, 200, (0.25, 0.75), "static", {"domains": {"added": ["code"], "removed": ["web"]}}
)


def changed() -> MixtureLog:
    return MixtureLog(("books", "code"), [CHANGED], example())


def test_a_log_whose_domains_change_is_read_as_it_was_written() -> None:
    lines = changed().to_lines()
    assert lines[:3] == example().to_lines()
    for domains in (None, ["code", "books"], ["books", "code"]):
        log = MixtureLog.from_lines(lines, domains)
        assert dict(zip(log.domains, log.at(200).weights, strict=True)) == {
            "books": 0.25, "code": 0.75,
        }  # fmt: skip
        assert log.earlier is not None
        assert (log.earlier.domains, log.earlier.entries) == (("web", "books"), example().entries)
        assert log.to_lines()[:3] == lines[:3]
        with pytest.raises(ValueError, match="no weights for step 199"):
            log.at(199)
    with pytest.raises(CorpusError, match=r"log:4 .*its domains are \['books', 'code'\]"):
        MixtureLog.from_lines(lines, ["web", "books"])
    # Without the word that they change, other domains are damage.
    silent = json.loads(lines[3]) | {"stats": None}
    with pytest.raises(CorpusError, match="its domains are"):
        MixtureLog.from_lines([*lines[:3], json.dumps(silent)])
    gap = json.loads(lines[3]) | {"version": 7}
    with pytest.raises(CorpusError, match="version 7 does not follow version 2"):
        MixtureLog.from_lines([*lines[:3], json.dumps(gap)])


def test_a_joined_log_has_all_domains_at_every_step() -> None:
    log = changed().joined()
    assert log.domains == ("books", "code", "web")
    assert [log.at(step).weights for step in (0, 100, 150, 200)] == [
        (0.5, 0.0, 0.5), (0.1, 0.0, 0.9), (0.9, 0.0, 0.1), (0.25, 0.75, 0.0),
    ]  # fmt: skip
    assert log.at(100).stats == {"loss": [None, None, 1.5]}
    assert example().joined() == example()


def test_an_empty_log_has_no_weights() -> None:
    with pytest.raises(ValueError, match="no weights for step 0"):
        MixtureLog(("web",)).at(0)


def test_since_gives_what_a_reader_lacks() -> None:
    log = example()
    assert log.since(-1) == [FIRST, SECOND, THIRD]
    assert log.since(1) == [THIRD]
    assert log.since(2) == []


def test_truncate_drops_what_starts_after_the_step() -> None:
    log = example()
    assert log.truncate(100) == [THIRD]
    assert log.entries == [FIRST, SECOND]
    assert log.until(100) is None
    log.append(MixtureEntry(2, 101, (1, 0), "x"))
    assert log.at(101).mixer == "x"


def test_a_copy_goes_its_own_way() -> None:
    log = example()
    twin = log.copy()
    twin.truncate(0)
    assert len(log.entries) == 3
    assert len(twin.entries) == 1


@given(st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=5))
def test_lines_keep_every_float_exactly(given: list[float]) -> None:
    weights = tuple(weight / sum(given) for weight in given)
    log = MixtureLog(tuple(f"d{at}" for at in range(len(weights))))
    log.append(MixtureEntry(4, 0, weights, "static", {"a": 1}))
    again = MixtureLog.from_lines(log.to_lines())
    assert again.entries == log.entries
    assert again.domains == log.domains


def test_a_line_names_its_shares() -> None:
    assert json.loads(example().to_lines()[1]) == {
        "version": 1,
        "first_step": 100,
        "shares": {"web": 0.9, "books": 0.1},
        "mixer": "asked",
        "stats": {"loss": [1.5, None]},
    }


def test_lines_are_read_in_the_asked_order_of_domains() -> None:
    log = MixtureLog.from_lines(example().to_lines(), ["books", "web"])
    assert log.at(100).weights == (0.1, 0.9)


def test_a_torn_last_line_and_empty_lines_are_left_out() -> None:
    lines = example().to_lines()
    log = MixtureLog.from_lines([lines[0], "", lines[1], lines[2][:-9]])
    assert log.entries == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"version": 1', "not an entry"),
        ("[]", "not an entry"),
        ('{"version": 1, "first_step": 5}', "shares"),
        ('{"version": 1, "first_step": 5, "shares": {"web": 1}, "mixer": "x"}', "its domains are"),
        (
            '{"version": 1, "first_step": 0, "shares": {"web": 1, "books": 0}, "mixer": "x"}',
            "not after",
        ),
        *(
            (f'{{"version": 1, "first_step": 5, "shares": {shares}, "mixer": "x"}}', "adding up")
            for shares in (
                '{"web": 2, "books": -1}',
                '{"web": 0, "books": 0}',
                '{"web": 0.5, "books": NaN}',
            )
        ),
        (
            '{"version": 1, "first_step": 5.5, "shares": {"web": 1, "books": 0}, "mixer": "x"}',
            "first_step is 5.5, not a whole number",
        ),
        (
            f'{{"version": 1, "first_step": 5, "shares": {{"web": {10**400}, "books": 0}}}}',
            "not an entry",
        ),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(line: str, wrong: str) -> None:
    lines = example().to_lines()
    with pytest.raises(CorpusError, match=wrong) as caught:
        MixtureLog.from_lines([lines[0], line, lines[2]], path="mixture_log.jsonl")
    assert "mixture_log.jsonl:2 = " in str(caught.value)
