"""What one update of the mixture costs the controller (`make bench-controller`).

512 simulated workers push gradient norms, noise, losses and tokens of 1,000 domains for a window;
the last push makes the new weights under PiKE. First straight into `MixtureState`, in this process,
with the size of its state as JSON; then through the real actor, all pushes from one client. There
the update is what lies between the last push and a lease under the new weights; a push by itself is
mostly Ray's, and in a run they come spread over a window. `--state` leaves Ray out. The target is
an update in under 100 ms and a state under 1 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from raymix.mixers import DomainStats, MixerContext, build_mixer
from raymix.recipe import MixerConfig
from raymix.streaming.controller.state import MixtureState
from tests.benchmarks._report import print_table, row, write_results

WORKERS = 512
DOMAINS = 1_000
INTERVAL = 50
WINDOWS = 12
TARGET_MS = 100.0
TARGET_MB = 1.0


def context() -> MixerContext:
    names = tuple(f"cluster-{at:04d}" for at in range(DOMAINS))
    tokens_D = np.random.default_rng(0).integers(10**6, 10**9, DOMAINS)
    steps = INTERVAL * (WINDOWS + 2)
    return MixerContext(names, tokens_D, 10**12, steps, rows_per_step=4 * WORKERS)


def mixer_config() -> Any:
    config: TypeAdapter[Any] = TypeAdapter(MixerConfig)
    return config.validate_python({"kind": "pike", "tau": 1.0})


def pushes(window: int) -> list[DomainStats]:
    """Return what each rank pushes: tokens and loss of what it read, gradients of one pass."""
    rng = np.random.default_rng(window)
    stats = []
    for _ in range(WORKERS):
        tokens_D = rng.integers(0, 2, DOMAINS) * 2048
        loss_D = np.where(tokens_D > 0, rng.normal(4, 0.5, DOMAINS), np.nan)
        stats.append(
            DomainStats(
                step=window * INTERVAL,
                window=INTERVAL,
                tokens_D=tokens_D,
                loss_D=loss_D,
                grad_norm2_D=rng.normal(1, 0.3, DOMAINS),
                grad_noise_D=rng.gamma(2, 20, DOMAINS),
            )
        )
    return stats


def state_rows() -> list[dict[str, Any]]:
    """Return the cost of an update in the state itself, and the size of the state."""
    state = MixtureState(
        build_mixer(mixer_config(), context()), context(), kind="pike", interval=INTERVAL
    )
    state.register("bench", WORKERS)
    whole, last = [], []
    for window in range(WINDOWS):
        made = pushes(window)
        begun = time.perf_counter()
        for rank, stats in enumerate(made[:-1]):
            state.push("bench", window, rank, stats)
        before_last = time.perf_counter()
        complete = state.push("bench", window, WORKERS - 1, made[-1])
        ended = time.perf_counter()
        if not complete:
            raise RuntimeError(f"window {window} is not complete")
        whole.append(ended - begun)
        last.append(ended - before_last)
        # As in a run: what is read stands in the log, and older weights are forgotten.
        step = window * INTERVAL
        state.lease("bench", 0, step=step, leased_until=step, n_steps=2 * INTERVAL, version=-1)
    snapshot = state.snapshot() or {}
    log = len(json.dumps(snapshot.pop("log")))
    state_bytes = len(json.dumps(snapshot))
    return [
        against("state, all pushes and the update", whole),
        against("state, last push with the update", last),
        row(
            "state as JSON",
            state_bytes / 1e6,
            "MB",
            ratio=state_bytes / 1e6 / TARGET_MB,
            baseline="target",
        ),
        row("mixture log per entry", log / 1e3 / len(state.log.entries), "KB"),
    ]


def actor_rows() -> list[dict[str, Any]]:
    """Return the cost of the same through the actor: of the update, and of a push."""
    import ray

    from raymix.streaming.controller.client import start_controller

    ray.init(
        num_cpus=2,
        object_store_memory=200_000_000,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        actor: Any = start_controller(
            recipe_mixer=mixer_config(), context=context(), probe_interval=INTERVAL
        )
        ray.get(actor.register.remote("bench", WORKERS))
        whole, last, version = [], [], -1
        for window in range(WINDOWS):
            made = [ray.put(stats) for stats in pushes(window)]
            until = (window + 2) * INTERVAL
            begun = time.perf_counter()
            ray.get([actor.push.remote("bench", window, r, s) for r, s in enumerate(made[:-1])])
            before_last = time.perf_counter()
            actor.push.remote("bench", window, WORKERS - 1, made[-1])
            lease = ray.get(
                actor.lease.remote(
                    "bench", 0, step=until, leased_until=until, n_steps=INTERVAL, version=version
                )
            )
            ended = time.perf_counter()
            version = lease.entries[-1].version
            whole.append(ended - begun)
            last.append(ended - before_last)
    finally:
        ray.shutdown()
    each = statistics.median(whole[1:]) * 1e3 / WORKERS
    return [
        against("actor, last push to the lease it makes known", last),
        row("actor, per push, all from one client", each, "ms"),
    ]


def against(name: str, seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median as a row against the target; the first update warms up."""
    ms = [1e3 * spent for spent in seconds[1:]]
    spread = (min(ms) / TARGET_MS, max(ms) / TARGET_MS)
    middle = statistics.median(ms)
    return row(name, middle, "ms", ratio=middle / TARGET_MS, spread=spread, baseline="target")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", action="store_true", help="leave the actor out: no Ray")
    without_ray = parser.parse_args().state
    rows = [row("target", TARGET_MS, "ms"), *state_rows()]
    if not without_ray:
        rows += actor_rows()
    print_table(rows)
    write_results("controller", rows)


if __name__ == "__main__":
    main()
