"""Windows of statistics: combined over ranks, turned into shares, and logged."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.mixers import DomainStats
from raymix.streaming.controller.state import MixtureState
from raymix.streaming.controller.windows import LOSS_WEIGHTS, NOTE, Windows, combine_ranks
from tests.support.mixer_stats import adaptive, context
from tests.support.streams import fixed

DOMAINS = ("d0", "d1", "d2")
NAN = np.nan
INTERVAL = 10


def part(
    window: int = 0, *, tokens: Any = (100, 100, 100), loss: Any = (2.0, 2.0, 2.0), **more: Any
) -> DomainStats:
    """Return what one rank pushes for a window; arrays may be given as lists."""
    arrays = {k: v if k == "probe_passes" else np.array(v, np.float64) for k, v in more.items()}
    return DomainStats(
        step=window * INTERVAL,
        window=INTERVAL,
        tokens_D=np.array(tokens, np.int64),
        loss_D=np.array(loss, np.float64),
        **arrays,
    )


def measured(window: int, norm2: Any = (3.0, 1.0, 2.0), **more: Any) -> DomainStats:
    """Return a whole window as PiKE needs it."""
    return part(window, **{"grad_norm2_D": norm2, "grad_noise_D": [1.0, 1.0, 1.0]} | more)


# -- means over ranks ------------------------------------------------------------------------


def test_losses_are_means_over_tokens_and_tokens_are_sums() -> None:
    combined = combine_ranks(
        [
            part(tokens=[100, 0, 0], loss=[1.0, NAN, NAN]),
            part(tokens=[300, 50, 0], loss=[2.0, 4.0, NAN]),
        ]
    )
    assert combined.tokens_D.tolist() == [400, 50, 0]
    np.testing.assert_allclose(combined.loss_D, [1.75, 4.0, NAN])


def test_gradient_statistics_are_weighted_by_passes() -> None:
    combined = combine_ranks(
        [
            part(probe_passes=3.0, grad_norm2_D=[1.0, 0.0, 0.0], gram_DD=np.eye(3)),
            part(probe_passes=1.0, grad_norm2_D=[5.0, 4.0, 0.0], gram_DD=np.ones((3, 3))),
        ]
    )
    assert combined.probe_passes == 4
    assert combined.grad_norm2_D is not None
    assert combined.grad_norm2_D.tolist() == [2, 1, 0]
    assert combined.gram_DD is not None
    np.testing.assert_allclose(combined.gram_DD, 0.75 * np.eye(3) + 0.25)


def test_a_rank_that_measured_nothing_has_no_say() -> None:
    alone = measured(0, probe_passes=2.0)
    idle = [part(probe_passes=0.0), measured(0, [NAN] * 3, probe_passes=0.0)]
    for order in itertools.permutations([alone, *idle]):
        combined = combine_ranks(order)
        assert combined.grad_norm2_D is not None
        assert combined.grad_norm2_D.tolist() == [3, 1, 2]
        assert combined.probe_passes == 2


def test_what_a_rank_could_not_measure_is_left_out_domain_by_domain() -> None:
    combined = combine_ranks(
        [
            measured(0, [NAN, 1.0, NAN], probe_passes=5.0),
            measured(0, [3.0, 2.0, NAN], probe_passes=5.0),
            measured(0, [6.0, np.inf, NAN], probe_passes=10.0),
        ]
    )
    np.testing.assert_allclose(combined.grad_norm2_D, [5.0, 1.5, NAN])


def test_what_nobody_measured_is_none() -> None:
    combined = combine_ranks([part(), part(probe_passes=0.0, alignment_D=[1.0, 2.0, 3.0])])
    for name in ("grad_norm2_D", "grad_noise_D", "gram_DD", "alignment_D", "group_gram_NN"):
        assert getattr(combined, name) is None
    assert combined.valid_loss_D is None


@given(
    passes=st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=12
    ),
    data=st.data(),
)
def test_it_is_the_mean_over_passes_however_they_are_dealt_to_ranks(
    passes: list[list[float]], data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, 2 * len(passes)))
    owners = st.integers(0, world_size - 1)
    owner_P = data.draw(st.lists(owners, min_size=len(passes), max_size=len(passes)))
    parts = []
    for rank in range(world_size):
        mine = [values for values, owner in zip(passes, owner_P, strict=True) if owner == rank]
        fields = {"grad_norm2_D": np.mean(mine, axis=0)} if mine else {}
        tokens = [10 * len(mine)] * 3
        parts.append(part(tokens=tokens, probe_passes=float(len(mine)), **fields))
    combined = combine_ranks(parts)
    assert combined.probe_passes == len(passes)
    assert combined.tokens_D.tolist() == [10 * len(passes)] * 3
    np.testing.assert_allclose(combined.grad_norm2_D, np.mean(passes, axis=0), rtol=1e-9, atol=1e-9)


# -- windows ---------------------------------------------------------------------------------


def test_a_mixer_must_say_what_it_begins_with() -> None:
    with pytest.raises(TypeError, match="needs statistics but has no `initial`"):
        Windows(fixed((0.5, 0.3, 0.2)), INTERVAL, DOMAINS)


def test_ranks_and_windows_that_do_not_belong_are_dropped() -> None:
    windows = Windows(adaptive("pike", context(3)), INTERVAL, DOMAINS)
    assert not windows.push(0, 2, measured(0), world_size=2)
    assert not windows.push(0, -1, measured(0), world_size=2)
    assert not windows.push(0, 0, measured(0), world_size=2)
    assert not windows.push(0, 0, measured(0, [9.0] * 3), world_size=2)
    assert windows.push(0, 1, measured(0), world_size=2)
    assert windows.done == 1
    assert not windows.push(0, 1, measured(0), world_size=2)


@given(order=st.permutations(range(4)))
def test_the_order_in_which_ranks_push_is_no_matter_to_the_last_bit(order: list[int]) -> None:
    rng = np.random.default_rng(0)
    pushes = [measured(0, rng.normal(1, 1, 3), probe_passes=float(r + 1)) for r in range(4)]

    def weights(ranks: Any) -> list[float]:
        windows = Windows(adaptive("pike", context(3)), INTERVAL, DOMAINS)
        for rank in ranks:
            windows.push(0, rank, pushes[rank], world_size=4)
        return windows.shares(2)[0].tolist()

    assert weights(order) == weights(range(4))


def test_windows_complete_in_their_order_only() -> None:
    windows = Windows(adaptive("pike", context(3)), INTERVAL, DOMAINS)
    assert not windows.push(1, 0, measured(1), world_size=1)
    assert windows.known_until == 2 * INTERVAL
    assert windows.push(0, 0, measured(0), world_size=1)
    assert windows.known_until == 4 * INTERVAL
    stats = windows.shares(3)[1]
    assert stats is not None
    assert stats["window"] == 1


# -- log entries -----------------------------------------------------------------------


def state(mixer: Any = None, **options: Any) -> MixtureState:
    """Return the state of a run of one rank under PiKE, or the mixer given."""
    mixer = mixer or adaptive("pike", context(3))
    about = {"kind": "pike", "interval": INTERVAL} | options
    made = MixtureState(mixer, context(3), **about)
    made.register("one", 1)
    return made


def entries(made: MixtureState, until: int, *, leased: int = 0) -> list[Any]:
    """Return the log's entries once a rank may read up to step `until`."""
    lease = made.lease(
        "one", 0, step=leased, leased_until=leased, n_steps=until - leased, version=-1
    )
    assert lease is not None
    assert lease.until == until
    return list(lease.entries)


