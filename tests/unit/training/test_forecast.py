"""The forecast of a run against the sampler it stands for."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raymix.errors import CorpusError
from raymix.mixers import MixerContext, build_mixer
from raymix.recipe import ProportionalMixer, ScheduleMixer, SchedulePiece, UniformMixer
from raymix.sampling import NO_LIMIT, Allocator, fixed_point
from raymix.training.plan.forecast import Segment, forecast, mixture_segments

INF = np.inf


def context(*tokens: int, steps: int = 100) -> MixerContext:
    names = tuple(f"d{number}" for number in range(len(tokens)))
    return MixerContext(names, np.array(tokens), total_tokens=steps * 10, total_steps=steps)


def schedule(interpolate: Literal["linear", "hold"], *pieces: tuple[int, float]) -> ScheduleMixer:
    made = [SchedulePiece(step=step, weights={"d0": w, "d1": 1 - w}) for step, w in pieces]
    return ScheduleMixer(kind="schedule", pieces=tuple(made), interpolate=interpolate)


def test_fixed_shares_are_one_segment() -> None:
    where = context(1, 3)
    (only,) = mixture_segments(build_mixer(ProportionalMixer(), where), where, window=7)
    assert (only.start, only.stop) == (0, 100)
    assert only.share_D.tolist() == [0.25, 0.75]


def test_a_schedule_is_cut_at_its_pieces() -> None:
    where = context(1, 1)
    config = schedule("hold", (0, 1.0), (30, 0.5), (400, 0.0))
    segments = mixture_segments(build_mixer(config, where), where, window=7)
    assert [(s.start, s.stop, s.share_D[0]) for s in segments] == [(0, 30, 1.0), (30, 100, 0.5)]


def test_a_linear_schedule_is_followed_window_by_window() -> None:
    where = context(1, 1)
    config = schedule("linear", (0, 1.0), (80, 0.0))
    segments = mixture_segments(build_mixer(config, where), where, window=20)
    assert [s.start for s in segments] == [0, 20, 40, 60, 80]
    assert [s.share_D[0] for s in segments] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_long_linear_schedule_has_few_segments() -> None:
    where = context(1, 1, steps=10**9)
    config = schedule("linear", (0, 1.0), (10**9, 0.0))
    segments = mixture_segments(build_mixer(config, where), where, window=1)
    assert len(segments) <= 2001
    assert segments[-1].stop == 10**9


def test_without_caps_shares_are_read_as_asked() -> None:
    result = forecast([Segment(0, 100, np.array([0.2, 0.8]))], tokens_per_step=10)
    assert result.read_D.tolist() == pytest.approx([200, 800])
    assert result.exhausted_step == INF
    assert np.isinf(result.cap_step_D).all()


def test_at_its_cap_a_domain_leaves_its_share_to_the_others() -> None:
    segments = [Segment(0, 100, np.array([0.5, 0.3, 0.2]))]
    result = forecast(segments, tokens_per_step=10, cap_D=np.array([100.0, INF, INF]))
    assert result.cap_step_D.tolist() == [20.0, INF, INF]
    assert result.read_D.tolist() == pytest.approx([100, 540, 360])
    assert result.share_D.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_when_all_are_capped_the_run_ends_early() -> None:
    segments = [Segment(0, 100, np.array([0.5, 0.5, 0.0]))]
    result = forecast(segments, tokens_per_step=10, cap_D=np.array([100.0, 300.0, 1e9]))
    assert result.exhausted_step == pytest.approx(40)
    assert result.read_D.tolist() == pytest.approx([100, 300, 0])


def test_caps_met_exactly_at_the_end_are_no_shortage() -> None:
    segments = [Segment(0, 100, np.array([0.3, 0.7]))]
    result = forecast(segments, tokens_per_step=10, cap_D=np.array([300.0, 700.0]))
    assert result.exhausted_step == INF


def test_many_domains_cost_no_more_than_their_caps() -> None:
    n_domains = 10_000
    share_D = np.full(n_domains, 1 / n_domains)
    cap_D = np.where(np.arange(n_domains) % 100 == 0, 50.0 + np.arange(n_domains), INF)
    segments = [Segment(0, 10**9, share_D)]
    result = forecast(segments, tokens_per_step=16_384, cap_D=cap_D)
    assert result.exhausted_step == INF
    assert result.read_D.sum() == pytest.approx(16_384 * 10**9)
    assert np.isfinite(result.cap_step_D).sum() == 100


def simulate(
    segments: list[Segment], rows: int, limit_D: NDArray[np.int64]
) -> tuple[NDArray[np.int64], int]:
    """Return the rows that the real sampler reads, and the step it gets to."""
    allocator = Allocator(limit_D.size, limit_D)
    done = 0
    for segment in segments:
        q_D = fixed_point(segment.share_D)
        try:
            while done < segment.stop:
                done += len(allocator.allocate_steps(q_D, rows, segment.stop - done))
        except CorpusError:
            break
    return allocator.count_D, done


@settings(max_examples=80)
@given(
    weights=st.lists(
        st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any), min_size=1, max_size=3
    ),
    limits=st.lists(st.one_of(st.none(), st.integers(1, 400)), min_size=4, max_size=4),
    rows=st.integers(1, 9),
    steps=st.integers(3, 60),
)
def test_the_forecast_agrees_with_the_sampler(
    weights: list[list[int]], limits: list[int | None], rows: int, steps: int
) -> None:
    bounds = np.linspace(0, steps, len(weights) + 1).astype(int).tolist()
    segments = [
        Segment(start, stop, np.array(weight) / sum(weight))
        for weight, start, stop in zip(weights, bounds[:-1], bounds[1:], strict=True)
    ]
    cap_D = np.array([INF if limit is None else limit for limit in limits])
    limit_D = np.array([NO_LIMIT if limit is None else limit for limit in limits])
    result = forecast(segments, tokens_per_step=rows, cap_D=cap_D)
    count_D, done = simulate(segments, rows, limit_D)
    reached = steps if np.isinf(result.exhausted_step) else result.exhausted_step
    # Whole rows: at each change of mixture or cap a domain may be a few rows before or behind.
    slack = 4 * (len(weights) + 1)
    assert abs(done - reached) <= 1 + slack / rows
    assert np.abs(count_D - result.read_D).max() <= slack + rows


def test_uniform_over_one_domain() -> None:
    where = context(5)
    segments = mixture_segments(build_mixer(UniformMixer(kind="uniform"), where), where, window=1)
    result = forecast(segments, tokens_per_step=2)
    assert result.share_D.tolist() == [1.0]
    assert result.read_D.tolist() == [200.0]
