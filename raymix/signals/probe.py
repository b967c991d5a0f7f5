"""`GradientProbe`: gradient statistics of groups of sequences from one backward pass.

The weight gradient of a linear layer is a sum over tokens. Split by piece, the same products give
the gradient of every piece, whose sum is the gradient that training needs; only their Gram matrix
is stored. Legend: B rows, L tokens per row, K groups, P pieces.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raymix._utils.sharded import full_tensor
from raymix.signals.capture import Capture
from raymix.signals.causal_loss import CausalLoss, loss_module
from raymix.signals.gram import GramBuffer, PassGram
from raymix.signals.layout import PieceLayout, split_passes
from raymix.signals.parameters import LeafSubstitution, ParameterNames
from raymix.signals.recording import Recording, piece_gram, row_sums
from raymix.signals.replay import ReplayHooks
from raymix.signals.statistics import PieceGram
from raymix.signals.survey import Plan, Survey

Mode = Literal["exact", "backward", "last_layer"]
Preconditioner = Callable[[nn.Parameter], Tensor | None]


class GradientProbe:
    """Measures the Gram matrix of per-piece gradients of a causal LM or a loss module.

    Parameters in matrix products, look-ups, norms and biases come from the one backward pass. For
    all others (packed experts, convolutions, attention sinks) the innermost module that sees whole
    rows runs again, piece by piece; `by_backward` names them. Works on one process, inside DDP, and
    sharded by FSDP2. Each rank measures its own rows; all-reduce `gradient_sums`. Under FSDP2 all
    ranks must make the same calls with equally many passes, as gathering a layer is a collective.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        n_groups: int,
        halves: int = 2,
        mode: Mode = "exact",
        precondition: Preconditioner | None = None,
        tile_bytes: int | None = None,
    ) -> None:
        """Inspect `model` after sharding, before or after wrapping by DDP.

        Args:
            model: Either `model(tokens_BL, positions_BL, labels_BL)` returns the loss summed over
                labels in nats, and the loss of each token, shape (B, L); labels below 0 are
                ignored. Or a causal LM with an argument `input_ids`, as `CausalLoss` takes it;
                record calls of `loss_module` then. A DDP wrapper stands for what it wraps.
            n_groups: K; targets are groups too.
            halves: Pieces per group, at least 2 for norms and noise.
            mode: `exact`: all parameters. `last_layer`: the output head as a matrix product.
                `backward`: all parameters by one backward pass per piece, with all pieces'
                gradients in memory; the reference, and for models that `exact` does not support.
            precondition: Returns 1 / (sqrt(v) + eps) of a parameter, in its shape and placement,
                or None for 1. Products become <g, P g'>.
            tile_bytes: Largest size of the pieces of one parameter computed at once; None for the
                default of the device.

        Raises:
            ValueError: If a number or the mode is out of range, or no parameter can be measured.
        """
        if n_groups < 1 or halves < 1:
            raise ValueError(f"n_groups = {n_groups}, halves = {halves}: both must be 1 or more")
        if mode not in ("exact", "backward", "last_layer"):
            raise ValueError(f"mode = {mode!r}: must be exact, backward or last_layer")
        self.loss_module: nn.Module = loss_module(model)
        """The module whose passes are measured: `model`, or `CausalLoss` around it."""
        model = self._model = self.loss_module
        self._n_groups, self._n_pieces = n_groups, n_groups * halves
        self._mode = mode
        self._precondition = precondition
        # named_parameters yields a tied parameter once, under its first name.
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if mode == "last_layer":
            head = _head(model)
            trained = {name: p for name, p in trained.items() if any(p is own for own in head)}
        if not trained:
            raise ValueError(f"mode = {mode!r}: the model has no trainable parameter to measure")
        self._trained = trained
        self._names = ParameterNames(model, trained)
        self._workspace = GramBuffer(tile_bytes)
        # Found in the first pass: which modules run again depends on the shapes in it.
        self._plan: Plan | None = None
        # Callers pass arguments by position or by name: bound to find the labels.
        self._signature = inspect.signature(model.forward)

    @property
    def by_backward(self) -> tuple[str, ...]:
        """Return the names of the parameters measured by running a module again for each piece.

        Empty before the first pass. In mode `backward` all parameters are, and none is named.
        """
        names = sorted({name for own in (self._plan or {}).values() for name in own})
        prefix = "model." if isinstance(self.loss_module, CausalLoss) else ""
        return tuple(name.removeprefix(prefix) for name in names)

    @contextlib.contextmanager
    def recording(self, piece_B: Tensor, *, scale: float = 1.0) -> Iterator[Recording]:
        """Record the forward and backward pass that runs inside; gradients are as without it.

        Rows in the order of `order_by_piece` are fastest. Activation checkpointing must not be
        reentrant.

        Args:
            piece_B: Piece `half * K + group` of each row, shape (B,); -1 for a row of none, which
                still counts for the gradient.
            scale: Factor of the summed loss in the backward pass.

        Raises:
            TrainingError: If a parameter is used in a way that cannot be split.
            ValueError: If the mode is `backward`, or `piece_B` does not fit.
        """
        if self._mode == "backward":
            raise ValueError("mode = 'backward': needs its own passes. Call measure()")
        self._check(piece_B)
        recording = Recording(piece_B, scale)
        with self._capturing(recording, piece_B, fixed=False):
            yield recording

    def measure(
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        labels_BL: Tensor,
        piece_B: Tensor,
        *,
        passes: int = 1,
    ) -> tuple[PieceGram, ...]:
        """Return the sums of separate rows, one entry per pass; `.grad` stays untouched.

        Call it inside the autocast context of training, if there is one.

        Args:
            tokens_BL: Token ids.
            positions_BL: Positions.
            labels_BL: Labels.
            piece_B: Piece of each row, as in `recording`.
            passes: Number of passes, with every piece divided evenly over them: less memory, and
                inner products only of rows in the same pass.

        Raises:
            TrainingError: If a parameter is used in a way that cannot be split.
            ValueError: If `piece_B` does not fit.
        """
        self._check(piece_B, len(tokens_BL))
        if not 1 <= passes <= len(piece_B):
            raise ValueError(f"passes = {passes}: must be 1 to {len(piece_B)}, the number of rows")
        grams = []
        for rows in split_passes(piece_B, passes):
            # `split_passes` computes on the CPU; indices must be on the device of the tensor.
            index = rows.to(tokens_BL.device)
            batch = tokens_BL[index], positions_BL[index], labels_BL[index]
            pass_piece_B = piece_B[rows.to(piece_B.device)]
            grams.append(
                self._measure_per_piece(batch, pass_piece_B)
                if self._mode == "backward"
                else self._measure_one_pass(batch, pass_piece_B)
            )
        return tuple(grams)

    def _check(self, piece_B: Tensor, rows: int | None = None) -> None:
        if piece_B.ndim != 1 or (rows is not None and len(piece_B) != rows):
            raise ValueError(f"piece_B of shape {tuple(piece_B.shape)} for {rows} rows")
        if len(piece_B) and not -1 <= int(piece_B.min()) <= int(piece_B.max()) < self._n_pieces:
            raise ValueError(f"piece_B must be from -1 to {self._n_pieces - 1}")

    def _measure_one_pass(self, batch: tuple[Tensor, Tensor, Tensor], piece_B: Tensor) -> PieceGram:
        recording = Recording(piece_B, 1.0)
        with torch.enable_grad(), self._capturing(recording, piece_B, fixed=True) as capture:
            loss, _ = self._model(*batch)
            with torch.autocast(loss.device.type, enabled=False):
                # With `inputs`, autograd accumulates into the anchor alone, not into parameters.
                if loss.requires_grad:
                    torch.autograd.backward(loss, inputs=[capture.anchor])
        return recording.pieces

    @contextlib.contextmanager
    def _capturing(
        self, recording: Recording, piece_B: Tensor, *, fixed: bool
    ) -> Iterator[Capture]:
        """Yield the capture of one pass, which begins when the loss module is called.

        By forward hooks, as the labels are known there, also where DDP calls the module.
        """
        capture = Capture(self._names, fixed=fixed, head_only=self._mode == "last_layer")
        hooks: list[Any] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            labels_BL = self._bind(args, kwargs)[2]
            if capture.begun or len(labels_BL) != len(piece_B):
                problem = "a second forward pass" if capture.begun else f"{len(labels_BL)} rows"
                raise ValueError(f"a recording of one pass of {len(piece_B)} rows: got {problem}")
            layout = PieceLayout(piece_B.to(labels_BL.device), labels_BL.shape[1])
            for name, replayed in self._planned(layout, args, kwargs).items():
                parameters = {each: self._trained[each] for each in replayed}
                replay = ReplayHooks(capture, self._names, name, parameters)
                hooks.extend(replay.register(module.get_submodule(name), running=not name))
            gram = PassGram(layout, self._workspace, self._root)
            recording.begin(gram, self._n_groups, self._n_pieces)
            capture.begin(gram)

        def after(module: nn.Module, args: Any, kwargs: Any, out: tuple[Tensor, Tensor]) -> None:
            capture.close_forward()
            recording.add_losses(self._bind(args, kwargs)[2], out[1].detach())

        hooks += [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            with _eager(self._model), capture:
                yield capture
        finally:
            # Also after an error: remaining hooks would refuse the next forward pass.
            for hook in hooks:
                hook.remove()

    def _planned(self, layout: PieceLayout, args: Any, kwargs: Any) -> Plan:
        """Return which modules run again, by a survey in the first pass."""
        if self._plan is None and self._mode == "last_layer":
            self._plan = {}
        if self._plan is None:

            def new_capture() -> Capture:
                capture = Capture(self._names, fixed=True, head_only=False)
                capture.begin(PassGram(layout, self._workspace, lambda name: None))
                return capture

            arguments = self._signature.bind(*args, **kwargs)
            self._plan = Survey(self._model, self._names, new_capture, arguments).run()
        return self._plan

    def _bind(self, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(self._signature.bind(*args, **kwargs).arguments.values())

    def _root(self, name: str) -> Tensor | None:
        if self._precondition is None:
            return None
        diagonal = self._precondition(self._trained[name])
        if diagonal is None:
            return None
        # Collective under FSDP2: all ranks use the same parameters in the same order.
        return full_tensor(diagonal).detach().sqrt()

    def _measure_per_piece(
        self, batch: tuple[Tensor, Tensor, Tensor], piece_B: Tensor
    ) -> PieceGram:
        """Return the same as `_measure_one_pass` from one forward and backward pass per piece."""
        loss_BL = torch.zeros(batch[2].shape, dtype=torch.float64)
        grads_by_piece: dict[int, dict[str, Tensor]] = {}
        for piece in sorted({*piece_B.tolist()} - {-1}):
            own = torch.nonzero(piece_B == piece).flatten()
            index = own.to(batch[0].device)
            substitution = LeafSubstitution(self._names)
            # Callers may measure under no_grad.
            with torch.enable_grad(), _eager(self._model), substitution:
                loss, own_BL = self._model(*(tensor[index] for tensor in batch))
            with torch.autocast(loss.device.type, enabled=False):
                grads = substitution.grads([loss], [torch.ones_like(loss)])
            grads_by_piece[piece] = {name: self._scaled(name, grad) for name, grad in grads.items()}
            loss_BL[own.cpu()] = own_BL.detach().double().cpu()
        gram_PP = torch.zeros(self._n_pieces, self._n_pieces, dtype=torch.float64)
        # float64: the reference that the other modes are compared with.
        for left_piece, left in grads_by_piece.items():
            for right_piece, right in grads_by_piece.items():
                gram_PP[left_piece, right_piece] = sum(
                    float(grad.flatten().double() @ right[name].flatten().double())
                    for name, grad in left.items()
                )
        sums = row_sums(batch[2].cpu(), loss_BL)
        return piece_gram(self._n_groups, gram_PP, piece_B, sums)

    def _scaled(self, name: str, grad: Tensor) -> Tensor:
        root = self._root(name)
        return grad if root is None else grad * root


def _head(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the output head, else of the last linear module."""
    # Parents come before their parts, so the first head is that of the outermost model.
    linear: nn.Module | None = None
    for module in model.modules():
        if isinstance(module, nn.Linear):
            linear = module
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if getter is not None else None
        if isinstance(head, nn.Module):
            return list(head.parameters())
    return list(linear.parameters()) if linear is not None else []


def _eager(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a compiled model runs eagerly: modes do not see compiled calls."""
    # Private, but the only trace that `Module.compile` leaves.
    if any(getattr(module, "_compiled_call_impl", None) for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
