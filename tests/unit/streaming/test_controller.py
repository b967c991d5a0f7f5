"""The controller without Ray: leases, windows, requests, and restarts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.errors import RecipeError, TrainingError
from raymix.mixers import DomainStats, Mixer, MixerContext, Planned
from raymix.sampling import MixtureLog
from raymix.streaming.controller.actor import MixtureController
from raymix.streaming.controller.leases import Lease
from tests.support.streams import TokensMixer, fixed

DOMAINS = ("a", "b", "c")
CONTEXT = MixerContext(DOMAINS, np.array([100, 200, 300]), total_tokens=10**6, total_steps=1000)
SHARES = [0.5, 0.3, 0.2]
OTHER = [0.1, 0.1, 0.8]


def make(mixer: Mixer | None = None, **options: Any) -> MixtureController:
    options = {"probe_interval": 10} | options
    return MixtureController(recipe_mixer=mixer or fixed(SHARES), context=CONTEXT, **options)


class Rank:
    """One rank's side of the protocol."""

    def __init__(self, controller: MixtureController, rank: int = 0, step: int = 0) -> None:
        self.controller = controller
        self.rank = rank
        self.step = self.until = step
        self.version = -1
        self.log = MixtureLog(DOMAINS)
        self.incarnation: str | None = None

    async def register(self, attempt: str = "one", world_size: int = 1) -> Rank:
        self.incarnation, _ = await self.controller.register(attempt, world_size)
        return self

    async def lease(self, n_steps: int = 1, attempt: str = "one") -> Lease:
        lease = await self.controller.lease(
            attempt,
            self.rank,
            step=self.step,
            leased_until=self.until,
            n_steps=n_steps,
            version=self.log.entries[-1].version if self.log.entries else -1,
            incarnation=self.incarnation,
        )
        for entry in lease.entries:
            self.log.append(entry)
        self.until, self.incarnation = lease.until, lease.incarnation
        return lease

    async def walk(self, steps: int) -> list[tuple[float, ...]]:
        """Read some steps, one lease each, and return the weights they had."""
        seen = []
        for _ in range(steps):
            while self.until <= self.step:
                await self.lease()
            seen.append(self.log.at(self.step).weights)
            self.step += 1
        return seen


def stats(window: int, tokens: list[int], interval: int = 10) -> DomainStats:
    return DomainStats(
        step=window * interval,
        window=interval,
        tokens_D=np.array(tokens, dtype=np.int64),
        loss_D=np.array([1.0, 2.0, np.nan]),
    )


def test_a_lease_brings_the_weights_of_all_its_steps() -> None:
    async def main() -> None:
        mixer = Planned("schedule", [np.array(SHARES), np.array(OTHER)], boundaries=(0, 7))
        rank = await Rank(make(mixer)).register()
        lease = await rank.lease(n_steps=7)
        assert (lease.until, [e.first_step for e in lease.entries]) == (7, [0])
        lease = await rank.lease(n_steps=8)
        assert (lease.until, [e.first_step for e in lease.entries]) == (8, [7])
        assert lease.entries[0].weights == tuple(OTHER)
        assert (await rank.lease(n_steps=100)).entries == ()

    asyncio.run(main())


def test_a_linear_schedule_moves_once_a_window() -> None:
    async def main() -> None:
        pieces = [np.array(SHARES), np.array(OTHER)]
        mixer = Planned("schedule", pieces, boundaries=(0, 35), linear=True)
        rank = await Rank(make(mixer)).register()
        lease = await rank.lease(n_steps=100)
        assert [e.first_step for e in lease.entries] == [0, 10, 20, 30, 35]

    asyncio.run(main())


def test_an_ask_holds_from_the_first_step_that_nobody_may_read() -> None:
    async def main() -> None:
        controller = make()
        fast = await Rank(controller, 0).register(world_size=2)
        slow = await Rank(controller, 1).register(world_size=2)
        await asyncio.gather(fast.lease(n_steps=12), slow.lease(n_steps=3))
        first = await controller.set_weights({"c": 0.8, "a": 0.1, "b": 0.1})
        assert first == 12
        # Again, as Ray would repeat it after a restart: nothing new.
        assert await controller.set_weights(OTHER) == 12
        seen = await fast.walk(20), await slow.walk(20)
        assert seen[0] == seen[1] == [tuple(SHARES)] * 12 + [tuple(OTHER)] * 8
        assert [e.mixer for e in fast.log.entries] == ["Planned", "asked"]

    asyncio.run(main())


