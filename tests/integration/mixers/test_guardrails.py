"""What holds for every adaptive mixer: laws of shares, guardrails, broken statistics, state."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.errors import RecipeError
from raymix.mixers import (
    STATISTICS,
    DomainStats,
    Mixer,
    PlannedMixer,
    build_mixer,
    describe,
)
from tests.support.mixer_stats import CONFIG, RAW, adaptive, context, continued, whole, window

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("pike", {}),
    ("pike", {"form": "full", "tau": 2.0}),
    ("pike", {"form": "exact_qp"}),
    ("dga", {"targets": "d4"}),
    ("dga", {"targets": "d4", "gradients": "raw"}),
    ("dga", {"targets": ["d3", "d4"], "several": "grape"}),
    ("dga", {"targets": "d4", "bases": {"a": {"d0": 1}, "b": {"d1": 1, "d2": 3}}}),
    ("doge", {}),
    ("doge", {"targets": "d4"}),
    ("rb", {}),
    ("doremi", {"reference": {f"d{at}": 1.5 for at in range(5)}}),
    ("odm", {}),
    ("odm", {"form": "smoothed_mean"}),
    ("ado", {}),
    ("aioli", {}),
]
IDS = [f"{kind}-{'-'.join(map(str, fields))}" for kind, fields in KINDS]
every = pytest.mark.parametrize(("kind", "fields"), KINDS, ids=IDS)
N = 5


def stats(seed: int, step: int = 0) -> DomainStats:
    return whole(N, seed, step=step, groups=3)


@every
def test_shares_stay_shares_and_targets_stay_out(kind: str, fields: dict[str, Any]) -> None:
    mixer = adaptive(kind, context(N), **fields)
    targets = [int(name[1:]) for name in np.atleast_1d(fields.get("targets", []))]
    mixed = [at for at in range(N) if at not in targets]
    for step in range(12):
        share = mixer.update(stats(step, 10 * step))
        assert share.sum() == pytest.approx(1, abs=1e-12)
        assert (share[targets] == 0).all()
        assert (share[mixed] > 0).all()
        assert not share.flags.writeable
    assert mixer.warnings == 0
    assert not isinstance(mixer, PlannedMixer)
    assert isinstance(mixer, Mixer)
    assert mixer.needs <= STATISTICS.keys()
    assert describe(mixer).startswith(f"{kind}: ")


@every
def test_a_state_continues_to_the_last_bit(kind: str, fields: dict[str, Any]) -> None:
    mixer = adaptive(kind, context(N), **fields)
    for step in range(7):
        mixer.update(stats(step, 10 * step))
    again = continued(mixer, adaptive(kind, context(N), **fields))
    for step in range(7, 13):
        new = stats(step, 10 * step)
        assert again.update(new).tolist() == mixer.update(new).tolist()
    assert again.state_dict() == mixer.state_dict()


def permuted(old: DomainStats, order: np.ndarray) -> DomainStats:
    changes: dict[str, Any] = {}
    for field in STATISTICS.values():
        value = getattr(old, field)
        if field == "gram_DD":
            changes[field] = value[np.ix_(order, order)]
        elif not field.startswith("group"):
            changes[field] = value[order]
    return replace(old, **changes)


@settings(max_examples=15)
@given(order=st.permutations(range(N)), seed=st.integers(0, 1000))
@pytest.mark.parametrize("kind", ["pike", "doge", "rb", "odm", "ado"])
def test_the_order_of_domains_does_not_matter(kind: str, order: list[int], seed: int) -> None:
    index = np.array(order)
    straight, turned = adaptive(kind, context(N)), adaptive(kind, context(N))
    for step in range(3):
        one = stats(seed + step, 10 * step)
        first, second = straight.update(one), turned.update(permuted(one, index))
        assert second == pytest.approx(first[index], abs=1e-9)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    floor=st.floats(0, 0.9),
    cap=st.floats(0.01, 3),
    size=st.sampled_from([1.0, 1e4]),
)
@pytest.mark.parametrize(("kind", "fields"), KINDS[:5] + KINDS[7:8])
def test_floor_and_cap_hold_exactly(
    kind: str, fields: dict[str, Any], seed: int, floor: float, cap: float, size: float
) -> None:
    guardrails = {"floor": floor, "max_log_change": cap}
    guardrails |= {"ema": 1.0} if kind == "dga" else {}
    guardrails |= {"unit_free": False} if kind == "pike" else {}
    mixer = adaptive(kind, context(N), **fields, **guardrails)
    mixed = mixer.initial > 0
    before = mixer.initial[mixed]
    for step in range(4):
        share = mixer.update(scaled(stats(seed + step, 10 * step), size))[mixed]
        assert np.isfinite(share).all()
        assert share.sum() == pytest.approx(1, abs=1e-9)
        assert share.min() >= floor / mixed.sum() * (1 - 1e-9)
        if before.min() > 0 and share.min() > 0:
            assert np.abs(np.log(share / before)).max() <= cap * (1 + 1e-6) + 1e-9
        before = share


def scaled(old: DomainStats, size: float) -> DomainStats:
    fields = ("grad_norm2_D", "grad_noise_D", "gram_DD", "alignment_D")
    return replace(old, **{name: size * getattr(old, name) for name in fields})


def test_what_begins_at_zero_stays_there_without_a_floor_and_rises_with_one() -> None:
    initial = {"d0": 0.5, "d1": 0.5}
    hard = window(3, norm2=[1, 1, 9], noise=[1, 1, 1])
    for form in ("simplified", "full", "exact_qp"):
        strict = adaptive("pike", context(3), **RAW, initial=initial, form=form)
        assert strict.update(hard)[2] == 0
        resumed = continued(strict, adaptive("pike", context(3), **RAW, initial=initial, form=form))
        assert resumed.update(hard)[2] == 0
    easy = window(3, norm2=[1, 1, 1], noise=[1, 900, 1])
    solved = adaptive("pike", context(3), **RAW, form="exact_qp", zeta_2=1.0)
    assert solved.update(easy)[1] == 0
    assert solved.update(window(3, norm2=[1] * 3, noise=[1] * 3))[1] > 0  # not barred for ever
    floored = adaptive("pike", context(3), initial=initial, floor=0.03)
    assert floored.initial == pytest.approx([0.495, 0.495, 0.01])
    assert floored.update(hard)[2] > 0.01


def test_initial_shares() -> None:
    about = context(3, tokens=[600, 300, 100])
    assert adaptive("pike", about, floor=0, initial="proportional").initial == pytest.approx(
        [0.6, 0.3, 0.1]
    )
    assert adaptive("pike", context(3, tokens=[5, 0, 5])).initial.tolist() == [0.5, 0, 0.5]
    for initial, wrong in (({"d1": 1.0}, r"initial\.d1 = 1\.0: the domain has no tokens"),
                           ({"dx": 1.0}, r"initial\.dx = 1\.0: the corpus has no")):  # fmt: skip
        config = CONFIG.validate_python({"kind": "pike", "initial": initial})
        with pytest.raises(RecipeError, match=wrong):
            build_mixer(config, context(3, tokens=[5, 0, 5]))


def test_the_warm_up_gathers_and_holds() -> None:
    uneven = [window(2, step=10 * k, norm2=[9, 1], noise=[1, 1]) for k in range(4)]
    mixer = adaptive("pike", context(2), warmup_steps=20)
    shares = [mixer.update(stats) for stats in uneven]
    assert [share.tolist() == [0.5, 0.5] for share in shares] == [True, True, False, False]
    without = adaptive("pike", context(2))
    assert shares[2].tolist() == without.update(uneven[0]).tolist()


def test_statistics_are_averaged_without_bias_and_norms_below_zero_count() -> None:
    fields = {"floor": 0, "max_log_change": None, "unit_free": False, "zeta_1": 1.0}
    for values in ([4.0, -8.0, 6.0], [4.0, -8.0, 6.0, 2.0]):
        mixer = adaptive("pike", context(2), stats_ema=0.25, **fields)
        logs = 0.0
        for at, value in enumerate(values, start=1):
            weights = 0.25 * 0.75 ** np.arange(at)[::-1]
            mean = (weights * values[:at]).sum() / weights.sum()
            logs += max(mean, 0)
            share = mixer.update(window(2, norm2=[value, 0], noise=[0, 0]))
            assert np.log(share[0] / share[1]) == pytest.approx(logs)


BROKEN = {
    "infinite": {"norm2": [np.inf, 1, 1], "noise": [1, 1, 1]},
    "no numbers": {"norm2": [np.nan] * 3, "noise": [1, 1, 1]},
    "not measured": {"norm2": [1, 1, 1]},
    "NaN loss": {"norm2": [9, 1, 1], "noise": [1, 1, 1], "loss": [1, np.nan, 1]},
}


@pytest.mark.parametrize("arrays", BROKEN.values(), ids=BROKEN.keys())
def test_broken_statistics_keep_the_weights_and_are_counted(arrays: dict[str, Any]) -> None:
    mixer = adaptive("pike", context(3))
    good = window(3, norm2=[3, 1, 2], noise=[1, 1, 1])
    before = mixer.update(good)
    assert mixer.update(window(3, step=10, **arrays)).tolist() == before.tolist()
    assert mixer.warnings == 1
    assert mixer.notes[0].startswith("steps 10 to 19: ")
    assert mixer.notes[0].endswith("; the weights stay as they were")
    # The broken window leaves nothing behind.
    clean = adaptive("pike", context(3))
    clean.update(good)
    assert mixer.update(good).tolist() == clean.update(good).tolist()
    assert continued(mixer, adaptive("pike", context(3))).warnings == 1


def test_only_the_last_few_broken_windows_are_put_into_words() -> None:
    mixer = adaptive("odm", context(2))
    for step in range(30):
        mixer.update(window(2, step=10 * step, loss=[np.nan, 1]))
    assert mixer.warnings == 30
    assert len(mixer.notes) == 10
    assert len(json.dumps(mixer.state_dict())) < 3000


def test_a_domain_that_was_not_measured_keeps_its_mean_or_that_of_the_others() -> None:
    fields = {"floor": 0, "max_log_change": None, "unit_free": False, "stats_ema": 1.0}
    mixer = adaptive("pike", context(3), **fields, zeta_1=0.1)
    first = mixer.update(window(3, norm2=[4, np.nan, 2], noise=[0, np.nan, 0]))
    assert np.log(first[1] / first[2]) == pytest.approx(0.1 * (3 - 2))
    second = mixer.update(window(3, norm2=[1, 8, 2], noise=[0] * 3))
    third = mixer.update(window(3, norm2=[1, np.nan, 2], noise=[0, np.nan, 0]))
    step = np.log(third / second)
    assert step[1] - step[2] == pytest.approx(0.1 * (8 - 2))
    assert mixer.warnings == 0


@pytest.mark.parametrize("kind", ["doge", "rb"])
def test_a_domain_without_a_gradient_does_not_spoil_the_gram_matrix(kind: str) -> None:
    gram = np.array([[2.0, 1, 0.5], [1, 2, 0.2], [0.5, 0.2, 2]])
    gaps = np.full((4, 4), np.nan)
    gaps[:3, :3] = gram
    mixer, small = adaptive(kind, context(4), **RAW), adaptive(kind, context(3), **RAW)
    share, alone = mixer.update(window(4, gram=gaps)), small.update(window(3, gram=gram))
    assert mixer.warnings == 0
    if kind == "doge":
        assert share[:3] / share[0] == pytest.approx(alone / alone[0])
    assert np.isfinite(share).all()


def test_paper_exact_takes_every_rail_away() -> None:
    guardrails = {"floor": 0.5, "max_log_change": 1e-3, "warmup_steps": 99, "stats_ema": 0.1}
    mixer = adaptive("pike", context(2), **guardrails, paper_exact=True, zeta_1=1.0)
    mixer.update(window(2, norm2=[1, 0], noise=[0, 0]))
    share = mixer.update(window(2, norm2=[7, 0], noise=[0, 0]))
    assert np.log(share[0] / share[1]) == pytest.approx(8)


def test_rounding_is_no_change_of_mind() -> None:
    mixer = adaptive("pike", context(3), floor=0.1, initial={"d0": 0.6, "d1": 0.3, "d2": 0.1})
    for step in range(40):
        last = mixer.update(window(3, step=10 * step, norm2=[2] * 3, noise=[3] * 3))
    settled = [mixer.update(window(3, norm2=[2] * 3, noise=[3] * 3)).tolist() for _ in range(400)]
    assert settled[-1] == settled[-2]
    assert last.sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["pike", "ado", "aioli", "odm"])
def test_the_state_of_a_thousand_domains_is_under_a_megabyte(kind: str) -> None:
    n = 1000
    rng = np.random.default_rng(0)
    fields = {"tau": 2.0} if kind == "pike" else {}
    mixer = adaptive(kind, context(n), **fields)
    for step in range(50):
        mixer.update(
            window(
                n,
                step=10 * step,
                tokens=rng.integers(1, 10**6, n),
                loss=2 + rng.random(n),
                norm2=rng.random(n),
                noise=rng.random(n),
            )
        )
    assert len(json.dumps(mixer.state_dict())) < 1_000_000