def test_an_entry_says_what_its_shares_follow_from() -> None:
    made = state()
    assert made.push("one", 0, 0, measured(0, [3.0, NAN, -1.0], alignment_D=[0.1, 0.2, 0.3]))
    first, second = entries(made, 30)
    assert (first.first_step, first.stats) == (0, None)
    assert second.first_step == 20
    assert second.stats == {
        "window": 0,
        "tokens": [100, 100, 100],
        "loss": [2.0, 2.0, 2.0],
        "grad_norm2": [3.0, None, -1.0],
        "grad_noise": [1.0, 1.0, 1.0],
        "alignment": [0.1, 0.2, 0.3],
    }
    assert second.weights[0] > second.weights[2]
    json.dumps(made.log.to_lines(), allow_nan=False)


BROKEN = {
    "a loss is not finite": {"loss": [2.0, NAN, 2.0]},
    "without grad_noise": {"grad_noise_D": [NAN] * 3, "probe_passes": 0.0},
    "norm2 is not finite": {"grad_norm2_D": [NAN] * 3},
}


@pytest.mark.parametrize("says", BROKEN)
def test_a_broken_window_is_one_entry_with_one_note_and_the_same_shares(says: str) -> None:
    made = state()
    made.push("one", 0, 0, measured(0))
    made.push("one", 1, 0, measured(1, **BROKEN[says]))
    made.push("one", 2, 0, measured(2))
    first, good, broken, after = entries(made, 50)
    assert [e.first_step for e in (first, good, broken, after)] == [0, 20, 30, 40]
    assert broken.weights == good.weights != after.weights
    note = broken.stats[NOTE]
    assert note.startswith("steps 10 to 19: ")
    assert says in note
    assert note.endswith("; the weights stay as they were")
    assert not any(NOTE in (e.stats or {}) for e in (first, good, after))
    assert "NaN" not in "".join(made.log.to_lines())