def test_slow_readers_see_an_ask_two_steps_later() -> None:
    async def main() -> None:
        controller = make()
        rank = await Rank(controller).register()
        await rank.walk(30)
        await rank.lease()  # while step 29 is worked on, the lease of step 30 is had
        assert await controller.set_weights(OTHER) == 31
        assert await rank.walk(2) == [tuple(SHARES), tuple(OTHER)]

    asyncio.run(main())


def test_an_ask_for_a_later_step_waits_for_it_and_may_be_changed() -> None:
    async def main() -> None:
        controller = make()
        rank = await Rank(controller).register()
        await rank.lease()
        assert await controller.set_weights(OTHER, 20) == 20
        assert await controller.set_weights([0, 0, 1], 25) == 25
        assert await controller.set_weights([0, 1, 0], 25) == 25
        seen = await rank.walk(30)
        assert seen == [tuple(SHARES)] * 20 + [tuple(OTHER)] * 5 + [(0.0, 1.0, 0.0)] * 5
        with pytest.raises(RecipeError, match="the first free step is 30"):
            await controller.set_weights(SHARES, 29)

    asyncio.run(main())


def test_bad_asks_are_explained() -> None:
    async def main() -> None:
        controller = make()
        with pytest.raises(RecipeError, match=r"weights\.bb = 1\.0: .*Did you mean 'b'"):
            await controller.set_weights({"bb": 1.0})
        with pytest.raises(RecipeError, match=r"sum to 0\.9"):
            await controller.set_weights([0.3, 0.3, 0.3])
        with pytest.raises(RecipeError, match="not one weight per domain; there are 3"):
            await controller.set_weights([0.5, 0.5])
        with pytest.raises(RecipeError, match="not a number >= 0"):
            await controller.set_weights([1.5, -0.5, 0])

    asyncio.run(main())


def test_a_mixer_that_changes_nothing_does_not_undo_an_ask() -> None:
    async def main() -> None:
        mixer = Planned("schedule", [np.array(SHARES), np.array([0, 0, 1.0])], boundaries=(0, 40))
        rank = await Rank(controller := make(mixer)).register()
        await rank.walk(5)
        assert await controller.set_weights(OTHER, 10) == 10  # at a window's edge, too
        seen = await rank.walk(45)
        assert seen == [tuple(SHARES)] * 5 + [tuple(OTHER)] * 30 + [(0.0, 0.0, 1.0)] * 10

    asyncio.run(main())


def test_an_ask_wins_at_the_step_where_the_mixer_changes_too() -> None:
    async def main() -> None:
        mixer = Planned("schedule", [np.array(SHARES), np.array([0, 0, 1.0])], boundaries=(0, 20))
        rank = await Rank(controller := make(mixer)).register()
        await rank.lease()
        await controller.set_weights(OTHER, 20)
        assert (await rank.walk(60))[20:] == [tuple(OTHER)] * 40

    asyncio.run(main())


# -- windows ---------------------------------------------------------------------------------


def adaptive_weights(pushes: list[list[int]]) -> list[tuple[float, ...]]:
    """Return the weights of each window as the protocol defines them."""
    mixer = TokensMixer(3)
    weights = [tuple(mixer.initial.tolist())] * 2
    for window, tokens in enumerate(pushes):
        weights.append(tuple(mixer.update(stats(window, tokens)).tolist()))
    return weights


def test_weights_of_a_window_wait_for_all_ranks_of_the_last_but_one() -> None:
    async def main() -> None:
        controller = make(TokensMixer(3))
        ranks = [await Rank(controller, r).register(world_size=2) for r in range(2)]
        assert (await ranks[0].lease(n_steps=100)).until == 20
        ranks[0].step = 15
        waiting = asyncio.ensure_future(ranks[0].lease(n_steps=100))
        await asyncio.sleep(0)
        await controller.push("one", 0, 0, stats(0, [1, 2, 3]))
        await asyncio.sleep(0)
        assert not waiting.done()
        await controller.push("one", 0, 1, stats(0, [10, 20, 30]))
        lease = await waiting
        assert lease.until == 30
        assert lease.entries[-1].first_step == 20
        assert lease.entries[-1].weights == adaptive_weights([[11, 22, 33]])[2]
        assert lease.entries[-1].stats == {
            "window": 0,
            "tokens": [11, 22, 33],
            "loss": [1.0, 2.0, None],
        }

    asyncio.run(main())


