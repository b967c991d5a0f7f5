"""`MixtureLoader`: an iterable of finished batches of a mixture, one per data-parallel rank.

Every batch is a function of the recipe's seed, the corpus and the mixture log. So a loader has no
state of its own but the step: a run goes on in the next batch, on any number of ranks, and reads
what `raymix train` of the same recipe would read.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from raymix.errors import TrainingError
from raymix.loader.checks import STATE_VERSION, check_ranks, check_seek, check_state
from raymix.loader.collectives import Collectives
from raymix.loader.feedback import Feedback
from raymix.loader.opening import open_corpus, open_stream, packed_recipe
from raymix.loader.probe import LoaderProbe, ProbedModel
from raymix.loader.rank import find_rank
from raymix.loader.reader import StepReader
from raymix.loader.step_info import RecentSteps, StepInfo
from raymix.loader.step_parts import StepParts
from raymix.loader.tensors import Layout
from raymix.mixers import Mixer, build_mixer
from raymix.recipe import RecipeSource, load_recipe
from raymix.sampling import MixtureLog
from raymix.training.plan.mixer_context import count_steps, mixer_context


class MixtureLoader(IterableDataset[dict[str, Any]]):
    """Batches of a mixture for any training loop.

    Iterating yields dicts of CPU tensors: `input_ids`, `labels` (unshifted, -100 where nothing is
    predicted), `position_ids` (from 0 in every document) and `domain_ids`, int64 of one shape, and
    `num_items_in_batch`, the labels of the global batch divided by the ranks: a loss that is a sum
    over this rank's labels divided by it gives, averaged over ranks as DDP and FSDP do, the mean
    over the global batch. `use_cache` is False: with a cache, transformers lets packed documents
    see each other. `domain_ids` is for the loop, not the model: pop it before the forward pass.
    Under a mixer that scales losses, `loss_weights` has the factor of each token.

    Args of the constructor:
        source: A recipe, or the path of one. Its sections `model`, `cluster` and `run` are unused.
        rank: Data-parallel rank; left out, of `torch.distributed`, Ray Train, or RANK.
        world_size: Number of data-parallel ranks; goes with `rank`.
        group: Process group of these ranks where it is not the default one.
        mixer: A mixer in place of the recipe's.
        micro_batches: Parts in which a step is handed out, for gradient accumulation.
        layout: `rows`: (B, L); `flat`: one row of all tokens, as flash attention takes packed
            documents. Document mode is always flat.
        varlen: Add the documents' boundaries for variable-length attention, to flat parts.
        pin_memory: Put tensors into pinned memory, where there is a CUDA device.
        run_dir: Directory for the mixture log, written by rank 0.

    Raises:
        RecipeError: If the recipe is wrong, or options do not go together.
        CorpusError: If the corpus cannot be used.
        TrainingError: If the rank is outside the world.
    """

    def __init__(
        self,
        source: RecipeSource,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        group: Any = None,
        mixer: Mixer | None = None,
        micro_batches: int = 1,
        layout: Layout = "rows",
        varlen: bool = False,
        pin_memory: bool = False,
        run_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.recipe = load_recipe(source)
        place = find_rank(rank, world_size)
        self.rank, self.world_size = place.rank, place.world_size
        self.steps = count_steps(self.recipe)
        self.micro_batches = micro_batches
        self._parts_of_step = StepParts(
            micro_batches=micro_batches,
            layout=layout if self.recipe.data.mode == "packed" else "flat",
            varlen=varlen,
            pin_memory=pin_memory and torch.cuda.is_available(),
            world_size=self.world_size,
        )
        self._given_mixer, self._run_dir = mixer, run_dir
        self._collectives = Collectives(self.rank, self.world_size, group)
        self._corpus = open_corpus(self.recipe.corpus, self._collectives)
        self._context = mixer_context(self.recipe, self._corpus, steps=self.steps)
        # Built here for its errors and its needs; the controller has one of its own.
        self._mixer = mixer or build_mixer(self.recipe.mixer, self._context)
        self._feedback = Feedback(self.recipe, self._mixer, self.domains, self._collectives)
        self._reset(None)

    @classmethod
    def from_corpus(
        cls,
        path: str | os.PathLike[str],
        *,
        steps: int,
        mixer: str | Mapping[str, Any] | Mixer = "proportional",
        sequence_length: int = 1024,
        rows_per_step: int = 64,
        seed: int = 0,
        **options: Any,
    ) -> MixtureLoader:
        """Return a loader of packed rows of a prepared corpus, without a recipe.

        Args:
            path: The corpus.
            steps: Steps of the whole run.
            mixer: A kind, a `mixer` section, or a mixer.
            sequence_length: Tokens per row.
            rows_per_step: Rows of the global batch.
            seed: Seed of the order.
            options: Those of the constructor.

        Raises:
            RaymixError: As the constructor.
        """
        built = mixer if isinstance(mixer, Mixer) else None
        recipe = packed_recipe(
            os.fspath(path),
            steps=steps,
            mixer="uniform" if isinstance(mixer, Mixer) else mixer,
            sequence_length=sequence_length,
            rows_per_step=rows_per_step,
            seed=seed,
        )
        return cls(recipe, mixer=built, **options)

    # -- iteration -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Return the iterator over the batches that are left; a second one goes on.

        Raises:
            TrainingError: If all steps have been read, or in a worker process of a DataLoader.
        """
        worker = get_worker_info()
        if worker is not None:
            raise TrainingError.at(
                "num_workers",
                worker.num_workers,
                "worker processes would each read the whole mixture",
                fix="Use num_workers=0 and batch_size=None, or no DataLoader at all",
            )
        if self._read_to_end:
            raise TrainingError.at(
                "step",
                self.steps,
                "this loader has been read to its end",
                fix="Load a state, or make another loader, to read again",
            )
        return self

    def __next__(self) -> dict[str, Any]:
        """Return the next part of a step.

        Raises:
            StopIteration: After the last step.
            CorpusError: If a block is corrupt; it names the file and the block.
        """
        if not self._parts:
            parts = self._open().next_parts()
            if parts is None:
                self._read_to_end = True
                raise StopIteration
            self._parts = parts
        part = self._parts.popleft()
        if not self._parts:
            self._handed += 1
        return part

    def __len__(self) -> int:
        """Return the parts of the whole run, however far it has been read."""
        return self.steps * self.micro_batches

    # -- what was trained ----------------------------------------------------------------------

    @property
    def step_read(self) -> int:
        """Return the steps handed out completely; a framework may read ahead of training."""
        return self._handed

    @property
    def step_trained(self) -> int:
        """Return the steps that `step` has reported; those handed out where it is never called."""
        return self._handed if self._trained is None else self._trained

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the names of the domains, in the order of their ids."""
        return self._corpus.domain_names

    @property
    def mixture_log(self) -> MixtureLog:
        """Return the mixture log as far as it was read."""
        return self._open().log

    @property
    def adaptive(self) -> bool:
        """Return whether the mixer learns from `feedback`."""
        return bool(self._mixer.needs)

    def info(self, step: int | None = None) -> StepInfo:
        """Return figures of a step that was read lately, else of the last one.

        Raises:
            TrainingError: If it has not been read, or too long ago.
        """
        return self._parts_of_step.recent.get(step)

    def feedback(
        self, token_loss: torch.Tensor, labels: torch.Tensor, domain_ids: torch.Tensor
    ) -> None:
        """Add the losses of a part, for adaptive mixers and `domain_losses`; waits for nothing.

        Args:
            token_loss: Loss of every token in nats, of the shape of `labels`, at the place of the
                token that is predicted; see `token_losses`.
            labels: The part's labels.
            domain_ids: The part's domains.

        Raises:
            TrainingError: If the shapes differ.
        """
        self._feedback.add(token_loss, labels, domain_ids)

    def feedback_held_out(self, losses: Mapping[str, float]) -> None:
        """Give held-out losses by domain, nats per token, to mixers that follow them.

        Raises:
            TrainingError: If a name is not a domain.
        """
        self._feedback.set_held_out(losses)

    def step(self) -> None:
        """Report that the next step has been trained on, with the feedback given since the last.

        A collective of all ranks under an adaptive mixer: losses are summed over them, and at the
        end of a window (`train.probe_interval`) the gradient probe is run and the mixer updated.

        Raises:
            TrainingError: If the step was not read, or the mixer needs a probe that is missing.
        """
        trained = self._start_step if self._trained is None else self._trained
        if trained >= self._handed:
            raise TrainingError.at(
                "step",
                trained,
                "its batch has not been read",
                fix="Call step() once for each step read, after its last part",
            )
        self._trained = trained + 1
        self._open().release(self._trained)
        stats = self._feedback.end_step(self._trained)
        if stats is not None:
            self._open().push(stats)

    def domain_losses(self) -> dict[str, float]:
        """Return the mean loss by domain since the last call, nats per token.

        Of the steps that `step` reported; under an adaptive mixer over all ranks, else of this one.
        """
        return self._feedback.domain_losses()

    def gradient_probe(
        self,
        model: torch.nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        micro_batch_rows: int = 8,
        bf16: bool = False,
    ) -> None:
        """Measure the gradient statistics that the mixer needs, at the end of each window.

        Args:
            model: The causal LM that is trained, wrapped by DDP or FSDP2 or not.
            optimizer: Its optimizer, for `train.probe.precondition: adam`.
            micro_batch_rows: Rows of a forward pass that fit into memory.
            bf16: Whether it is trained under bf16 autocast.

        Raises:
            TrainingError: If the model's gradients cannot be measured.
        """
        probed = ProbedModel(model, optimizer, micro_batch_rows, bf16)
        self._feedback.probe = LoaderProbe(
            self.recipe, self._corpus, self._mixer, probed, self._collectives
        )

    def set_weights(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None = None
    ) -> int:
        """Request shares of the domains and return the step from which on they hold.

        A collective of all ranks, each with the same weights. Under an adaptive mixer they hold
        until its next window.

        Args:
            weights: Shares by domain, or in their order; they sum to 1.
            first_step: That step; left out, the first that no rank has read.

        Raises:
            RecipeError: If they are no shares of the domains, or the step may have been read.
        """
        return self._open().set_weights(weights, first_step)

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return, in JSON types, what a loader needs to go on; the same on all ranks.

        It does not depend on the number of ranks. A step of which some parts are still to be handed
        out begins again.

        Args:
            step: Steps that were trained; left out, those reported by `step`, or all handed out.

        Raises:
            TrainingError: If `step` is none that was read.
        """
        return self._state_at(self.step_trained if step is None else step)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state, whatever has been read before.

        Raises:
            TrainingError: If it is not a loader's state, or of another seed or batch size.
            CorpusError: If it was made with another corpus.
        """
        check_state(state_dict, self.recipe, self._corpus)
        self._reset(state_dict)

    def seek(self, step: int) -> None:
        """Go on at `step` without a state, as if the steps before it had been read.

        For frameworks that store a count and no state. It knows nothing of `set_weights`.

        Raises:
            TrainingError: If there is no such step, or the mixer is adaptive.
        """
        check_seek(step, self.steps, self._mixer)
        self._reset(None)
        self._open().skip_to(step)
        self.load_state_dict(self._state_at(step))

    def close(self) -> None:
        """Release blocks and files; the loader can be used again and goes on where it was."""
        if self._reader is not None:
            state = self.state_dict()
            self._reader.close()
            self._reset(state)

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: no open files, no process group, no probe."""
        start = self.state_dict() if self._reader else self._start
        return self.__dict__ | {"_start": start, "_reader": None, "_parts": deque()}

    def _state_at(self, step: int) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "step": step,
            "seed": self.recipe.seed,
            "step_tokens": self.recipe.data.step_tokens,
            **self._open().state_dict(step),
            "window": self._feedback.state_dict(),
        }

    def _reset(self, state: Mapping[str, Any] | None) -> None:
        """Begin at a state, or at step 0; the stream opens when it is needed."""
        self._start = state
        self._start_step = self._handed = int(state["step"]) if state else 0
        self._trained: int | None = None
        self._read_to_end = False
        self._reader: StepReader[deque[dict[str, Any]]] | None = None
        self._parts: deque[dict[str, Any]] = deque()
        self._parts_of_step.recent = RecentSteps(self.domains)
        self._feedback.restart(state["window"] if state else None)

    def _open(self) -> StepReader[deque[dict[str, Any]]]:
        """Return the reader, opened on first use: a loader that is pickled before has none."""
        if self._reader is None:
            check_ranks(self._collectives, self._corpus.fingerprint, self._start_step)
            controller, stream = open_stream(
                self.recipe,
                self._corpus,
                self._context,
                self._collectives,
                mixer=self._given_mixer,
                run_dir=self._run_dir,
                state=self._start,
            )
            self._reader = StepReader(controller, stream, self._parts_of_step)
        return self._reader
