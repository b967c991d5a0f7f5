"""The training loop of one rank; the same with Ray and without.

A step: read this rank's rows, run forward and backward micro-batch by micro-batch, divide by the
label count of the global batch, clip, update. On a GPU the metrics of a step are read while the
next step runs, so the host never waits for them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from raymix._utils.json import jsonable, rounded
from raymix.errors import TrainingError
from raymix.mixers import DomainStats
from raymix.streaming.batches.step_batch import DocumentBatch, StepBatch
from raymix.training.components import TrainerComponents
from raymix.training.evaluate.held_out import LossTable
from raymix.training.host.device import seed_everything
from raymix.training.model.finite import step_if_finite
from raymix.training.model.learning_rate import learning_rate
from raymix.training.model.optim import clip_gradients, set_learning_rate
from raymix.training.model.parallel import HostCopy, training_precision
from raymix.training.run.checkpoint import TrainingState
from raymix.training.run.checkpoint_writer import save_checkpoint
from raymix.training.step.batches import count_micro_batches, micro_batches, token_loss_weights
from raymix.training.step.documents import MicroStep, document_micro_steps
from raymix.training.step.metrics import PendingMetrics, StepMetrics, StepSums
from raymix.training.step.skipped import SkippedSteps, non_finite_domains


@dataclass(slots=True)
class _InFlightStep:
    """A launched step whose metrics have not been read yet."""

    batch: StepBatch | DocumentBatch
    lr: float
    data_wait_s: float
    pending: PendingMetrics
    grad_norm: HostCopy


@dataclass(slots=True)
class _Window:
    """Sums of the domains' losses since the window began, and the newest held-out losses."""

    nats_D: npt.NDArray[np.float64]
    labels_D: npt.NDArray[np.float64]
    valid_D: npt.NDArray[np.float64]
    """Newest held-out loss in nats per token, NaN where there is none."""


@dataclass(slots=True)
class LoopEnd:
    """How a loop ended."""

    step: int
    """Steps done."""
    stopped: bool
    """Whether it ended early because a stop was requested."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where this rank's time went."""