@settings(max_examples=60)
@given(data=st.data())
def test_the_weights_do_not_depend_on_order_repeats_or_stragglers(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 3))
    pushes = [(w, r) for w in range(4) for r in range(world_size)]
    order = data.draw(st.permutations(pushes * 2))

    async def main() -> list[tuple[float, ...]]:
        controller = make(TokensMixer(3))
        await Rank(controller).register("old", 1)
        await controller.push("old", 0, 0, stats(0, [9, 9, 9]))  # complete in its time
        controller = make(TokensMixer(3))
        await Rank(controller).register("old", world_size + 1)
        await controller.push("old", 0, 0, stats(0, [9, 9, 9]))  # never completed
        rank = await Rank(controller).register("one", world_size)
        for window, r in order:
            await controller.push("old", window, r, stats(window, [7, 7, 7]))
            await controller.push("one", window, r, stats(window, [window, r, 5]))
        rank.rank = world_size - 1
        await rank.lease(n_steps=60)
        return [rank.log.at(10 * window).weights for window in range(6)]

    summed = [[w * world_size, sum(range(world_size)), 5 * world_size] for w in range(4)]
    assert asyncio.run(main()) == adaptive_weights(summed)


def test_a_snapshot_waits_for_the_windows_before_its_step() -> None:
    async def main() -> None:
        controller = make(TokensMixer(3))
        await Rank(controller).register()
        await controller.push("one", 0, 0, stats(0, [1, 2, 3]))
        early = await asyncio.wait_for(controller.snapshot(15), 1)
        waiting = asyncio.ensure_future(controller.snapshot(20))
        await asyncio.sleep(0)
        assert not waiting.done()
        await controller.push("one", 1, 0, stats(1, [4, 5, 6]))
        late = await waiting
        weights = adaptive_weights([[1, 2, 3], [4, 5, 6]])
        for snapshot, known in ((early, 3), (late, 4)):
            again = make(TokensMixer(3), snapshot=json.loads(json.dumps(snapshot)))
            rank = await Rank(again).register("two")
            assert (await rank.lease(n_steps=100, attempt="two")).until == known * 10
            assert [rank.log.at(10 * w).weights for w in range(known)] == weights[:known]

    asyncio.run(main())


# -- attempts, restarts, resumes ---------------------------------------------------------------


def test_an_attempt_that_is_over_is_turned_away() -> None:
    async def main() -> None:
        controller = make(TokensMixer(3))
        old = await Rank(controller).register("one", 1)
        await old.lease(n_steps=20)
        waiting = asyncio.ensure_future(old.lease(n_steps=30))
        await asyncio.sleep(0)
        new = await Rank(controller).register("two", 1)
        with pytest.raises(TrainingError, match="not the one being served"):
            await waiting
        with pytest.raises(TrainingError, match="not the one being served"):
            await old.register("one", 1)
        assert (await new.lease(n_steps=5, attempt="two")).until == 5

    asyncio.run(main())


def restarted(tmp_path: Path, mixer: Mixer | None = None) -> MixtureController:
    return make(mixer, run_dir=str(tmp_path), session="s")


def test_a_restarted_controller_waits_for_the_ranks_before_it_takes_an_ask(tmp_path: Path) -> None:
    async def main() -> None:
        controller = restarted(tmp_path)
        ranks = [await Rank(controller, r).register(world_size=2) for r in range(2)]
        await ranks[0].lease(n_steps=5)
        await ranks[1].lease(n_steps=50)
        await controller.set_weights(OTHER, 70)

        controller = restarted(tmp_path)
        for rank in ranks:
            rank.controller = controller
        pending = asyncio.ensure_future(controller.set_weights([0, 1, 0]))
        lease = await ranks[0].lease(n_steps=10)
        assert lease.until == 5  # the first answer of a new incarnation grants nothing
        await asyncio.sleep(0)
        assert not pending.done()
        await ranks[1].lease(n_steps=50)
        assert await pending == 50
        seen = await ranks[0].walk(80), await ranks[1].walk(80)
        expected = [tuple(SHARES)] * 50 + [(0.0, 1.0, 0.0)] * 20 + [tuple(OTHER)] * 10
        assert seen[0] == seen[1] == expected

    asyncio.run(main())


