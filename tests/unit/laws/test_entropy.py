"""Shares from entropies: formulas, cautions, and the manifest they come from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.errors import LawError
from raymix.laws import entropy_shares, shares_of_entropy, von_neumann_entropy
from raymix.store import DomainInfo, SplitInfo


def domain(unigram: float, conditional: float, tokens: int = 100) -> DomainInfo:
    split = SplitInfo(
        documents=1,
        tokens=tokens,
        bytes=tokens,
        blocks=1,
        shards=(),
        length_quantiles={},
        length_histogram={},
        unigram_entropy=unigram,
        bigram_entropy=conditional,
    )
    return DomainInfo(
        train=split, valid=split, records_read=1, rejected=0, duplicates=0, too_short=0, too_long=0
    )


DOMAINS = {"web": domain(6.0, 4.0), "code": domain(5.0, 2.0)}


@pytest.mark.parametrize(
    ("proxy", "difference"), [("unigram", 1.0), ("conditional", 2.0), ("joint", 3.0)]
)
def test_the_odds_of_two_domains_are_exp_of_their_difference(proxy: str, difference: float) -> None:
    for temperature in (1.0, 2.5):
        shares = entropy_shares(DOMAINS, proxy, temperature=temperature)  # type: ignore[arg-type] # from a list
        assert sum(shares.values()) == pytest.approx(1, abs=1e-15)
        odds = shares["web"] / shares["code"]
        assert np.log(odds) == pytest.approx(difference / temperature)


def test_the_conditional_entropy_is_the_default() -> None:
    assert entropy_shares(DOMAINS) == entropy_shares(DOMAINS, "conditional")


@given(
    entropies=st.lists(st.floats(-1000, 1000), min_size=1, max_size=20),
    temperature=st.floats(0.01, 100),
    shift=st.floats(-100, 100),
)
def test_shares_sum_to_one_and_know_only_differences(
    entropies: list[float], temperature: float, shift: float
) -> None:
    entropy = np.array(entropies)
    share = shares_of_entropy(entropy, temperature)
    assert share.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(shares_of_entropy(entropy + shift, temperature), share, atol=1e-6)
    assert (np.diff(share[np.argsort(entropy, kind="stable")]) >= 0).all()


def test_von_neumann_entropy_of_known_matrices() -> None:
    rng = np.random.default_rng(0)
    assert von_neumann_entropy(np.outer(rng.normal(size=9), rng.normal(size=4))) < 1e-12
    assert von_neumann_entropy(np.eye(5) * 1e-200) == pytest.approx(np.log(5))
    eigenvalues = np.array([0.5, 0.3, 0.2])
    turned = np.linalg.qr(rng.normal(size=(40, 3)))[0] * np.sqrt(eigenvalues)
    expected = -(eigenvalues * np.log(eigenvalues)).sum()
    assert von_neumann_entropy(7 * turned) == pytest.approx(expected, rel=1e-12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(LawError, match=r"proxy = 'unigrm': not an entropy.*Did you mean 'unigram'"):
        entropy_shares(DOMAINS, "unigrm")  # type: ignore[arg-type] # what is tested
    with pytest.raises(LawError, match=r"temperature = 0\.0: not allowed"):
        entropy_shares(DOMAINS, temperature=0.0)
    with pytest.raises(LawError, match=r"corpus\.domains\.b\.train\.tokens = 0: has no tokens"):
        entropy_shares({"a": domain(1, 1), "b": domain(0, 0, tokens=0)})
    with pytest.raises(LawError, match="not finite"):
        shares_of_entropy(np.array([np.nan]))
    with pytest.raises(LawError, match="not a matrix"):
        von_neumann_entropy(np.ones(3))
    with pytest.raises(LawError, match="no document has a direction"):
        von_neumann_entropy(np.zeros((2, 2)))