def test_a_loss_that_stays_broken_is_noted_window_by_window() -> None:
    made = state()
    for window in range(3):
        made.push("one", window, 0, measured(window, loss=[NAN, 2.0, 2.0]))
    notes = [entry.stats[NOTE] for entry in entries(made, 50)[1:]]
    assert [note.split(":")[0] for note in notes] == [
        "steps 0 to 9",
        "steps 10 to 19",
        "steps 20 to 29",
    ]


def test_a_domain_without_tokens_has_no_loss_and_that_is_no_fault() -> None:
    made = state()
    made.push("one", 0, 0, measured(0, tokens=[100, 0, 100], loss=[2.0, NAN, 2.0]))
    second = entries(made, 30)[1]
    assert second.stats["loss"] == [2.0, None, 2.0]
    assert NOTE not in second.stats


def test_nothing_new_is_no_entry() -> None:
    made = state(adaptive("pike", context(3), warmup_steps=1000))
    for window in range(4):
        made.push("one", window, 0, measured(window))
    assert [entry.first_step for entry in entries(made, 60)] == [0]


def test_factors_of_losses_stand_in_the_log_by_name() -> None:
    made = state(adaptive("pike", context(3), tau=2.0))
    made.push("one", 0, 0, measured(0, loss=[1.0, 2.0, 3.0]))
    first, second = entries(made, 30)
    assert first.stats is None
    factors = second.stats[LOSS_WEIGHTS]
    assert list(factors) == list(DOMAINS)
    y = np.exp(2.0 * np.array([1.0, 2.0, 3.0]))
    assert list(factors.values()) == pytest.approx(list(3 * y / y.sum()))


def test_factors_that_change_alone_make_an_entry_too() -> None:
    # Shares stand at the cap's edge of nothing: a gain of 0 moves factors only.
    mixer = adaptive("pike", context(3), tau=2.0, zeta_1=0.0, zeta_2=0.0)
    made = state(mixer)
    for window, losses in enumerate(([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])):
        made.push("one", window, 0, measured(window, loss=losses))
    logged = entries(made, 50)
    assert [entry.first_step for entry in logged] == [0, 20, 40]
    assert len({entry.weights for entry in logged}) == 1
    assert logged[1].stats[LOSS_WEIGHTS] != logged[2].stats[LOSS_WEIGHTS]


def test_an_ask_keeps_the_factors_that_the_mixer_decided_on() -> None:
    made = state(adaptive("pike", context(3), tau=2.0))
    entries(made, 10)
    made.push("one", 0, 0, measured(0, loss=[1.0, 2.0, 3.0]))
    assert made.set_weights([0.2, 0.3, 0.5], 20) == 20
    requested = entries(made, 30, leased=10)[-1]
    assert requested.mixer == "asked"
    assert requested.weights == (0.2, 0.3, 0.5)
    assert set(requested.stats) == {"mixer", LOSS_WEIGHTS}
    assert requested.stats["mixer"] != requested.weights


def test_an_ask_does_not_hide_a_note() -> None:
    made = state()
    entries(made, 10)
    made.push("one", 0, 0, measured(0, loss=[NAN, 2.0, 2.0]))
    made.set_weights([0.2, 0.3, 0.5], 20)
    requested = entries(made, 30, leased=10)[-1]
    assert (requested.mixer, requested.weights) == ("asked", (0.2, 0.3, 0.5))
    assert requested.stats[NOTE].startswith("steps 0 to 9: a loss is not finite")


@pytest.mark.parametrize("tau", [0.0, 2.0])
def test_a_snapshot_continues_the_log_as_if_nothing_had_been(tau: float) -> None:
    rng = np.random.default_rng(1)
    pushes = [
        measured(w, rng.normal(1, 1, 3), loss=[NAN, 2, 2] if w == 3 else rng.random(3) + 1)
        for w in range(8)
    ]
    whole = state(adaptive("pike", context(3), tau=tau))
    for window, stats in enumerate(pushes):
        whole.push("one", window, 0, stats)
    entries(whole, 100)

    begun = state(adaptive("pike", context(3), tau=tau))
    for window, stats in enumerate(pushes[:4]):
        begun.push("one", window, 0, stats)
    entries(begun, 40)
    assert begun.snapshot(50) is None
    snapshot = json.loads(json.dumps(begun.snapshot(40), allow_nan=False))
    again = state(adaptive("pike", context(3), tau=tau), snapshot=snapshot)
    for window, stats in enumerate(pushes[4:], start=4):
        again.push("one", window, 0, stats)
    entries(again, 100, leased=40)
    assert again.log.to_lines() == whole.log.to_lines()
