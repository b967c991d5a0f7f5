"""Mixers without statistics: hand-computed shares, schedules, replays, plug-ins, messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import raymix.recipe.plugins
from raymix.errors import RecipeError
from raymix.mixers import (
    DomainStats,
    Mixer,
    MixerContext,
    PlannedMixer,
    Replay,
    Shares,
    build_mixer,
    describe,
    known_mixers,
    mixer,
    shares_by_name,
    tempered,
    unimax,
)
from raymix.recipe import PluginMixer, Recipe, load_recipe, recipe_schema, recipe_to_yaml
from raymix.recipe.mixer import (
    ImportanceMixer,
    MixerConfig,
    ProportionalMixer,
    ReplayMixer,
    ScheduleMixer,
    SchedulePiece,
    StaticMixer,
    TemperatureMixer,
    UniformMixer,
    UnimaxMixer,
)
from raymix.recipe.plugins import MIXERS
from raymix.sampling import MixtureEntry, MixtureLog
from tests.support.recipes import document, write

CONTEXT = MixerContext(("web", "books", "code"), np.array([10_000, 1_000, 100]), 6_000, 100)


def planned(config: MixerConfig) -> PlannedMixer:
    built = build_mixer(config, CONTEXT)
    assert isinstance(built, PlannedMixer)
    assert built.needs == frozenset()
    return built


def stats(step: int, window: int) -> DomainStats:
    return DomainStats(
        step=step, window=window, tokens_D=np.array([1, 1, 1]), loss_D=np.array([3.0, 2.0, 1.0])
    )


FIXED: list[tuple[MixerConfig, list[float]]] = [
    (StaticMixer(kind="static", weights={"code": 0.25, "web": 0.75}), [0.75, 0.0, 0.25]),
    (UniformMixer(kind="uniform"), [1 / 3, 1 / 3, 1 / 3]),
    (ProportionalMixer(), [100 / 111, 10 / 111, 1 / 111]),
    (TemperatureMixer(kind="temperature", temperature=1), [100 / 111, 10 / 111, 1 / 111]),
    (TemperatureMixer(kind="temperature", temperature=2), [100, 10 * 10**0.5, 10]),
    (TemperatureMixer(kind="temperature", temperature=1e9), [1 / 3, 1 / 3, 1 / 3]),
    # 6,000 tokens: code is capped at 4 x 100, the other two share 5,600 evenly.
    (UnimaxMixer(kind="unimax", max_epochs=4), [2800 / 6000, 2800 / 6000, 400 / 6000]),
    # code at 100, books at 1,000, web takes the other 4,900.
    (UnimaxMixer(kind="unimax", max_epochs=1), [4900 / 6000, 1000 / 6000, 100 / 6000]),
    (UnimaxMixer(kind="unimax", max_epochs=100), [1 / 3, 1 / 3, 1 / 3]),
]


@pytest.mark.parametrize(("config", "expected"), FIXED)
def test_fixed_shares_are_those_computed_by_hand(
    config: MixerConfig, expected: list[float]
) -> None:
    built = planned(config)
    expected_D = np.array(expected) / sum(expected)
    assert built.boundaries == (0,)
    for step in (0, 7, 10**9):
        assert built.planned(step) == pytest.approx(expected_D, abs=1e-8)
    assert built.update(stats(0, 10)).tolist() == built.planned(0).tolist()
    assert describe(built).startswith(config.kind)


def test_importance_goes_by_the_nearest_documents_and_leaves_targets_out() -> None:
    config = ImportanceMixer(kind="importance", targets=("books",), floor=0.1)
    unknown = build_mixer(config, CONTEXT)
    assert isinstance(unknown, PlannedMixer)
    assert unknown.planned(0).tolist() == [0.5, 0.0, 0.5]
    built = build_mixer(config, replace(CONTEXT, nearest_D=np.array([30, 0, 10])))
    assert isinstance(built, PlannedMixer)
    assert built.planned(0) == pytest.approx([0.9 * 0.75 + 0.05, 0.0, 0.9 * 0.25 + 0.05])
    assert "40 documents of books" in describe(built)
    with pytest.raises(ValidationError, match="importance needs a target"):
        ImportanceMixer(kind="importance")


@given(
    st.lists(st.integers(1, 10**12), min_size=1, max_size=30),
    st.integers(1, 10**13),
    st.floats(0.1, 100),
)
def test_unimax_is_uniform_up_to_the_cap(tokens: list[int], total: int, max_epochs: float) -> None:
    tokens_D = np.array(tokens)
    budget_D, capped_D = unimax(tokens_D, total, max_epochs)
    assert (budget_D <= max_epochs * tokens_D * (1 + 1e-12)).all()
    free = budget_D[~capped_D]
    if free.size:
        assert budget_D.sum() == pytest.approx(total)
        assert free == pytest.approx(np.full(free.size, free[0]))
        assert budget_D[capped_D].max(initial=0) <= free[0] * (1 + 1e-9)
    else:
        assert budget_D.sum() <= total * (1 + 1e-9)


@given(st.lists(st.integers(0, 10**13), min_size=2, max_size=9), st.floats(0.01, 1e6))
def test_temperature_keeps_order_and_gives_nothing_to_the_empty(
    tokens: list[int], temperature: float
) -> None:
    tokens_D = np.array([*tokens, 1])
    shares_D = tempered(tokens_D, temperature)
    assert shares_D.sum() == pytest.approx(1)
    assert (np.diff(shares_D[np.argsort(tokens_D)]) >= 0).all()
    assert (shares_D[tokens_D == 0] == 0).all()


def schedule(interpolate: str) -> ScheduleMixer:
    pieces = [
        {"step": 0, "weights": {"web": 1.0}},
        {"step": 100, "weights": {"web": 0.5, "books": 0.5}},
        {"step": 300, "weights": {"code": 1.0}},
    ]
    return ScheduleMixer.model_validate(
        {"kind": "schedule", "pieces": pieces, "interpolate": interpolate}
    )


def test_a_held_schedule_jumps_at_its_pieces() -> None:
    built = planned(schedule("hold"))
    assert built.boundaries == (0, 100, 300)
    assert built.planned(99).tolist() == [1, 0, 0]
    assert built.planned(100).tolist() == [0.5, 0.5, 0]
    assert built.planned(299).tolist() == [0.5, 0.5, 0]
    assert built.planned(10**6).tolist() == [0, 0, 1]


def test_a_linear_schedule_moves_in_straight_lines() -> None:
    built = planned(schedule("linear"))
    assert built.planned(0).tolist() == [1, 0, 0]
    assert built.planned(50).tolist() == [0.75, 0.25, 0]
    assert built.planned(200).tolist() == [0.25, 0.25, 0.5]
    assert built.planned(300).tolist() == built.planned(999).tolist() == [0, 0, 1]
    assert built.update(stats(40, 10)).tolist() == [0.75, 0.25, 0]


def test_planned_shares_cannot_be_overwritten() -> None:
    shares_D = planned(schedule("hold")).planned(0)
    with pytest.raises(ValueError, match="read-only"):
        shares_D[0] = 0


def write_log(path: Path) -> ReplayMixer:
    log = MixtureLog(("code", "web", "books"))
    log.append(MixtureEntry(0, 0, (0.2, 0.3, 0.5), "pike"))
    log.append(MixtureEntry(1, 64, (0.0, 1.0, 0.0), "pike", {"loss": [1.0, 2.0, 3.0]}))
    path.write_text("\n".join(log.to_lines()) + '\n{"version": 2, "fir')
    return ReplayMixer(kind="replay", log=str(path))


def test_a_replay_follows_the_log_of_another_run(tmp_path: Path) -> None:
    built = planned(write_log(tmp_path / "mixture_log.jsonl"))
    assert built.boundaries == (0, 64)
    assert built.planned(63).tolist() == [0.3, 0.5, 0.2]
    assert built.planned(64).tolist() == [1.0, 0.0, 0.0]


def test_a_replay_is_exact_to_the_last_bit_and_brings_loss_weights(tmp_path: Path) -> None:
    weights = np.random.default_rng(1).random(3)
    weights /= weights.sum() * (1 + 3e-16)
    log = MixtureLog(CONTEXT.domains)
    factors = dict(zip(CONTEXT.domains, [0.5, 1.5, 1.0], strict=True))
    log.append(MixtureEntry(0, 0, tuple(weights.tolist()), "pike"))
    log.append(MixtureEntry(1, 7, (0.0, 1.0, 0.0), "pike", {"loss_weights": factors}))
    path = tmp_path / "mixture_log.jsonl"
    path.write_text("\n".join(log.to_lines()))
    built = planned(ReplayMixer(kind="replay", log=str(path)))
    assert isinstance(built, Replay)
    assert built.planned(6).tolist() == weights.tolist()
    assert built.planned_loss_weights(6) is None
    factors = built.planned_loss_weights(7)
    assert factors is not None
    assert factors.tolist() == [0.5, 1.5, 1.0]


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ('{"first_step": 0, "shares": {"web": 1}}', r"the log has no shares for books, code"),
        (None, "cannot be read"),
        ("", "no entries"),
        ("nonsense\n" * 2, "line 1 is not an entry"),
        ('{"first_step": 0}', "line 1 is not an entry"),
        ('{"first_step": 5, "shares": {"web": 1}}', "start at step 0"),
        ('{"first_step": 0, "shares": {"wed": 1}}', r"entry 0\.wed = 1: .*Did you mean 'web'"),
        ('{"first_step": 0, "shares": {"web": 0.5}}', r"entry 0 = .*sum to 0\.5, not to 1"),
    ],
)
def test_a_replay_of_no_log_says_what_is_wrong(
    tmp_path: Path, lines: str | None, wrong: str
) -> None:
    path = tmp_path / "mixture_log.jsonl"
    if lines is not None:
        path.write_text(lines)
    with pytest.raises(RecipeError, match=wrong):
        build_mixer(ReplayMixer(kind="replay", log=str(path)), CONTEXT)


def test_an_unknown_domain_is_named_with_the_nearest_one() -> None:
    config = StaticMixer(kind="static", weights={"boks": 0.5, "web": 0.3, "x": 0.2})
    with pytest.raises(RecipeError) as caught:
        build_mixer(config, CONTEXT)
    assert caught.value.problems == (
        "mixer.weights.boks = 0.5: the corpus has no such domain. It has web, books, code. "
        "Did you mean 'books'?",
        "mixer.weights.x = 0.2: the corpus has no such domain. It has web, books, code.",
    )


def test_thousands_of_unknown_domains_are_named_in_short() -> None:
    names = tuple(f"cluster-{at:06d}" for at in range(2000))
    context = MixerContext(names, np.ones(2000, np.int64), 10, 10)
    wrong = {f"klaster-{at:06d}": 1 / 2000 for at in range(2000)}
    with pytest.raises(RecipeError) as caught:
        shares_by_name(wrong, context, path="ask")
    assert len(caught.value.problems) == 6
    assert "1995 more names are of no domain" in caught.value.problems[-1]


def test_a_target_has_no_share_and_may_be_given_none() -> None:
    context = MixerContext(("web", "books", "code"), CONTEXT.tokens_D, 100, 9, targets=("books",))
    fixed: Any = build_mixer(StaticMixer(kind="static", weights={"web": 1.0, "books": 0}), context)
    assert fixed.planned(0).tolist() == [1, 0, 0]
    pieces = (SchedulePiece(step=0, weights={"web": 0.9, "books": 0.1}),)
    with pytest.raises(RecipeError, match=r"pieces\.0\.weights\.books = 0\.1: a target is"):
        build_mixer(ScheduleMixer(kind="schedule", pieces=pieces), context)
    named: Any = build_mixer(UniformMixer(kind="uniform", targets=("web", "code")), CONTEXT)
    assert named.planned(0).tolist() == [0, 1, 0]


def test_all_pieces_of_a_schedule_are_checked_at_once() -> None:
    pieces = (
        SchedulePiece(step=0, weights={"wbe": 1.0}),
        SchedulePiece(step=9, weights={"cod": 1.0}),
    )
    with pytest.raises(RecipeError) as caught:
        build_mixer(ScheduleMixer(kind="schedule", pieces=pieces), CONTEXT)
    first, second = caught.value.problems
    assert first.startswith("mixer.pieces.0.weights.wbe = 1.0: ")
    assert second.startswith("mixer.pieces.1.weights.cod = 1.0: ")


@pytest.mark.parametrize(
    ("weights", "wrong"),
    [
        ({"web": 0.6, "books": 0.3}, r"ask = .*sum to 0\.9, not to 1\. Left out, so 0: code\. Div"),
        ({"web": 0.6, "books": 0.3, "code": 0.3}, r"sum to 1\.2, not to 1\. Divide each by 1\.2"),
        ({"web": 0.0}, "Give a domain a weight"),
        ({"web": 1.5, "books": -0.5}, r"ask\.books = -0\.5: not a number >= 0"),
        ({"web": float("nan")}, r"ask\.web = nan: not a number"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights: dict[str, float], wrong: str) -> None:
    with pytest.raises(RecipeError, match=wrong):
        shares_by_name(weights, CONTEXT, path="ask")


@pytest.mark.parametrize("third", [0.3333333, 0.333, 0.33])
def test_rounded_weights_are_divided_by_their_sum(third: float) -> None:
    shares_D = shares_by_name(dict.fromkeys(("web", "books", "code"), third), CONTEXT, path="ask")
    assert shares_D.tolist() == pytest.approx([1 / 3] * 3, abs=1e-15)


@pytest.mark.parametrize("weights", [{"web": 3, "books": 1}, {"web": 75, "books": 25}])
def test_relative_weights_are_ratios(weights: dict[str, float]) -> None:
    static = StaticMixer(kind="static", weights=weights, relative=True)
    assert planned(static).planned(0).tolist() == [0.75, 0.25, 0]
    pieces = (SchedulePiece(step=0, weights=weights), SchedulePiece(step=5, weights={"code": 2}))
    mixer = planned(ScheduleMixer(kind="schedule", pieces=pieces, relative=True))
    assert [mixer.planned(step).tolist() for step in (0, 5)] == [[0.75, 0.25, 0], [0, 0, 1]]
    # Only where the recipe says so: a forgotten domain must not pass for a ratio.
    with pytest.raises(ValidationError, match="relative: true"):
        StaticMixer(kind="static", weights=weights)
    with pytest.raises(ValidationError, match="Give at least one domain a share"):
        StaticMixer(kind="static", weights={"web": 0}, relative=True)


def test_a_run_longer_than_unimax_allows_is_refused_with_the_epochs_it_takes() -> None:
    with pytest.raises(RecipeError, match=r"mixer\.max_epochs = 0\.5.*at least 0\.541 epochs"):
        build_mixer(UnimaxMixer(kind="unimax", max_epochs=0.5), CONTEXT)


class Greedy:
    """A mixer as a third party would write it: everything to the largest loss."""

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})

    def __init__(self, n_domains: int) -> None:
        self.n_domains = n_domains

    def update(self, stats: DomainStats) -> Shares:
        return np.eye(self.n_domains)[np.argmax(stats.loss_D)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class GreedyConfig:
    kind = "greedy"


def greedy(config: GreedyConfig, context: MixerContext) -> Mixer:
    return Greedy(len(context.domains))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MIXERS, "factories", dict(MIXERS.factories))


@pytest.mark.usefixtures("registry")
def test_a_registered_mixer_is_built_like_our_own() -> None:
    mixer("greedy")(greedy)
    built = build_mixer(GreedyConfig(), CONTEXT)
    assert built.update(stats(0, 5)).tolist() == [1, 0, 0]
    assert not isinstance(built, PlannedMixer)
    assert "greedy" in known_mixers()
    assert describe(built) == "Greedy, from loss"


def install(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    point = EntryPoint("greedy", value, "raymix.mixers")
    monkeypatch.setattr(
        raymix.recipe.plugins,
        "entry_points",
        lambda **about: EntryPoints([point]).select(**about),
    )


@pytest.mark.usefixtures("registry")
def test_a_mixer_of_another_package_is_found_by_its_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, f"{__name__}:greedy")
    assert "greedy" in known_mixers()
    assert isinstance(build_mixer(GreedyConfig(), CONTEXT), Mixer)


@pytest.mark.usefixtures("registry")
def test_a_broken_entry_point_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "no_such_module:greedy")
    with pytest.raises(RecipeError, match=r"'no_such_module:greedy' cannot be loaded"):
        build_mixer(GreedyConfig(), CONTEXT)


@pytest.mark.usefixtures("registry")
def test_a_recipe_can_name_a_mixer_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, f"{__name__}:greedy")
    data = document(mixer={"kind": "greedy", "targets": ["books"], "slope": {"a": [1, 2]}})
    recipe = Recipe.model_validate(data)
    assert isinstance(recipe.mixer, PluginMixer)
    assert recipe.mixer.targets == ("books",)
    assert recipe.mixer.model_dump()["slope"] == {"a": [1, 2]}
    again = Recipe.model_validate(yaml.safe_load(recipe_to_yaml(recipe)))
    assert again == recipe
    assert isinstance(build_mixer(recipe.mixer, CONTEXT), Greedy)
    schema = recipe_schema()
    jsonschema_kinds = json.dumps(schema["properties"]["mixer"])
    assert '"greedy"' in jsonschema_kinds


@pytest.mark.usefixtures("registry")
def test_overrides_to_and_from_a_kind_of_another_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, f"{__name__}:greedy")
    ours = write(tmp_path / "ours.yaml", document())
    mixer = load_recipe(ours, ["mixer.kind=greedy", "mixer.slope=2"]).mixer
    assert mixer.model_dump() == {"kind": "greedy", "targets": (), "slope": 2}
    theirs = write(tmp_path / "theirs.yaml", document(mixer={"kind": "greedy", "slope": 1}))
    assert load_recipe(theirs, ["mixer.kind=uniform"]).mixer == UniformMixer(kind="uniform")
    with pytest.raises(
        RecipeError, match=r"mixer\.kind = 'greeedy': not known\. Did you mean 'greedy'"
    ):
        load_recipe(ours, ["mixer.kind=greeedy"])


@pytest.mark.usefixtures("registry")
def test_a_mixer_registered_by_a_program_can_be_named_too() -> None:
    with pytest.raises(ValueError, match="registered_here"):
        Recipe.model_validate(document(mixer={"kind": "registered_here"}))
    mixer("registered_here")(greedy)
    recipe = Recipe.model_validate(document(mixer={"kind": "registered_here"}))
    assert isinstance(build_mixer(recipe.mixer, CONTEXT), Greedy)


def test_without_other_packages_the_schema_is_that_of_our_kinds() -> None:
    mixer_schema = recipe_schema()["properties"]["mixer"]
    assert "anyOf" not in mixer_schema
    assert {"pike", "dga", "static"} <= set(mixer_schema["discriminator"]["mapping"])


def test_an_unknown_kind_lists_the_known_ones() -> None:
    config = UniformMixer.model_construct(kind="unifrom")
    with pytest.raises(RecipeError) as caught:
        build_mixer(config, CONTEXT)
    text = str(caught.value)
    assert text.startswith("mixer.kind = 'unifrom': not a mixer. Known: ")
    assert text.endswith("Did you mean 'uniform'?")
    assert {"static", "schedule", "replay", "unimax"} <= set(known_mixers())


def test_states_survive_a_round_trip_through_json() -> None:
    built = planned(schedule("linear"))
    again = planned(schedule("linear"))
    again.load_state_dict(json.loads(json.dumps(built.state_dict())))
    assert again.planned(37).tolist() == built.planned(37).tolist()
