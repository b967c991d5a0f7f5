"""DGA against its closed forms: quadratics, one step by hand, bases, several targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymix.errors import RecipeError
from raymix.mixers import MixerContext, build_mixer
from tests.support.mixer_stats import CONFIG, RAW, adaptive, context, whole, window

PLAIN = {**RAW, "gradients": "raw", "ema": 1.0}


def joint(
    centers: Any, curvature: Any, *, sign: float = 1.0, updates: int = 1500, inverse: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return where theta and the shares end, on quadratics about `centers`, the target's last."""
    center_DP, curve_P = np.array(centers), np.array(curvature)
    n = len(center_DP)
    mixer = adaptive("dga", context(n), **PLAIN, targets=f"d{n - 1}", eta=0.2)
    theta_P, share_D = np.array([0.7, 0.1]), mixer.initial
    for _ in range(updates):
        # The model follows its mixture faster than the mixture changes.
        theta_P = share_D[:-1] @ center_DP[:-1]
        grad_DP = curve_P * (theta_P - center_DP)
        target_P = theta_P - center_DP[-1]
        target_P = target_P / curve_P if inverse else target_P
        share_D = mixer.update(window(n, alignment=sign * (grad_DP @ target_P)))
    return theta_P, share_D


def test_quadratics_end_at_the_target_with_its_barycentric_coordinates() -> None:
    theta, share = joint([(0, 0), (2, 0), (0, 2), (0.5, 0.8)], (1, 1))
    assert theta == pytest.approx([0.5, 0.8], abs=1e-6)
    assert share == pytest.approx([0.35, 0.25, 0.40, 0], abs=1e-6)


def test_the_printed_sign_runs_away_to_the_far_vertex() -> None:
    theta, share = joint([(0, 0), (2, 0), (0, 2), (0.5, 0.8)], (1, 1), sign=-1)
    assert theta == pytest.approx([2, 0], abs=1e-6)
    assert share == pytest.approx([0, 1, 0, 0], abs=1e-6)


@pytest.mark.parametrize("h", [1.0, 4.0, 9.0])
def test_greedy_alignment_is_biased_by_the_curvature(h: float) -> None:
    """With domains of curvature diag(1, h), the optimum is 1/2, plain DGA ends at 1 / (1 + h)."""
    centers = [(0, 0), (1, 1), (1, 0)]
    assert joint(centers, (1, h), updates=500)[1][1] == pytest.approx(1 / (1 + h), abs=1e-6)
    assert joint(centers, (1, h), updates=500, inverse=True)[1][1] == pytest.approx(0.5, abs=1e-6)


def test_one_step_is_a_softmax_of_plus_eta_times_alignment() -> None:
    initial = {"d0": 0.5, "d1": 0.3, "d2": 0.2}
    mixer = adaptive("dga", context(4), **PLAIN, targets="d3", eta=0.7, initial=initial)
    share = mixer.update(window(4, alignment=[1.0, -2.0, 0.0, 50.0]))
    wanted = np.array([0.5, 0.3, 0.2]) * np.exp(0.7 * np.array([1.0, -2.0, 0.0]))
    assert share == pytest.approx([*(wanted / wanted.sum()), 0.0], rel=1e-12)
    assert share[3] == 0


def test_a_target_equal_to_a_domain_raises_its_log_odds_by_its_squared_norm() -> None:
    mixer = adaptive("dga", context(3), **PLAIN, targets="d2", eta=0.3)
    share = mixer.update(window(3, alignment=[0.0, 4.0, 4.0]))
    assert np.log(share[1] / share[0]) == pytest.approx(0.3 * 4)


def test_zero_step_or_even_alignment_changes_nothing() -> None:
    still = adaptive("dga", context(3), **PLAIN, targets="d2", eta=0)
    assert still.update(window(3, alignment=[1, 2, 3])).tolist() == [0.5, 0.5, 0]
    even = adaptive("dga", context(3), **PLAIN, targets="d2")
    assert even.update(window(3, alignment=[5, 5, 3])).tolist() == [0.5, 0.5, 0]
    none = adaptive("dga", context(3), **PLAIN, targets="d2")
    assert none.update(window(3, alignment=[0, -5, 3]))[0] > 0.5