def test_a_restarted_controller_gets_lost_windows_again(tmp_path: Path) -> None:
    async def main() -> None:
        controller = restarted(tmp_path, TokensMixer(3))
        ranks = [await Rank(controller, r).register(world_size=2) for r in range(2)]
        for window in range(2):
            for r in range(2):
                await controller.push("one", window, r, stats(window, [window, r, 5]))
        await ranks[0].lease(n_steps=40)
        await controller.push("one", 2, 0, stats(2, [2, 0, 5]))  # in memory only

        controller = restarted(tmp_path, TokensMixer(3))
        for r, rank in enumerate(ranks):
            rank.controller = controller
            await rank.lease()
            for window in range(3):  # what the ranks push again
                await controller.push("one", window, r, stats(window, [window, r, 5]))
        assert (await ranks[1].lease(n_steps=100)).until == 50
        weights = adaptive_weights([[0, 1, 10], [2, 1, 10], [4, 1, 10]])
        assert [ranks[1].log.at(10 * w).weights for w in range(5)] == weights

    asyncio.run(main())


def test_without_a_run_directory_a_restart_is_noticed() -> None:
    async def main() -> None:
        rank = await Rank(make()).register()
        await rank.walk(5)
        rank.controller = make()
        await rank.controller.register("one", 1)
        with pytest.raises(TrainingError, match="needs a run directory"):
            await rank.walk(1)

    asyncio.run(main())


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    async def main() -> None:
        rank = await Rank(restarted(tmp_path)).register()
        await rank.walk(3)
        log = tmp_path / "mixture_log.jsonl"
        whole = log.read_text()
        log.write_text(whole + '{"version": 1, "first_st')
        rank.controller = restarted(tmp_path)
        await rank.walk(3)
        assert log.read_text() == whole

    asyncio.run(main())


def test_a_run_started_again_keeps_the_asks_still_to_come(tmp_path: Path) -> None:
    async def main() -> None:
        controller = make(run_dir=str(tmp_path), session="first")
        rank = await Rank(controller).register()
        await rank.walk(10)
        snapshot = await controller.snapshot(10)
        first = await controller.set_weights(OTHER)
        await rank.walk(10)  # so the ask is in the log
        await controller.set_weights([0, 0, 1], 40)  # and this one is not
        before = await rank.walk(30)

        for resumed, start in ((snapshot, 10), (None, 0)):
            controller = make(run_dir=str(tmp_path), session=f"again{start}", snapshot=resumed)
            rank = await Rank(controller, step=start).register(f"again{start}")
            rank.log = MixtureLog(DOMAINS)
            while rank.until <= 50:
                await rank.lease(n_steps=60, attempt=f"again{start}")
            seen = [rank.log.at(step).weights for step in range(50)]
            assert seen[:first] == [tuple(SHARES)] * first
            assert seen[first:20] == [tuple(OTHER)] * (20 - first)
            assert seen[20:] == before
        lines = (tmp_path / "mixture_log.jsonl").read_text().splitlines()
        assert MixtureLog.from_lines(lines).entries == rank.log.entries

    asyncio.run(main())


def test_a_snapshot_of_ten_thousand_domains_is_small() -> None:
    count = 10_000
    names = tuple(f"cluster-{d:05d}" for d in range(count))
    context = MixerContext(names, np.full(count, 10**6), total_tokens=10**9, total_steps=1000)
    shares = np.random.default_rng(0).dirichlet([0.5] * count)

    async def main() -> dict[str, Any]:
        controller = MixtureController(recipe_mixer=Planned("x", [shares]), context=context)
        await controller.register("one", 1)
        await controller.lease("one", 0, step=0, leased_until=0, n_steps=500, version=-1)
        return await controller.snapshot(500)

    snapshot = asyncio.run(main())
    del snapshot["log"]
    assert len(json.dumps(snapshot)) < 200_000


def test_status_says_where_things_stand() -> None:
    async def main() -> None:
        controller = make()
        await (await Rank(controller).register()).walk(4)
        status = await controller.status()
        assert status["version"] == 0
        assert status["weights"] == dict(zip(DOMAINS, SHARES, strict=True))
        assert json.loads(json.dumps(status))["leased_until"] == {"0": 4}
        assert await controller.log_lines() == controller.state.log.to_lines()

    asyncio.run(main())
