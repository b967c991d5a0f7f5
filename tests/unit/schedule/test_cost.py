"""Cost models: the formulas by hand, fits that recover what made the measurements, files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.errors import ScheduleError
from raymix.schedule import (
    MODELS,
    NETWORKS,
    CostModel,
    Link,
    Measurement,
    fit_cost_model,
    load_cost_model,
    preset,
    save_cost_model,
)
from raymix.schedule.cost.model import shard_tokens
from tests.support.scheduling import PLAIN, cost_of, full_cost

LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def measured(cost: CostModel, noise: float = 0.0, seed: int = 0) -> list[Measurement]:
    """Return the measurements of an ideal device of this model, with relative noise."""
    rng = np.random.default_rng(seed)

    def taken() -> Iterator[Measurement]:
        for tokens in LENGTHS:
            yield Measurement("linear", tokens, float(cost.linear(tokens)))
            for width in (1, 2, 8):
                seconds = float(cost.attention([tokens], width)[0])
                yield Measurement("attention", tokens, seconds, width)
            for link in cost.links:
                seconds = link.latency_s + link.token_s * tokens
                yield Measurement("gather", tokens, seconds, link.width)
            yield Measurement("memory", tokens, 2e9 + 3e6 * tokens)

    return [
        Measurement(m.kind, m.tokens, m.value * (1 + noise * rng.uniform(-1, 1)), m.width)
        for m in taken()
    ]


def fitted(measurements: list[Measurement], **changes: Any) -> CostModel:
    given = {"hardware": "one device", "date": "2026-11-22", "memory_bytes": 80e9} | changes
    return fit_cost_model(measurements, **given)


def test_attention_by_hand() -> None:
    cost = full_cost()
    assert cost.attention([100, 50]).tolist() == pytest.approx([1.0 + 0.2 + 0.01, 0.36])
    assert cost.attention([100], 4).tolist() == pytest.approx([0.25 + 0.2 + 0.01])
    assert cost.attention([0]).tolist() == [0]


def test_linear_layers_have_a_floor_and_cost_nothing_without_tokens() -> None:
    cost = full_cost()
    assert cost.linear([0, 1, 15, 100]).tolist() == pytest.approx([0, 0.2, 0.2, 1.05])


def test_links_are_those_of_the_next_larger_width_in_the_table() -> None:
    cost = full_cost()
    assert [cost.link(width).width for width in (2, 3, 8, 64)] == [2, 8, 8, 8]
    assert cost.gather([10, 10], np.array([2, 4])).tolist() == pytest.approx([0.11, 0.35])
    assert cost.link(1).token_s == 0
    assert PLAIN.gather([5], np.array([4])).tolist() == [0]


def test_shards_are_padded_to_equal_size() -> None:
    assert shard_tokens([10, 8, 1], 4).tolist() == [3, 2, 1]


def test_the_smallest_width_that_holds_a_sequence() -> None:
    assert PLAIN.min_widths([100, 101, 400], (1, 2, 4)).tolist() == [1, 2, 4]


def test_work_grows_with_the_width() -> None:
    cost = full_cost()
    lengths = np.arange(1, 200, 7)
    assert (cost.work(lengths, 4) > cost.work(lengths, 2)).all()
    assert (cost.work(lengths, 2) > cost.work(lengths)).all()


def test_a_fit_recovers_what_made_the_measurements() -> None:
    truth = preset("7b", "slow")
    truth = CostModel(**{
        **{name: getattr(truth, name) for name in ("quadratic_s", "edge_s", "linear_s", "base_s")},
        "piece_s": 2e-4,
        "floor_s": 0.05,
        "links": (Link(2, 1e-3, 1e-7), Link(8, 3e-3, 2e-6)),
        "memory_tokens": 26_000,
    })  # fmt: skip
    fit = fitted(measured(truth))
    for name in ("quadratic_s", "edge_s", "piece_s", "linear_s", "floor_s"):
        assert getattr(fit, name) == pytest.approx(getattr(truth, name), rel=1e-3), name
    assert fit.base_s == pytest.approx(truth.base_s, rel=1e-2)
    for link, true in zip(fit.links, truth.links, strict=True):
        assert link.width == true.width
        assert link.latency_s == pytest.approx(true.latency_s, rel=1e-6)
        assert link.token_s == pytest.approx(true.token_s, rel=1e-6)
    assert fit.memory_tokens == 26_000
    assert fit.errors is not None
    assert max(fit.errors.values()) < 1e-3
    assert (fit.hardware, fit.date) == ("one device", "2026-11-22")


@settings(max_examples=15)
@given(st.integers(0, 10_000))
def test_noise_in_measurements_is_noise_in_predictions_not_more(seed: int) -> None:
    truth = preset("0.5b", "nvlink")
    fit = fitted(measured(truth, noise=0.05, seed=seed), memory_tokens=26_000)
    for width in (1, 8):
        ratio = fit.attention(LENGTHS, width) / truth.attention(LENGTHS, width)
        assert np.abs(ratio - 1).max() < 0.1
    assert np.abs(fit.linear(LENGTHS) / truth.linear(LENGTHS) - 1).max() < 0.1
    assert fit.errors is not None
    assert max(fit.errors.values()) < 0.05


def test_no_coefficient_is_negative_whatever_is_measured() -> None:
    odd = [Measurement("attention", n, s) for n, s in ((10, 5.0), (20, 1.0), (40, 3.0))]
    odd += [Measurement("linear", n, s) for n, s in ((10, 9.0), (20, 3.0), (30, 1.0))]
    fit = fitted(odd, memory_tokens=100)
    assert min(fit.quadratic_s, fit.edge_s, fit.piece_s, fit.linear_s, fit.base_s) >= 0
    assert fit.errors is not None
    assert fit.errors["linear"] > 0.1, "a fit that is this bad must say so"


def test_a_cost_model_survives_its_file(tmp_path: Path) -> None:
    cost = fitted(measured(full_cost(), noise=0.02))
    save_cost_model(cost, tmp_path / "cost.json")
    assert load_cost_model(tmp_path / "cost.json") == cost
    document = json.loads((tmp_path / "cost.json").read_text())
    assert document["hardware"] == "one device"
    assert document["date"] == "2026-11-22"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not JSON"),
        ("[1]", "not a cost model"),
        ('{"format": 9}', "reads cost models of format 1"),
        ('{"format": 1, "speed": 2}', r"cost = \['speed'\]: unknown keys"),
        ('{"format": 1, "linear_s": 1}', "incomplete"),
    ],
)
def test_files_that_hold_no_cost_model_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(ScheduleError, match=message):
        load_cost_model(tmp_path / "cost.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"absent\.json': no such file"):
        load_cost_model(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_s": -1.0}, r"cost\.linear_s = -1\.0: not a finite number >= 0"),
        ({"quadratic_s": float("nan")}, r"cost\.quadratic_s = nan"),
        ({"memory_tokens": 0}, r"cost\.memory_tokens = 0: a rank must hold at least one token"),
        ({"links": (Link(4, 0, 0), Link(2, 0, 0))}, "the widths do not rise"),
        ({"links": (Link(1, 0, 0),)}, "a width below 2"),
        ({"links": (Link(2, -1.0, 0),)}, "not finite and >= 0"),
    ],
)
def test_impossible_figures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        cost_of(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("speed", 1, 1.0), r"measurement\.kind = 'speed': not a kind\. Known: attention"),
        (("linear", 0, 1.0), r"measurement\.tokens = 0"),
        (("linear", 1, -1.0), r"measurement\.value = -1\.0"),
        (("gather", 1, 1.0), "a group of one rank gathers nothing"),
    ],
)
def test_impossible_measurements_are_refused(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Measurement(*values)


@pytest.mark.parametrize("missing", ["attention", "linear", "memory"])
def test_too_few_measurements_are_refused(missing: str) -> None:
    remaining = [item for item in measured(full_cost()) if item.kind != missing]
    with pytest.raises(ScheduleError, match=rf"measurements\.{missing} = \[\]"):
        fitted(remaining)


def test_memory_measurements_need_a_budget_that_holds_a_token() -> None:
    with pytest.raises(ScheduleError, match="the bytes that a rank may use are needed"):
        fitted(measured(full_cost()), memory_bytes=None)
    with pytest.raises(ScheduleError, match="not one token fits"):
        fitted(measured(full_cost()), memory_bytes=2e9)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("network", NETWORKS)
def test_presets_say_that_they_are_assumed(model: str, network: str) -> None:
    cost = preset(model, network)
    assert cost.hardware.startswith("assumed")
    assert not cost.date


def test_the_7b_preset_is_of_the_size_of_its_model() -> None:
    """6 operations per token and weight, at 500 teraflops, of 7.1 billion without embeddings."""
    assert preset("7b", "nvlink").linear_s == pytest.approx(6 * 7.07e9 / 500e12, rel=0.01)
    # Where attention costs as much as the rest: 65K tokens by operations, less by their speed.
    cost = preset("7b", "nvlink")
    assert 40_000 < cost.linear_s / cost.quadratic_s < 70_000


def test_unknown_presets_are_named() -> None:
    with pytest.raises(ScheduleError, match=r"cost\.model = '8b': not a preset"):
        preset("8b", "nvlink")
    with pytest.raises(ScheduleError, match=r"Did you mean 'slow'\?"):
        preset("7b", "slwo")