def test_only_what_is_sampled_by_is_averaged() -> None:
    about, beta = context(3), 0.25
    fields = {**PLAIN, "targets": "d2", "eta": 0.4}
    plain, averaged = (
        adaptive("dga", about, **fields),
        adaptive("dga", about, **fields | {"ema": beta}),
    )
    mean = plain.initial
    for step in range(6):
        stats = window(3, alignment=[np.sin(step), 1.0, 1.0])
        mean = (1 - beta) * mean + beta * plain.update(stats)
        assert averaged.update(stats) == pytest.approx(mean, rel=1e-12)
    settled = mean
    for n in range(1, 5):  # weights that stay: the average closes in geometrically
        target = plain.update(window(3, alignment=[0, 0, 1]))
        actual = averaged.update(window(3, alignment=[0, 0, 1]))
        assert actual == pytest.approx(target + (1 - beta) ** n * (settled - target))


@pytest.mark.parametrize("gradients", ["unit", "clip"])
def test_bounded_gradients_bound_what_one_update_can_do(gradients: str) -> None:
    fields = {**PLAIN, "targets": "d2", "gradients": gradients, "eta": 0.3}
    stats = window(3, alignment=[1e9, -1e9, 4.0], norm2=[4.0, 1.0, 4.0])
    share = adaptive("dga", context(3), **fields).update(stats)
    assert np.log(share[0] / share[1]) == pytest.approx(2 * 0.3)


def test_unit_and_clipped_gradients_by_hand() -> None:
    stats = window(4, alignment=[3.0, 0.1, 0.2, 9.0], norm2=[4.0, 0.25, -1.0, 9.0])
    unit = adaptive("dga", context(4), **PLAIN | {"gradients": "unit"}, targets="d3").update(stats)
    cosines = [3 / (2 * 3), 0.1 / (0.5 * 3), 0.0]  # a norm below 0 has no direction
    assert np.log(unit[:3] / unit[0]) == pytest.approx(np.array(cosines) - cosines[0])
    clip = adaptive("dga", context(4), **PLAIN | {"gradients": "clip"}, targets="d3").update(stats)
    clipped = [3 / (2 * 3), 0.1 / 3, 0.2 / 3]
    assert np.log(clip[:3] / clip[0]) == pytest.approx(np.array(clipped) - clipped[0])


# -- several targets -------------------------------------------------------------------------


def test_several_targets_count_the_same_or_by_how_far_they_lag() -> None:
    gram = np.zeros((4, 4))
    gram[0, 2] = gram[2, 0] = 3.0
    gram[1, 3] = gram[3, 1] = 1.0
    np.fill_diagonal(gram, 9.0)
    fields = {**PLAIN, "targets": ["d2", "d3"], "eta": 0.2}
    mean = adaptive("dga", context(4), **fields)
    assert mean.needs == {"gram", "tokens"}
    share = mean.update(window(4, gram=gram))
    assert np.log(share[0] / share[1]) == pytest.approx(0.2 * (3 - 1) / 2)
    grape = adaptive("dga", context(4), **fields, several="grape", task_step=3.0)
    stats = window(4, gram=gram, loss=[1, 1, 2.0, 4.0])
    first = grape.update(stats)
    gain = 0.2 * (3 / 2 - 1 / 4) / 2
    assert np.log(first[0] / first[1]) == pytest.approx(gain)
    # The batch helped d2 by 3 / 2 / 2 and d3 by 1 / 4 / 2: the lagging d3 counts for more now.
    task = np.exp(-3.0 * np.array([0.75, 0.125]))
    task /= task.sum()
    second = grape.update(stats)
    gain += 0.2 * (task[0] * 3 / 2 - task[1] * 1 / 4)
    assert np.log(second[0] / second[1]) == pytest.approx(gain)


def test_one_target_of_several_is_plain_dga() -> None:
    stats = whole(4, 3)
    plain = adaptive("dga", context(4), targets="d3")
    grape = adaptive("dga", context(4), targets="d3", several="grape")
    assert plain.update(stats).tolist() == grape.update(stats).tolist()


# -- bases -----------------------------------------------------------------------------------


def test_the_identity_as_bases_is_plain_dga_to_the_last_bit() -> None:
    identity = {f"b{at}": {f"d{at}": 1.0} for at in range(3)}
    fields = {"targets": "d3", "gradients": "raw"}
    plain = adaptive("dga", context(4), **fields)
    based = adaptive("dga", context(4), **fields, bases=identity, uniform_basis=False)
    assert based.needs == {"tokens", "group_alignment"}
    for step in range(5):
        a = np.random.default_rng(step).normal(size=4)
        stats = window(4, step=10 * step, alignment=a, group_alignment=a[:3])
        assert based.update(stats).tolist() == plain.update(stats).tolist()


