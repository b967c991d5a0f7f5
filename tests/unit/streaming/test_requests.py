"""Requests that hold, releases, and requests in files of the run directory, without Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymix.errors import RecipeError
from raymix.mixers import DomainStats, Mixer, MixerContext, Planned
from raymix.streaming.controller.build import build_mixture_state
from raymix.streaming.controller.local import LocalController
from raymix.streaming.controller.request_files import ControlRequest, SentRequest
from raymix.streaming.controller.state import MixtureState
from tests.support.streams import TokensMixer, fixed

DOMAINS = ("a", "b", "c")
CONTEXT = MixerContext(DOMAINS, np.array([100, 200, 300]), total_tokens=10**6, total_steps=1000)
SHARES = (0.5, 0.3, 0.2)
OTHER = (0.1, 0.1, 0.8)
NAMED = dict(zip(DOMAINS, OTHER, strict=True))
INTERVAL = 10


class Run:
    """One rank that reads step by step and pushes its windows."""

    def __init__(self, mixer: Mixer | None = None, attempt: str = "one", **options: Any) -> None:
        self.state: MixtureState = build_mixture_state(
            mixer or fixed(SHARES), CONTEXT, probe_interval=INTERVAL, **options
        )
        self.attempt = attempt
        self.state.register(attempt, 1)
        self.step = 0

    def read(self, until: int) -> list[tuple[float, ...]]:
        """Read up to a step, one lease each, and return the shares of each step."""
        seen = []
        for step in range(self.step, until):
            lease = self.state.lease(
                self.attempt, 0, step=step, leased_until=step, n_steps=1, version=-1
            )
            assert lease is not None
            seen.append(self.state.log.at(step).weights)
            if (step + 1) % INTERVAL == 0:
                self.push(step // INTERVAL)
        self.step = until
        return seen

    def push(self, window: int) -> None:
        tokens = np.array([window + 1, 7 * window, 5], dtype=np.int64)
        loss = np.array([1.0, 2.0, np.nan])
        stats = DomainStats(step=window * INTERVAL, window=INTERVAL, tokens_D=tokens, loss_D=loss)
        self.state.push(self.attempt, window, 0, stats)

    @property
    def log(self) -> list[tuple[int, str]]:
        return [(entry.first_step, entry.mixer) for entry in self.state.log.entries]


def test_a_hold_outlives_the_windows_and_the_mixer_goes_on_learning() -> None:
    free, held = Run(TokensMixer(3)), Run(TokensMixer(3))
    free_seen = free.read(60)
    held.read(15)
    assert held.state.set_weights(OTHER, hold=True) == 15
    assert held.read(45) == [OTHER] * 30
    assert held.state.release() == 45
    # In the middle of a window: what the mixer decided for it.
    assert held.read(60) == free_seen[45:]
    assert held.log == [
        (0, "tokens"),
        (15, "asked"),
        (20, "asked"),
        (30, "asked"),
        (40, "asked"),
        (45, "tokens"),
        (50, "tokens"),
    ]
    mixers_own = {entry.first_step: entry.weights for entry in free.state.log.entries}
    for entry in held.state.log.entries[2:5]:
        assert entry.stats == {"mixer": mixers_own[entry.first_step]}


def test_a_request_without_hold_ends_with_the_window() -> None:
    free, run = Run(TokensMixer(3)), Run(TokensMixer(3))
    run.read(15)
    run.state.set_weights(OTHER)
    assert run.read(20) == [OTHER] * 5
    assert run.read(40) == free.read(40)[20:]


def test_a_hold_outlives_the_boundaries_of_a_schedule() -> None:
    pieces = [np.array(SHARES), np.array([0.2, 0.6, 0.2])]
    run = Run(Planned("schedule", pieces, boundaries=(0, 25)))
    run.state.set_weights(OTHER, 5, hold=True)
    run.state.release(40)
    seen = run.read(60)
    assert seen == [SHARES] * 5 + [OTHER] * 35 + [(0.2, 0.6, 0.2)] * 20


@pytest.mark.parametrize("hold_first", [True, False])
def test_a_request_without_hold_ends_a_hold(hold_first: bool) -> None:
    run, third = Run(TokensMixer(3)), (0.0, 1.0, 0.0)
    requests = [(OTHER, 12, True), (third, 25, False)]
    for shares, step, hold in requests if hold_first else reversed(requests):
        run.state.set_weights(shares, step, hold=hold)
    seen = run.read(40)
    assert seen[12:25] == [OTHER] * 13
    assert seen[25:30] == [third] * 5
    assert seen[30:] == Run(TokensMixer(3)).read(40)[30:]


def test_the_same_shares_again_with_a_hold_are_another_request() -> None:
    run = Run(TokensMixer(3))
    run.read(12)
    assert run.state.set_weights(OTHER) == 12
    run.read(14)
    assert run.state.set_weights(OTHER, hold=True) == 14
    run.read(16)
    assert run.state.set_weights(OTHER, hold=True) == 14  # a repeat changes nothing
    assert run.read(40) == [OTHER] * 24


def test_shares_requested_after_a_release_hold_again() -> None:
    run = Run()
    run.read(3)
    run.state.set_weights(OTHER)
    run.read(5)
    assert run.state.release() == 5
    assert run.state.set_weights(OTHER) == 5  # takes the place of the release
    assert run.read(8) == [OTHER] * 3
    run.state.release(9)
    assert run.read(12) == [OTHER, SHARES, SHARES, SHARES]
    with pytest.raises(RecipeError, match="the mixer's own already"):
        run.state.release()


@pytest.mark.parametrize("start", [0, 20, 30])
def test_a_resumed_run_repeats_holds_and_releases(tmp_path: Path, start: int) -> None:
    """After a kill: from a checkpoint before the hold, under it, and from none at all."""
    first = Run(TokensMixer(3), run_dir=str(tmp_path), session="first")
    snapshots: dict[int, Any] = {0: None}
    seen = first.read(20)
    snapshots[20] = json.loads(json.dumps(first.state.snapshot(20)))
    first.state.set_weights(OTHER, 22, hold=True)
    seen += first.read(30)
    snapshots[30] = json.loads(json.dumps(first.state.snapshot(30)))
    seen += first.read(45)
    first.state.release(47)
    first.state.set_weights((0.0, 0.0, 1.0), 55, hold=True)
    again = Run(
        TokensMixer(3),
        attempt="two",
        run_dir=str(tmp_path),
        session="second",
        snapshot=snapshots[start],
    )
    again.step = start
    assert again.read(45) == seen[start:]
    expected = Run(TokensMixer(3)).read(55)[47:] + [(0.0, 0.0, 1.0)] * 25
    assert first.read(80)[2:] == expected
    assert again.read(80)[2:] == expected
    assert again.log == first.log


def test_a_restarted_controller_keeps_a_hold(tmp_path: Path) -> None:
    Run(TokensMixer(3), run_dir=str(tmp_path), session="one").state.set_weights(OTHER, 5, hold=True)
    run = Run(TokensMixer(3), run_dir=str(tmp_path), session="one")
    assert run.read(40)[5:] == [OTHER] * 35


def test_state_without_holds_is_read(tmp_path: Path) -> None:
    """Files of versions that had none."""
    run = Run(run_dir=str(tmp_path), session="one")
    run.read(3)
    run.state.set_weights(OTHER, 6)
    snapshot = run.state.snapshot(3)
    assert snapshot is not None
    saved = json.loads((tmp_path / "controller.json").read_text())
    for state in (snapshot, saved):
        del state["holds"]
    del saved["applied"]
    (tmp_path / "controller.json").write_text(json.dumps(saved))
    for options in ({"session": "one"}, {"session": "two", "snapshot": snapshot}):
        again = Run(run_dir=str(tmp_path), **options)
        again.step = 3
        assert again.read(8) == [SHARES] * 3 + [OTHER] * 2


# -- requests in files -------------------------------------------------------------------------


def ask(directory: Path, first_step: int | None = None, *, hold: bool = False) -> SentRequest:
    return SentRequest(directory, ControlRequest(NAMED, first_step, hold))


def test_a_file_is_answered_at_the_next_lease(tmp_path: Path) -> None:
    run = Run(run_dir=str(tmp_path))
    run.read(4)
    sent = ask(tmp_path)
    assert sent.answer() is None
    assert run.read(6) == [OTHER, OTHER]
    assert sent.answer() == {"first_step": 4, "until": None}
    assert not sent.withdraw()
    assert list((tmp_path / "requests").iterdir()) == []


def test_a_window_answers_too(tmp_path: Path) -> None:
    run = Run(TokensMixer(3), run_dir=str(tmp_path))
    run.read(5)
    sent = ask(tmp_path)
    run.push(0)
    assert sent.answer() == {"first_step": 5, "until": 10}
    held, release = ask(tmp_path, 12, hold=True), SentRequest(tmp_path, ControlRequest(None, 33))
    run.read(6)
    assert held.answer() == {"first_step": 12, "until": None}
    assert release.answer() == {"first_step": 33, "until": None}
    assert run.read(40)[6:27] == [OTHER] * 21


def test_the_answer_names_the_next_change_of_a_schedule(tmp_path: Path) -> None:
    pieces = [np.array(SHARES), np.array(SHARES), np.array([0.2, 0.6, 0.2])]
    run = Run(Planned("schedule", pieces, boundaries=(0, 25, 37)), run_dir=str(tmp_path))
    sent = ask(tmp_path, 3), ask(tmp_path, 40)
    run.read(1)
    assert [one.answer() for one in sent] == [
        {"first_step": 3, "until": 37},
        {"first_step": 40, "until": None},
    ]


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (ControlRequest({"a": 0.5, "boks": 0.5}), "the corpus has no such domain"),
        (ControlRequest({"a": 0.5, "b": 0.4}), "the weights sum to 0.9"),
        (ControlRequest(NAMED, 2), "the first free step is 4"),
        (ControlRequest(NAMED, 1000), "the run ends with step 999"),
        (ControlRequest(None), "the mixer's own already"),
    ],
)
def test_a_bad_file_is_answered_with_its_problems(
    tmp_path: Path, request_: ControlRequest, problem: str
) -> None:
    run = Run(run_dir=str(tmp_path))
    run.read(4)
    sent = SentRequest(tmp_path, request_)
    assert run.read(8) == [SHARES] * 4
    answer = sent.answer()
    assert answer is not None
    assert problem in answer["problems"][0]
    assert run.log == [(0, "Planned")]


def test_torn_and_foreign_files_do_no_harm(tmp_path: Path) -> None:
    run = Run(run_dir=str(tmp_path))
    run.read(4)
    folder = tmp_path / "requests"
    folder.mkdir()
    (folder / "1.json").write_text('{"weights": {"a"')
    (folder / "2.json").write_text("[1]")
    (folder / "3.json").write_text('{"weights": {"a": true}, "first_step": null, "hold": false}')
    (folder / "5.json").write_text(
        json.dumps({"weights": {"a": 10**400}, "first_step": None, "hold": False})
    )
    (folder / "6.json").write_text('{"weights": {"a": NaN}, "first_step": null, "hold": false}')
    (folder / "notes.txt").write_text("mine")
    (folder / "4.json").mkdir()
    assert run.read(8) == [SHARES] * 4
    assert not (folder / "1.json").exists()
    for name in ("2", "3", "5"):
        assert "not a request" in (folder / f"{name}.answer").read_text()
    assert "weights.a = nan" in (folder / "6.answer").read_text()


def test_a_withdrawn_request_is_never_applied(tmp_path: Path) -> None:
    run = Run(run_dir=str(tmp_path))
    run.read(4)
    assert ask(tmp_path).withdraw()
    assert run.read(8) == [SHARES] * 4


@pytest.mark.parametrize("session", ["one", "two"])
def test_a_request_without_its_answer_is_not_applied_again(tmp_path: Path, session: str) -> None:
    """Killed between the write of the state and that of the answer."""
    run = Run(run_dir=str(tmp_path), session="one")
    run.read(4)
    snapshot = run.state.snapshot(4)
    sent = ask(tmp_path)
    folder = tmp_path / "requests"
    name = next(folder.iterdir()).name
    request = (folder / name).read_bytes()
    run.read(6)
    assert sent.answer() == {"first_step": 4, "until": None}
    (folder / name).with_suffix(".taken").write_bytes(request)
    again = Run(run_dir=str(tmp_path), session=session, snapshot=snapshot)
    again.step = 4
    assert again.read(9) == [OTHER] * 5
    assert sent.answer() == {"first_step": 4, "until": None}
    assert os.listdir(folder) == []


def test_a_claimed_request_is_applied_after_a_kill(tmp_path: Path) -> None:
    """Killed before the write of the state."""
    Run(run_dir=str(tmp_path), session="one").read(4)
    sent = ask(tmp_path)
    path = next((tmp_path / "requests").iterdir())
    path.rename(path.with_suffix(".taken"))
    again = Run(run_dir=str(tmp_path), session="one")
    again.step = 4
    assert again.read(7) == [OTHER] * 3
    assert sent.answer() == {"first_step": 4, "until": None}


def test_nothing_is_decided_before_all_ranks_have_reported(tmp_path: Path) -> None:
    state = build_mixture_state(fixed(SHARES), CONTEXT, run_dir=str(tmp_path))
    state.register("one", 2)
    sent = ask(tmp_path)
    state.lease("one", 0, step=0, leased_until=0, n_steps=3, version=-1)
    assert sent.answer() is None
    state.lease("one", 1, step=0, leased_until=0, n_steps=1, version=-1)
    assert sent.answer() == {"first_step": 3, "until": None}


def test_replicas_refuse_files(tmp_path: Path) -> None:
    state = build_mixture_state(fixed(SHARES), CONTEXT, run_dir=str(tmp_path))
    controller = LocalController(state, world_size=2, gather=lambda value: [value, value])
    sent = ask(tmp_path)
    controller.request_lease(step=0, leased_until=0, n_steps=1, version=-1)
    controller.wait_lease()
    answer = sent.answer()
    assert answer is not None
    assert "loader.set_weights(...) on all ranks" in answer["problems"][0]
