"""The training loop of one rank; the same with Ray and without.

A step: take the stream's rows, pass them through the model micro-batch by micro-batch, divide by
the label count of the global batch, clip, update. On a GPU the numbers of a step are read while
the next one runs, so that the host never waits for them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raymix._utils.json import jsonable, rounded
from raymix.errors import TrainingError
from raymix.mixers import DomainStats
from raymix.recipe import Recipe
from raymix.streaming.batches.step_batch import DocumentBatch, StepBatch
from raymix.streaming.batches.stream import MixtureStream
from raymix.training.evaluate.held_out import Evaluator, Table
from raymix.training.host.device import seed_everything
from raymix.training.model.optim import clip_gradients, learning_rate, set_learning_rate
from raymix.training.model.parallel import HostCopy, Replica, training_precision
from raymix.training.run.checkpoint import TrainingState, save_checkpoint
from raymix.training.run.recorder import Recorder
from raymix.training.step.batches import count_micro_batches, micro_batches, token_factors
from raymix.training.step.documents import ContextParallel, Pass, document_passes
from raymix.training.step.metrics import PendingStep, StepMetrics, StepSums
from raymix.training.step.probing import Prober


@dataclass(kw_only=True)
class TrainerComponents:
    """Everything a rank's loop works with."""

    recipe: Recipe
    steps: int
    """Optimizer steps of the whole run."""
    domains: tuple[str, ...]
    replica: Replica
    optimizer: torch.optim.Optimizer
    stream: MixtureStream
    evaluator: Evaluator
    recorder: Recorder | None
    """On the writing rank only."""
    checkpoints: Path
    tokenizer_path: str
    corpus_fingerprint: str
    recipe_hash: str
    micro_batch_rows: int
    most_rows: int | None
    """Rows of the rank with most; None where all have as many."""
    resumed: TrainingState | None
    bf16: bool
    flops_per_token: float
    peak_flops: float | None
    """Of one device; None where it is not known."""
    snapshot: Callable[[int], dict[str, Any] | None]
    """Returns the controller's snapshot for a run that goes on at a step."""
    on_checkpoint: Callable[[Path, int], None]
    """Called on every rank after a checkpoint."""
    stop_asked: Callable[[], bool]
    """Whether somebody asked for a clean stop; read on rank 0 only."""
    push: Callable[[int, DomainStats], None] | None = None
    """Hands a window's statistics to an adaptive mixer."""
    prober: Prober | None = None
    """Measures gradients for a mixer that needs them."""
    context_parallel: ContextParallel = field(default_factory=ContextParallel)
    """How documents are attended to."""


@dataclass(slots=True)
class _Flying:
    """A step whose numbers have not been read yet."""

    batch: StepBatch | DocumentBatch
    lr: float
    wait_s: float
    pending: PendingStep
    norm: HostCopy


@dataclass(slots=True)
class _Window:
    """What the domains' losses add up to since the window began, and what held-out ones are."""

    nats_D: npt.NDArray[np.float64]
    labels_D: npt.NDArray[np.float64]
    valid_D: npt.NDArray[np.float64]
    """The newest held-out loss, NaN where there is none."""


@dataclass(slots=True)
class LoopEnd:
    """How a loop ended."""

    step: int
    """Steps done."""
    stopped: bool
    """Somebody asked for it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where this rank's time went."""


