"""Searching the numbers of a merge: what may be searched, what a point means, what is tried."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.errors import MergeError
from raymix.merging import get_method, load_merge
from raymix.merging.recipe import MergeFile
from raymix.merging.run.settings import OptionResolver, check_options
from raymix.merging.search_space import (
    Dimension,
    apply_point,
    next_points,
    round_sizes,
    search_space,
    searchable,
    start_point,
)

SCALE = Dimension("scale", 0.1, 4.0, 1.0, log=True)
DROP = Dimension("drop", 0.0, 0.95, 0.8)


def file(method: str = "drm", **more: Any) -> MergeFile:
    models = more.pop("models", [{"model": "a"}, {"model": "b"}])
    return load_merge({"merge_method": method, "base_model": "base", "models": models, **more})


def option(result: MergeFile, name: str) -> Any:
    """Return the value of an option for a weight of the first layer."""
    scopes = [entry.parameters for entry in result.models]
    choice = OptionResolver(result, lambda method: scopes, 4).resolve("model.layers.0.mlp.weight")
    assert choice.options is not None
    value = choice.options.model_dump(by_alias=True)[name]
    # One value for all models, or the same for each: it means the same.
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("drm", ["scale", "drop", "drop_other", "rank_tolerance"]),
        ("ties", ["scale", "drop", "density"]),
        ("iso_cts", ["scale", "common"]),
        ("slerp", ["t"]),
        ("linear", []),
    ],
)
def test_what_a_method_can_be_searched_for(method: str, names: list[str]) -> None:
    assert searchable(get_method(method)) == names


@pytest.mark.parametrize(
    ("method", "text", "says"),
    [
        (
            "drm",
            "scael",
            "--search = 'scael': drm has no such option that can be searched. It has: scale, drop, "
            "drop_other, rank_tolerance. Did you mean 'scale'?",
        ),
        (
            "linear",
            "scale",
            "--search = 'scale': linear has no such option that can be searched. It has none.",
        ),
        (
            "ties",
            "drop,density",
            "--search = 'drop,density': drop is 1 - density of ties: "
            "the same number under two names. Name one of them.",
        ),
        ("drm", "scale,scale", "--search = 'scale,scale': scale is named twice."),
        ("drm", "", "--search = '': no option is named. Name options, e.g. --search scale,drop."),
        ("drm", "scale=2:1", "--search = 'scale=2:1': not a range."),
        ("drm", "scale=0:1", "not a range. Write NAME=LOW:HIGH with LOW below HIGH and above 0."),
        ("drm", "drop=0:2", "--search = 'drop=0:2': drop is a fraction. Allowed: within 0:1."),
        ("drm", "drop=a:b", "not a range"),
        ("drm", "scale:2", "--search = 'scale:2': not the name of an option."),
    ],
)
def test_what_cannot_be_searched_is_refused(method: str, text: str, says: str) -> None:
    with pytest.raises(MergeError) as caught:
        search_space(file(method), text)
    assert says in str(caught.value)


def test_every_fault_is_told() -> None:
    with pytest.raises(MergeError) as caught:
        search_space(file(), "nope,drop=3:4,scale")
    assert len(caught.value.problems) == 2


def test_a_value_set_where_a_search_does_not_reach_is_refused() -> None:
    models = [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b"}]
    with pytest.raises(MergeError, match=r"models\.0\.parameters\.density = 0\.5: set for some"):
        search_space(file("ties", models=models), "drop")
    with pytest.raises(MergeError, match=r"parameters\.drop = \[0\.9, 0\.5\]: not one number"):
        search_space(file(parameters={"drop": [0.9, 0.5]}), "drop")


def test_the_first_point_is_the_file_itself() -> None:
    for method, parameters in (("drm", {"drop": 0.6}), ("ties", {"density": 0.25}), ("tsv", {})):
        given_file = file(method, parameters=parameters)
        names = "scale,drop" if method != "tsv" else "scale"
        point = next_points(search_space(given_file, names), [], 7)[0]
        same = apply_point(given_file, point)
        for name in get_method(method).options.names():
            assert option(same, name) == option(given_file, name)
    assert start_point(search_space(file("ties", parameters={"density": 0.25}), "drop")) == {
        "drop": 0.75
    }


def test_scale_is_a_factor_wherever_the_file_says_something() -> None:
    models = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b"}]
    rules = [{"match": "mlp", "parameters": {"weight": [1.0, 3.0]}}]
    result = apply_point(
        file(models=models, rules=rules, parameters={"weight": 2.0}), {"scale": 0.5}
    )
    assert result.models[0].parameters == {"weight": 0.25}
    assert result.rules[0].parameters == {"weight": [0.5, 1.5]}
    assert result.parameters == {"weight": 1.0}
    assert option(apply_point(file("ties"), {"scale": 0.5}), "lambda") == 0.5
    filtered = {"lambda": [{"filter": "mlp", "value": 2}, {"value": 1}]}
    assert option(apply_point(file("ties", parameters=filtered), {"scale": 3.0}), "lambda") == 6


def test_drop_is_what_the_method_calls_it() -> None:
    assert option(apply_point(file(), {"drop": 0.3}), "drop") == 0.3
    assert option(apply_point(file("ties"), {"drop": 0.3}), "density") == 0.7


def test_methods_that_are_scaled_by_different_options_are_refused() -> None:
    mixed = file(rules=[{"match": "mlp", "merge_method": "ties"}])
    with pytest.raises(MergeError, match="ties is not scaled as drm"):
        apply_point(mixed, {"scale": 2.0})
    surviving = apply_point(file(rules=[{"match": "mlp", "merge_method": "base"}]), {"scale": 2.0})
    assert surviving.parameters == {"weight": 2.0}


def test_options_are_checked_before_there_are_models() -> None:
    check_options(file(parameters={"drop": 0.5}))
    with pytest.raises(MergeError, match=r"parameters\.drop = 1\.5: too large"):
        check_options(file(parameters={"drop": 1.5}))
    with pytest.raises(MergeError, match=r"parameters\.denstiy = 0\.5: no option of ties"):
        check_options(file("ties", parameters={"denstiy": 0.5}))
    with pytest.raises(MergeError, match="does not merge so many"):
        check_options(file("slerp"))


Loss = dict[str, float]


def searched(space: tuple[Dimension, ...], total: int, best: Loss) -> list[tuple[Loss, float]]:
    """Return a whole search on a bowl whose lowest point is at `best`."""

    def loss(point: Loss) -> float:
        return sum((d.unit_of(point[d.name]) - d.unit_of(best[d.name])) ** 2 for d in space)

    tried: list[tuple[Loss, float]] = []
    while points := next_points(space, tried, total):
        tried += [(point, loss(point)) for point in points]
    return tried


@given(
    st.integers(1, 40), st.sampled_from([(SCALE,), (DROP,), (SCALE, DROP)]), st.floats(0.05, 0.9)
)
def test_as_many_points_as_asked_all_within_limits(
    total: int, space: tuple[Dimension, ...], at: float
) -> None:
    tried = searched(space, total, {d.name: d.value_at(at) for d in space})
    assert len(tried) == total == sum(round_sizes(total))
    for point, _ in tried:
        for d in space:
            assert d.low - 1e-9 <= point[d.name] <= d.high + 1e-9
    # A search that begins anew with the same losses goes the same way.
    assert tried == searched(space, total, {d.name: d.value_at(at) for d in space})


@given(st.floats(0.15, 3.8))
def test_eleven_points_find_the_scale_to_a_fifth(best: float) -> None:
    tried = searched((SCALE,), 11, {"scale": best})
    result = min(tried, key=lambda pair: pair[1])[0]["scale"]
    assert abs(math.log(result / best)) < math.log(1.2)


def test_a_scale_beyond_the_range_is_followed() -> None:
    (scale,) = search_space(file(), "scale")
    tried = searched((scale,), 11, {"scale": 0.07})
    assert abs(math.log(min(tried, key=lambda pair: pair[1])[0]["scale"] / 0.07)) < math.log(1.2)
    (given,) = search_space(file(), "scale=0.1:4")
    assert min(point["scale"] for point, _ in searched((given,), 11, {"scale": 0.07})) == 0.1


def test_rounds_come_nearer() -> None:
    tried = searched((SCALE, DROP), 25, {"scale": 0.5, "drop": 0.3})
    assert round_sizes(25) == [13, 6, 6]
    ends = [13, 19, 25]
    reached = [min(loss for _, loss in tried[:end]) for end in ends]
    assert all(later <= earlier for earlier, later in pairwise(reached))
    assert reached[-1] < 0.01


def test_a_merge_that_fails_is_never_the_center() -> None:
    first = next_points((SCALE,), [], 11)
    losses = [math.inf, math.nan, 2.0, 1.0, math.inf, math.inf]
    second = next_points((SCALE,), list(zip(first, losses, strict=True)), 11)
    center = first[3]["scale"]
    assert all(center / 3 < point["scale"] < center * 3 for point in second)