class TrainingLoop:
    """Trains from the resumed step, or step 0, to the last."""

    def __init__(self, components: TrainerComponents) -> None:
        self._components = components
        self._world = components.replica.world
        state = components.resumed
        self._step = state.step if state else 0
        zeros = np.zeros(len(components.domains))
        tokens = state.tokens if state else {}
        self._tokens_D = np.array([tokens.get(name, 0) for name in components.domains], np.int64)
        # Of domains that the run no longer reads.
        self._left = state.left if state else {}
        self._window = _Window(zeros.copy(), zeros.copy(), np.full(zeros.shape, np.nan))
        if state and state.window:
            sums = (state.window[key] for key in ("nats", "labels", "valid"))
            # None in JSON becomes NaN.
            self._window = _Window(*(np.array(values, dtype=np.float64) for values in sums))
        self._in_flight: _InFlightStep | None = None
        # CUDA kernels run asynchronously, so metrics one step late cost no synchronization. A CPU
        # step is done when its call returns: reading late would gain nothing.
        self._read_metrics_late = self._world.device.type == "cuda"
        self._requests = StepSums(0.0, False, False, zeros, zeros)
        self._skipped = SkippedSteps(components.recipe.train, components.domains)
        self._last_checkpoint_s = time.monotonic()
        self._clock_s = time.perf_counter()
        self._shares: tuple[int, dict[str, float]] = (-1, {})
        self.seconds = {"data": 0.0, "step": 0.0, "metrics": 0.0, "probe": 0.0}
        self.seconds |= {"eval": 0.0, "checkpoint": 0.0}

    @property
    def step(self) -> int:
        """Return the steps done."""
        return self._step

    def run(self) -> LoopEnd:
        """Train, and return how the loop ended; all ranks end at the same step.

        Raises:
            TrainingError: If a held-out loss is not finite, nor the gradients of too many steps in
                a row.
            RaymixError: Whatever stream, controller or disk raise.
        """
        components = self._components
        # Sums are dropped where domains change: the new ones are scored before they are trained on.
        if self._step == 0 or not (components.resumed and components.resumed.window):
            components.stage("scoring held-out text")
            self._evaluate()
        components.stage("reading the first batch")
        self._clock_s = time.perf_counter()
        stopped = False
        while self._step < components.steps and not stopped:
            self._next_step()
            done, last = self._step, self._step == components.steps
            if last or _due(done, components.recipe.eval.every):
                self._evaluate()
            if last:
                self._skipped.check_end()
            # Stop and checkpoint flags were all-reduced with the metrics, so every rank sees them
            # at the same step; a rank that decided alone would leave the others in a collective.
            stopped = self._requests.stop and not last
            if last or stopped or self._checkpoint_due(done):
                self._save_checkpoint()
        return LoopEnd(self._step, stopped, self.seconds)

    def _next_step(self) -> None:
        """Read a batch, train on it, and record the metrics that are ready."""
        start = time.perf_counter()
        batch = self._components.stream.next()
        read = time.perf_counter()
        step = self._train_step(batch)
        launched = time.perf_counter()
        if self._read_metrics_late:
            # Drain the previous step first: its numbers arrive while this one runs.
            self._drain_metrics()
            self._in_flight = step
        else:
            self._in_flight = step
            self._drain_metrics()
        self._step += 1
        self._push_window()
        self.seconds["data"] += read - start
        self.seconds["step"] += launched - read
        self.seconds["metrics"] += time.perf_counter() - launched

    def _train_step(self, batch: StepBatch | DocumentBatch) -> _InFlightStep:
        """Launch one optimizer step; on a GPU it returns before the step is done."""
        components, replica = self._components, self._components.replica
        lr = learning_rate(batch.step, steps=components.steps, config=components.recipe.train)
        set_learning_rate(components.optimizer, lr)
        # Dropout must depend on the step, not on how many steps this process has done: a resumed
        # run repeats the same masks.
        seed_everything(components.recipe.seed, batch.step, self._world.rank, self._world.device)
        metrics = StepMetrics(len(components.domains), self._world)
        count, micro_steps = self._micro_steps(batch)
        loss_weight_D = components.stream.loss_weights(batch.step)
        # Divided by the labels of the *global* batch, so any split over ranks and micro-batches
        # gives the same gradient. `gradient_scale` undoes DDP's and FSDP's averaging over ranks.
        scale = replica.gradient_scale / max(1, batch.label_tokens)
        for index, micro_step in enumerate(micro_steps):
            micro = micro_step.micro
            # Gradients are reduced once per step, in the last micro-batch's backward pass.
            with replica.accumulating(last=index == count - 1), micro_step.attending():
                tensors = [micro.tokens_BL, micro.positions_BL, micro.labels_BL]
                if loss_weight_D is not None:
                    tensors.append(token_loss_weights(micro, micro_step.domains, loss_weight_D))
                with self._precision():
                    loss, loss_BL = replica.module(*tensors)
                (loss * scale).backward()
            metrics.add(micro, micro_step.domains, loss_BL)
        # Starts the all-reduce of the metrics; it overlaps with clipping and the update.
        pending = metrics.start(
            checkpoint=self._checkpoint_minutes_over(), stop=self._stop_requested()
        )
        grad_norm = clip_gradients(replica.model.parameters(), components.recipe.train.clip_norm)
        # Without a label there is no gradient; momentum and weight decay would move the weights.
        if batch.label_tokens:
            step_if_finite(components.optimizer, grad_norm)
        components.optimizer.zero_grad(set_to_none=True)
        return _InFlightStep(batch, lr, components.stream.waited_s, pending, HostCopy(grad_norm))

    def _micro_steps(self, batch: StepBatch | DocumentBatch) -> tuple[int, Iterator[MicroStep]]:
        """Return the number of forward passes of a step, the same on all ranks, and the passes."""
        components, device = self._components, self._world.device
        if isinstance(batch, DocumentBatch):
            steps = document_micro_steps(batch, components.context_parallel, device)
            return len(batch.micro_batches), steps
        max_rows = components.max_rank_rows or len(batch.tokens)
        count = count_micro_batches(max_rows, components.micro_batch_rows)
        domains = batch.domain_rows
        return count, (MicroStep(micro, domains) for micro in micro_batches(batch, count, device))

    def _drain_metrics(self) -> None:
        """Read and record the metrics of the step in flight, if there is one."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        sums = step.pending.result()
        batch = step.batch
        loss = sums.loss / batch.label_tokens if batch.label_tokens else math.nan
        grad_norm = float(step.grad_norm.get())
        skipped = self._skipped.add(batch.step + 1, grad_norm, sums.nats_D, batch.label_tokens)
        if skipped is None and not math.isfinite(loss):
            domains = non_finite_domains(sums.nats_D, self._components.domains)
            raise _divergence(
                self._components, f"the loss{domains} is {loss} at step {batch.step + 1}"
            )
        self._requests = sums
        self._tokens_D += batch.tokens_D
        if self._components.push is not None:
            # A mixer would keep a loss that is not finite in its averages for good.
            finite_D = np.isfinite(sums.nats_D)
            self._window.nats_D += np.where(finite_D, sums.nats_D, 0.0)
            self._window.labels_D += np.where(finite_D, sums.labels_D, 0.0)
        now = time.perf_counter()
        seconds, self._clock_s = now - self._clock_s, now
        if self._components.recorder is not None:
            line = self._metrics_line(step, sums, loss, seconds)
            self._components.recorder.step(line if skipped is None else _left_out(line, skipped))
            if isinstance(batch, DocumentBatch) and batch.lengths is not None:
                self._components.recorder.lengths(batch.step + 1, batch.lengths)

    def _metrics_line(
        self, step: _InFlightStep, sums: StepSums, loss: float, seconds: float
    ) -> Mapping[str, Any]:
        components, batch = self._components, step.batch
        names, tokens_D = components.domains, batch.tokens_D
        tokens = int(tokens_D.sum())
        # Cached by version: with 10,000 domains the dict costs more than the rest of the line.
        if self._shares[0] != batch.version:
            self._shares = batch.version, dict(zip(names, batch.shares.tolist(), strict=True))
        read = np.flatnonzero(tokens_D).tolist()
        scored = np.flatnonzero(sums.labels_D).tolist()
        line = {
            "step": batch.step + 1,
            "loss": loss,
            "lr": step.lr,
            "tokens": int(self._tokens_D.sum()) + sum(self._left.values()),
            "tokens_per_s": rounded(tokens / seconds),
            "data_wait": rounded(min(1.0, step.data_wait_s / seconds), 3),
            "mixture_version": batch.version,
            "shares": self._shares[1],
            "batch_hash": batch.batch_hash,
            "seconds": rounded(seconds),
            "grad_norm": rounded(float(step.grad_norm.get())),
            "counts": {names[d]: int(tokens_D[d]) for d in read},
            "domain_loss": {names[d]: rounded(sums.nats_D[d] / sums.labels_D[d]) for d in scored},
        }
        if (note := components.stream.note(batch.step)) is not None:
            line["note"] = note
        if components.peak_flops:
            flops_per_s = components.flops_per_token * tokens / seconds
            line["mfu"] = rounded(flops_per_s / (self._world.size * components.peak_flops), 4)
        return line

    def _push_window(self) -> None:
        """At the end of a window, send its losses and gradient statistics to the mixer.

        Loss sums are over all ranks already. Rank 0 sends them, the others send zeros, so a run
        that resumes in mid-window on any number of ranks takes them from its checkpoint.
        """
        components, interval = self._components, self._components.recipe.train.probe_interval
        if components.push is None or self._step % interval:
            return
        self._drain_metrics()
        window = self._window
        zeros = np.zeros(len(components.domains))
        self._window = _Window(zeros.copy(), zeros.copy(), window.valid_D)
        labels_D = window.labels_D if self._world.is_writer else np.zeros_like(window.labels_D)
        loss_D = np.full(labels_D.shape, np.nan)
        np.divide(window.nats_D, labels_D, out=loss_D, where=labels_D > 0)
        first = self._step - interval
        components.push(
            first // interval,
            DomainStats(
                step=first,
                window=interval,
                tokens_D=labels_D.astype(np.int64),
                loss_D=loss_D,
                valid_loss_D=window.valid_D,
                **self._gradient_statistics(first // interval),
            ),
        )

    def _gradient_statistics(self, window: int) -> dict[str, Any]:
        """Return gradient statistics at the end of a window; empty without a prober."""
        prober, started = self._components.prober, time.perf_counter()
        if prober is None:
            return {}
        statistics = prober.measure(window)
        self._book("probe", started)
        if self._components.recorder is not None:
            self._components.recorder.probe(self._step, time.perf_counter() - started)
        return statistics

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return training_precision(self._world.device.type, bf16=self._components.bf16)

    def _evaluate(self) -> None:
        self._drain_metrics()
        started = time.perf_counter()
        components = self._components
        table: LossTable = components.evaluator.evaluate(components.replica, self._precision())
        for name, row in table.items():
            if not math.isfinite(row["loss"] or 0.0):
                problem = f"the held-out loss of {name} is {row['loss']} after step {self._step}"
                raise _divergence(components, problem)
        if components.recorder is not None:
            components.recorder.evaluation(self._step, table)
        losses = [table[name]["loss"] if name in table else None for name in components.domains]
        self._window.valid_D = np.array(losses, dtype=np.float64)
        self._book("eval", started)

    def _save_checkpoint(self) -> None:
        self._drain_metrics()
        components, started = self._components, time.perf_counter()
        state = TrainingState(
            step=self._step,
            sampler=components.stream.state_dict(),
            controller=components.snapshot(self._step) if self._world.is_writer else None,
            corpus_fingerprint=components.corpus.fingerprint,
            recipe_hash=components.recipe_hash,
            world_size=self._world.size,
            micro_batch_rows=components.micro_batch_rows,
            seed=components.recipe.seed,
            tokens=dict(zip(components.domains, self._tokens_D.tolist(), strict=True)),
            left=self._left,
            domain_fingerprints=components.corpus.domain_fingerprints(),
            tokenizer=components.corpus.manifest.tokenizer.fingerprint,
            window={
                "nats": self._window.nats_D.tolist(),
                "labels": self._window.labels_D.tolist(),
                "valid": jsonable(self._window.valid_D),
            },
        )
        path = save_checkpoint(
            components.checkpoints,
            components.replica,
            components.optimizer,
            state,
            tokenizer_path=components.corpus.tokenizer_path,
            keep=components.recipe.train.keep_checkpoints,
        )
        components.on_checkpoint(path, self._step)
        if components.recorder is not None:
            components.recorder.checkpoint(self._step, time.perf_counter() - started)
        self._last_checkpoint_s = time.monotonic()
        # The request is served; without this the next step would save again.
        self._requests = replace(self._requests, checkpoint=False)
        self._book("checkpoint", started)

    def _book(self, activity: str, started: float) -> None:
        """Book the time since `started` to an activity, not to the next step."""
        spent = time.perf_counter() - started
        self.seconds[activity] += spent
        self._clock_s += spent

    def _checkpoint_due(self, step: int) -> bool:
        every = self._components.recipe.train.checkpoint_every
        return self._requests.checkpoint or _due(step, every)

    def _checkpoint_minutes_over(self) -> bool:
        minutes = self._components.recipe.train.checkpoint_minutes
        spent = time.monotonic() - self._last_checkpoint_s
        return minutes is not None and spent >= 60 * minutes

    def _stop_requested(self) -> bool:
        # A stop request is a file; one rank reads it, and the all-reduce tells the others.
        return self._world.is_writer and self._components.stop_requested()


def _left_out(line: Mapping[str, Any], note: str) -> Mapping[str, Any]:
    """Return the line of a step that was left out: with the reason, and finite losses alone."""
    losses = {name: loss for name, loss in line["domain_loss"].items() if loss is not None}
    finite = {**line, "domain_loss": losses, "skipped": note}
    if not math.isfinite(line["loss"]):
        del finite["loss"]
    return finite


def _divergence(components: TrainerComponents, problem: str) -> TrainingError:
    fix = "Lower train.lr, warm up longer, or clip harder"
    return TrainingError.at("train.lr", components.recipe.train.lr, problem, fix=fix)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