def test_one_basis_is_a_static_mixture() -> None:
    mixer = adaptive(
        "dga", context(3), targets="d2", bases={"a": {"d0": 30, "d1": 10}}, uniform_basis=False
    )
    for step in range(3):
        assert mixer.update(whole(3, step, groups=1)).tolist() == [0.75, 0.25, 0]


def test_shares_stay_in_the_hull_of_the_bases_and_the_probe_knows_them() -> None:
    mixer = adaptive("dga", context(4), **RAW, targets="d3", bases={"a": {"d0": 1}}, ema=1.0)
    assert mixer.probe_groups is not None
    assert mixer.probe_groups.tolist() == [[1, 0, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]]
    share = mixer.update(whole(4, 1, groups=2))
    assert share[1] == pytest.approx(share[2])
    assert share[3] == 0


def write(path: Path, kind: str) -> str:
    names, rows = ["d0", "d1", "d2"], [[1.0, 3.0, 0.0], [0.0, 5.0, 5.0]]
    if kind == "json":
        path.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
        named = {str(i): dict(zip(names, row, strict=True)) for i, row in enumerate(rows)}
        path.write_text(json.dumps(named))
    elif kind == "csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in [names, *rows]) + "\n")
    else:
        np.savez(path, histograms=np.array(rows), domains=np.array(names))
    return str(path)


@pytest.mark.parametrize("kind", ["json", "csv", "npz"])
def test_bases_from_files(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"bases.{kind}", kind)
    mixer = adaptive("dga", context(4), targets="d3", bases=path, uniform_basis=False)
    assert mixer.probe_groups == pytest.approx(np.array([[0.25, 0.75, 0, 0], [0, 0.5, 0.5, 0]]))
    assert mixer.initial == pytest.approx([0.125, 0.625, 0.25, 0])


BAD: list[tuple[Any, str]] = [
    ({"a": {"d9": 1}}, r"mixer\.bases\.a\.d9 = 1\.0: the corpus has no such domain"),
    ({"a": {"d3": 1}}, r"a share in a target"),
    ({"a": {"d0": 0}}, r"a histogram is empty"),
    ("no/such.csv", r"mixer\.bases = 'no/such\.csv': cannot be read"),
    ("bases.txt", r"not a known kind of file"),
]


@pytest.mark.parametrize(("bases", "wrong"), BAD)
def test_bases_that_cannot_work(bases: Any, wrong: str) -> None:
    config = CONFIG.validate_python({"kind": "dga", "targets": "d3", "bases": bases})
    with pytest.raises(RecipeError, match=wrong):
        build_mixer(config, context(4))


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": 3}', '{"a": {"d0": "x"}}', "\x00"])
def test_a_file_of_something_else_is_one_clear_error(tmp_path: Path, text: str) -> None:
    for ending in ("json", "csv", "npz"):
        path = tmp_path / f"b.{ending}"
        path.write_text(text)
        fields = {"kind": "dga", "targets": "d3", "bases": str(path), "uniform_basis": False}
        with pytest.raises(RecipeError, match=r"mixer\.bases"):
            build_mixer(CONFIG.validate_python(fields), context(4))


# -- targets ---------------------------------------------------------------------------------


def test_targets_must_be_some_of_the_domains() -> None:
    for targets, wrong in ((["d9"], "no domain of the corpus"), (["d0", "d1"], "every domain")):
        config = CONFIG.validate_python({"kind": "dga", "targets": targets})
        with pytest.raises(RecipeError, match=wrong):
            build_mixer(config, context(2))


def test_targets_of_the_context_hold_for_every_kind() -> None:
    about = MixerContext(("a", "b", "c"), np.array([4, 2, 9]), 5, 10, targets=("c",))
    for kind in ("uniform", "proportional", "temperature", "unimax"):
        built: Any = build_mixer(CONFIG.validate_python({"kind": kind}), about)
        assert built.planned(0)[2] == 0
        assert built.planned(0).sum() == pytest.approx(1)
    assert adaptive("pike", about).initial.tolist() == [0.5, 0.5, 0]
    assert adaptive("ado", about).initial == pytest.approx([4 / 6, 2 / 6, 0])