class TrainingLoop:
    """Trains from the resumed step, or 0, to the last."""

    def __init__(self, parts: TrainerComponents) -> None:
        """Take over `parts`."""
        self._parts = parts
        self._world = parts.replica.world
        state = parts.resumed
        self._step = state.step if state else 0
        zeros = np.zeros(len(parts.domains))
        tokens = state.tokens if state else {}
        self._tokens_D = np.array([tokens.get(name, 0) for name in parts.domains], np.int64)
        self._window = _Window(zeros.copy(), zeros.copy(), np.full(zeros.shape, np.nan))
        if state and state.window:
            kept = (state.window[key] for key in ("nats", "labels", "valid"))
            self._window = _Window(*(np.array(values, dtype=np.float64) for values in kept))
        self._flying: _Flying | None = None
        # On a CPU nothing runs ahead, so waiting a step would gain nothing.
        self._lag = self._world.device.type == "cuda"
        self._wants = StepSums(0.0, False, False, zeros, zeros)
        self._checkpointed = time.monotonic()
        self._clock = time.perf_counter()
        self._shares: tuple[int, dict[str, float]] = (-1, {})
        self.seconds = {"data": 0.0, "step": 0.0, "metrics": 0.0, "probe": 0.0}
        self.seconds |= {"eval": 0.0, "checkpoint": 0.0}

    def run(self) -> LoopEnd:
        """Return how it ended; all ranks end at the same step.

        Raises:
            TrainingError: If the loss is no longer a number.
            RaymixError: Whatever stream, controller or disk raise.
        """
        parts = self._parts
        if self._step == 0:
            self._evaluate()
        self._clock = time.perf_counter()
        stopped = False
        while self._step < parts.steps and not stopped:
            self._one_step()
            done, last = self._step, self._step == parts.steps
            if last or _due(done, parts.recipe.eval.every):
                self._evaluate()
            stopped = self._wants.stop and not last
            if last or stopped or self._checkpoint_due(done):
                self._checkpoint()
        return LoopEnd(self._step, stopped, self.seconds)

    def _one_step(self) -> None:
        parts = self._parts
        start = time.perf_counter()
        batch = parts.stream.next()
        got = time.perf_counter()
        flying = self._launch(batch)
        launched = time.perf_counter()
        if self._lag:
            self._settle()
            self._flying = flying
        else:
            self._flying = flying
            self._settle()
        self._step += 1
        self._push_window()
        self.seconds["data"] += got - start
        self.seconds["step"] += launched - got
        self.seconds["metrics"] += time.perf_counter() - launched

    def _launch(self, batch: StepBatch | DocumentBatch) -> _Flying:
        parts, replica = self._parts, self._parts.replica
        rate = learning_rate(batch.step, steps=parts.steps, config=parts.recipe.train)
        set_learning_rate(parts.optimizer, rate)
        seed_everything(parts.recipe.seed, batch.step, self._world.rank, self._world.device)
        account = StepMetrics(len(parts.domains), self._world)
        count, passes = self._passes(batch)
        factor_D = parts.stream.loss_weights(batch.step)
        scale = replica.gradient_scale / max(1, batch.label_tokens)
        for index, one in enumerate(passes):
            micro = one.micro
            with replica.accumulating(last=index == count - 1), one.attending():
                tensors = [micro.tokens_BL, micro.positions_BL, micro.labels_BL]
                if factor_D is not None:
                    tensors.append(token_factors(micro, one.domains, factor_D))
                with self._precision():
                    loss, loss_BL = replica.module(*tensors)
                (loss * scale).backward()
            account.add(micro, one.domains, loss_BL)
        pending = account.start(checkpoint=self._time_for_checkpoint(), stop=self._stop_asked())
        norm = clip_gradients(replica.model.parameters(), parts.recipe.train.clip_norm)
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        return _Flying(batch, rate, parts.stream.waited_s, pending, HostCopy(norm))

    def _passes(self, batch: StepBatch | DocumentBatch) -> tuple[int, Iterator[Pass]]:
        """Return how many passes a step takes, the same on all ranks, and the passes."""
        parts, device = self._parts, self._world.device
        if isinstance(batch, DocumentBatch):
            found = document_passes(batch, parts.context_parallel, device)
            return len(batch.micro_batches), found
        most = parts.most_rows or len(batch.tokens)
        count = count_micro_batches(most, parts.micro_batch_rows)
        domains = batch.domain_rows
        return count, (Pass(micro, domains) for micro in micro_batches(batch, count, device))

    def _settle(self) -> None:
        """Read and record the numbers of the step in flight, if there is one."""
        flying, self._flying = self._flying, None
        if flying is None:
            return
        sums = flying.pending.result()
        batch = flying.batch
        loss = sums.loss / max(1, batch.label_tokens)
        if not math.isfinite(loss):
            where = _whose(sums.nats_D, self._parts.domains)
            raise self._blown_up(f"the loss{where} is {loss} at step {batch.step + 1}")
        self._wants = sums
        self._tokens_D += batch.tokens_D
        if self._parts.push is not None:
            self._window.nats_D += sums.nats_D
            self._window.labels_D += sums.labels_D
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if self._parts.recorder is not None:
            self._parts.recorder.step(self._line(flying, sums, loss, seconds))
            if isinstance(batch, DocumentBatch) and batch.lengths is not None:
                self._parts.recorder.lengths(batch.step + 1, batch.lengths)

    def _blown_up(self, wrong: str) -> TrainingError:
        return TrainingError.at(
            "train.lr",
            self._parts.recipe.train.lr,
            wrong,
            fix="Lower train.lr, warm up longer, or clip harder",
        )

    def _line(
        self, flying: _Flying, sums: StepSums, loss: float, seconds: float
    ) -> Mapping[str, Any]:
        parts, batch = self._parts, flying.batch
        names, tokens_D = parts.domains, batch.tokens_D
        tokens = int(tokens_D.sum())
        if self._shares[0] != batch.version:
            self._shares = batch.version, dict(zip(names, batch.shares.tolist(), strict=True))
        read = np.flatnonzero(tokens_D).tolist()
        scored = np.flatnonzero(sums.labels_D).tolist()
        line = {
            "step": batch.step + 1,
            "loss": loss,
            "lr": flying.lr,
            "tokens": int(self._tokens_D.sum()),
            "tokens_per_s": rounded(tokens / seconds),
            "data_wait": rounded(min(1.0, flying.wait_s / seconds), 3),
            "mixture_version": batch.version,
            "shares": self._shares[1],
            "batch_hash": batch.batch_hash,
            "seconds": rounded(seconds),
            "grad_norm": rounded(float(flying.norm.get())),
            "counts": {names[d]: int(tokens_D[d]) for d in read},
            "domain_loss": {names[d]: rounded(sums.nats_D[d] / sums.labels_D[d]) for d in scored},
        }
        if (note := parts.stream.note(batch.step)) is not None:
            line["note"] = note
        if parts.peak_flops:
            work = parts.flops_per_token * tokens / seconds
            line["mfu"] = rounded(work / (self._world.size * parts.peak_flops), 4)
        return line

    def _push_window(self) -> None:
        """Hand over the window's losses at its end; rank 0 speaks for all, the others' are empty.

        They are sums over ranks already, so a run that goes on in mid-window, on any number of
        ranks, can take them from its checkpoint.
        """
        parts, interval = self._parts, self._parts.recipe.train.probe_interval
        if parts.push is None or self._step % interval:
            return
        self._settle()
        window = self._window
        zeros = np.zeros(len(parts.domains))
        self._window = _Window(zeros.copy(), zeros.copy(), window.valid_D)
        labels_D = window.labels_D if self._world.is_writer else np.zeros_like(window.labels_D)
        loss_D = np.full(labels_D.shape, np.nan)
        np.divide(window.nats_D, labels_D, out=loss_D, where=labels_D > 0)
        first = self._step - interval
        parts.push(
            first // interval,
            DomainStats(
                step=first,
                window=interval,
                tokens_D=labels_D.astype(np.int64),
                loss_D=loss_D,
                valid_loss_D=window.valid_D,
                **self._probed(first // interval),
            ),
        )

    def _probed(self, window: int) -> dict[str, Any]:
        """Return what the gradients of a window's last weights say; nothing without a prober."""
        prober, started = self._parts.prober, time.perf_counter()
        if prober is None:
            return {}
        found = prober.measure(window)
        self._pause("probe", started)
        if self._parts.recorder is not None:
            self._parts.recorder.probe(self._step, time.perf_counter() - started)
        return found

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return training_precision(self._world.device.type, bf16=self._parts.bf16)

    def _evaluate(self) -> None:
        self._settle()
        started = time.perf_counter()
        table: Table = self._parts.evaluator.evaluate(self._parts.replica, self._precision())
        for name, row in table.items():
            if not math.isfinite(row["loss"] or 0.0):
                wrong = f"the held-out loss of {name} is {row['loss']} after step {self._step}"
                raise self._blown_up(wrong)
        if self._parts.recorder is not None:
            self._parts.recorder.evaluation(self._step, table)
        losses = [table[name]["loss"] if name in table else None for name in self._parts.domains]
        self._window.valid_D = np.array(losses, dtype=np.float64)
        self._pause("eval", started)

    def _checkpoint(self) -> None:
        self._settle()
        parts, started = self._parts, time.perf_counter()
        writer = self._world.is_writer
        state = TrainingState(
            step=self._step,
            sampler=parts.stream.state_dict(),
            controller=parts.snapshot(self._step) if writer else None,
            corpus_fingerprint=parts.corpus_fingerprint,
            recipe_hash=parts.recipe_hash,
            world_size=self._world.size,
            micro_batch_rows=parts.micro_batch_rows,
            seed=parts.recipe.seed,
            tokens=dict(zip(parts.domains, self._tokens_D.tolist(), strict=True)),
            window={
                "nats": self._window.nats_D.tolist(),
                "labels": self._window.labels_D.tolist(),
                "valid": jsonable(self._window.valid_D),
            },
        )
        path = save_checkpoint(
            parts.checkpoints,
            parts.replica,
            parts.optimizer,
            state,
            tokenizer_path=parts.tokenizer_path,
            keep=parts.recipe.train.keep_checkpoints,
        )
        parts.on_checkpoint(path, self._step)
        self._checkpointed = time.monotonic()
        self._wants = replace(self._wants, checkpoint=False)
        self._pause("checkpoint", started)

    def _pause(self, what: str, started: float) -> None:
        """Book the time since `started`, and leave it out of the next step's."""
        spent = time.perf_counter() - started
        self.seconds[what] += spent
        self._clock += spent

    def _checkpoint_due(self, done: int) -> bool:
        return _due(done, self._parts.recipe.train.checkpoint_every) or self._wants.checkpoint

    def _time_for_checkpoint(self) -> bool:
        minutes = self._parts.recipe.train.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._checkpointed >= 60 * minutes

    def _stop_asked(self) -> bool:
        return self._world.is_writer and self._parts.stop_asked()


def _whose(nats_D: npt.NDArray[np.float64], names: tuple[str, ...]) -> str:
    """Return which domains' losses are no numbers, in words; nothing where all are."""
    lost = [names[d] for d in np.flatnonzero(~np.isfinite(nats_D))]
    return f" of {', '.join(lost)}" if 0 < len(lost) < len(names) else ""


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
