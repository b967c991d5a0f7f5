"""Registry of merge methods, lazily read task vectors, and the result type of a method.

A merge method is a function `(base, deltas, options) -> delta` over one parameter. It never sees
a file, a worker or Ray. Shapes: K tasks; (m, n) a weight with m outputs and n inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any, TypeVar, overload

import torch
from pydantic import Field
from torch import Tensor

from raymix.errors import MergeError, did_you_mean
from raymix.recipe.base import Number, RecipeModel

ENTRY_POINTS = "raymix.merge_methods"

# Entries per chunk. On a CPU, K + 3 fp32 arrays of 256 kB fit a core's L2 cache of 2 MB, and each
# kernel call still costs more than its dispatch. A GPU needs far more entries to fill its SMs.
_CPU_CHUNK_ENTRIES = 1 << 16
_GPU_CHUNK_ENTRIES = 1 << 24


@dataclass(frozen=True, slots=True)
class PerModel:
    """Annotation of an option that has one value per model, in the order of the models."""


Scale = Annotated[Number, Field(ge=-1e9, le=1e9)]
"""Factor of entries; the bound is far beyond any use and keeps products within fp32's range."""
ScalePerModel = Annotated[tuple[Scale, ...], PerModel()]
"""One factor per model; a single value applies to all models."""
Fraction = Annotated[Number, Field(ge=0, le=1)]
"""Fraction of the entries of a parameter."""
FractionPerModel = Annotated[tuple[Fraction, ...], PerModel()]
"""One fraction per model; a single value applies to all models."""


class Options(RecipeModel):
    """Base of the options of a method: frozen and strict, one field per name in the YAML file."""

    @classmethod
    def per_model(cls) -> frozenset[str]:
        """Return the YAML names of the options that have a value per model."""
        return frozenset(
            field.alias or name
            for name, field in cls.model_fields.items()
            if any(isinstance(item, PerModel) for item in field.metadata)
        )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the YAML names of all options."""
        return tuple(field.alias or name for name, field in cls.model_fields.items())


def broadcast_values(values: Sequence[float], k_tasks: int) -> list[float]:
    """Return one value per task, K in all: the values themselves, or a single one repeated.

    Raises:
        MergeError: If there are neither one nor K values.
    """
    if len(values) == 1:
        return [values[0]] * k_tasks
    if len(values) != k_tasks:
        raise MergeError.at(
            "parameters",
            list(values),
            f"{len(values)} values for {k_tasks} models",
            fix="Give one per model, or one",
        )
    return list(values)


class LazyTensors(Sequence[Tensor]):
    """Sequence whose tensors are computed at each access, so that few are in memory at a time."""

    @abstractmethod
    def compute(self, index: int) -> Tensor:
        """Return a new tensor for `index`; the caller may change it in place."""

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self.compute(k) for k in range(*index.indices(len(self)))]
        return self.compute(index)


class Deltas(LazyTensors):
    """Task vectors of one parameter, read and converted at each access.

    An item is a new tensor, so a method may change it in place; items are not cached. `chunk`
    returns rows of the parameter seen as a matrix (one row when it has one dimension).
    """

    def __init__(
        self,
        stored: Sequence[Tensor],
        base: Tensor | Sequence[Tensor | None] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Keep references to the stored tensors, usually memory-mapped; read nothing yet.

        Args:
            stored: The K models' tensors (any floating dtype), or their deltas where `base` is
                None.
            base: Subtracted from each stored tensor: one tensor, or one (or None) per task.
            dtype: The dtype of all items.
            device: The device of all items.
        """
        self._stored = stored
        self._bases = [base] * len(stored) if base is None or isinstance(base, Tensor) else base
        self._base_cache: tuple[Tensor, slice, Tensor] | None = None
        self.dtype, self.device = dtype, torch.device(device)
        self.shape = stored[0].shape
        # A vector is one row, so DELLA ranks all of its entries together and chunks never split it.
        rows = self.shape[0] if len(self.shape) > 1 else 1
        self.matrix_shape = (rows, stored[0].numel() // rows if rows else 0)

    def __len__(self) -> int:
        return len(self._stored)

    def compute(self, index: int) -> Tensor:
        """See `LazyTensors`."""
        return self._read(index, self.new_matrix())

    def iter_buffered(self) -> Iterator[Tensor]:
        """Yield read-only deltas; each is valid until the next one is requested.

        Tensors that need a conversion or a subtraction share one buffer: page faults of fresh
        memory take longer than filling it.
        """
        buffer: Tensor | None = None
        for k, (stored, base) in enumerate(zip(self._stored, self._bases, strict=True)):
            if base is None and stored.dtype == self.dtype and stored.device == self.device:
                # The stored tensor itself, not a copy: this is why items are read-only.
                yield stored
            else:
                buffer = self.new_matrix() if buffer is None else buffer
                yield self._read(k, buffer)

    def _read(self, k: int, out: Tensor) -> Tensor:
        """Fill `out`, shape `matrix_shape`, with delta k and return it in its own shape."""
        for rows in self.chunks():
            self.chunk(k, rows, out=out[rows])
        return out.view(self.shape)

    def chunks(self) -> Iterator[slice]:
        """Yield ranges of rows that cover the parameter, one row at least each."""
        rows, columns = self.matrix_shape
        size = _CPU_CHUNK_ENTRIES if self.device.type == "cpu" else _GPU_CHUNK_ENTRIES
        step = max(1, size // max(1, columns))
        # Along rows, never within one: methods that rank or normalize rows see all of a row.
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step))

    def chunk(self, k: int, rows: slice, out: Tensor | None = None) -> Tensor:
        """Return rows of delta k, shape (rows, columns), in a new tensor or in `out`."""
        stored = self._stored[k].reshape(self.matrix_shape)[rows]
        if out is None:
            out = torch.empty_like(stored, dtype=self.dtype, device=self.device)
        # bf16 and fp16 convert exactly to fp32, so the difference is that of the stored values.
        out.copy_(stored)
        base = self._bases[k]
        return out if base is None else out.sub_(self._base_chunk(base, rows))

    def _base_chunk(self, base: Tensor, rows: slice) -> Tensor:
        """Return rows of the base in the deltas' dtype; the last rows are cached."""
        # Methods read the same rows of all K tasks in a loop, so one entry saves K - 1 conversions.
        cache = self._base_cache
        if cache is None or cache[0] is not base or cache[1] != rows:
            stored = base.reshape(self.matrix_shape)[rows]
            cache = self._base_cache = (base, rows, stored.to(self.device, self.dtype))
        return cache[2]

    def new_matrix(self) -> Tensor:
        """Return an uninitialized tensor, shape `matrix_shape`."""
        return torch.empty(self.matrix_shape, dtype=self.dtype, device=self.device)

    def unstack(self) -> Iterator[Deltas]:
        """Yield the deltas of each index of the first dimension: the experts of a stack."""
        for index in range(self.shape[0]):
            bases = [None if base is None else base[index] for base in self._bases]
            stored = [tensor[index] for tensor in self._stored]
            yield Deltas(stored, bases, dtype=self.dtype, device=str(self.device))


def as_deltas(deltas: Sequence[Tensor]) -> Deltas:
    """Return `deltas` as `Deltas`; plain tensors keep their dtype.

    Raises:
        MergeError: If there are none, or their shapes differ.
    """
    # Plain tensors come from direct calls of a method, in tests and notebooks.
    if isinstance(deltas, Deltas):
        return deltas
    if not deltas:
        raise MergeError.at("models", [], "no task to merge")
    shapes = {tuple(delta.shape) for delta in deltas}
    if len(shapes) > 1:
        raise MergeError.at("models", sorted(shapes), "the deltas have different shapes")
    return Deltas(list(deltas), dtype=deltas[0].dtype, device=str(deltas[0].device))


@dataclass(frozen=True, slots=True)
class Factors:
    """A matrix in factored form: `left` (m, r) times `right` (r, n)."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Return the matrix itself, shape (m, n)."""
        return self.left @ self.right

    def transposed(self) -> Factors:
        """Return the factors of the transposed matrix."""
        return Factors(self.right.T, self.left.T)


@dataclass(frozen=True, slots=True)
class Merged:
    """Result of a method for one parameter, with figures for the report."""

    delta: Tensor
    """The merged delta (or the merged weight, of a method without a base)."""
    density: float | None = None
    """Fraction of the tasks' entries that survived pruning, where the method prunes."""
    rank: int | None = None
    """Number of singular directions used, where the method decomposes."""


MergeFunction = Callable[[Tensor | None, Sequence[Tensor], Any], Tensor | Merged]
_F = TypeVar("_F", bound=MergeFunction)
FactoredFunction = Callable[[Sequence[Factors], Any], Factors]
WorkingBytes = Callable[[tuple[int, int], int, int, Any], int]
"""Estimates working memory in bytes from (m, n), K, the bytes per entry, and the options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeMethod:
    """A registered method and the facts that the engine needs to call it."""

    name: str
    function: MergeFunction
    options: type[Options]
    base: str = "required"
    """`required`: works on deltas; `none`: on the models; `optional`: deltas if there is a base;
    `first`: on the models, the base being the first."""
    min_models: int = 1
    """Fewest models, the base not counted."""
    max_models: int | None = None
    """Most models, the base not counted; None: no limit."""
    matrix_only: bool = False
    """Whether `function` takes weight matrices only; `fallback` then merges the rest."""
    working_bytes: WorkingBytes | None = None
    """Peak memory of merging a weight matrix beyond three copies of it; None: nothing more."""
    fallback: MergeFunction | None = None
    """Merges biases, norms and embeddings of a `matrix_only` method."""
    factored: FactoredFunction | None = None
    """The same method on low-rank factors, without forming (m, n): LoRA in, LoRA out, exact."""
    scale_option: str = "lambda"
    """The option that the merged delta is proportional to, where the method has that option."""

    @property
    def scaled_by(self) -> str | None:
        """Return `scale_option`, or None where the method has no such option."""
        return self.scale_option if self.scale_option in self.options.names() else None


_METHODS: dict[str, MergeMethod] = {}


def merge_method(name: str, *, options: type[Options], **fields: Any) -> Callable[[_F], _F]:
    """Return a decorator that registers `(base, deltas, options) -> delta` under `name`.

    Packages outside raymix name the module of the function in the entry-point group
    `raymix.merge_methods`; it is imported when a merge file uses the name.

    Args:
        name: The value of `merge_method` in the YAML file.
        options: Its options, an `Options` subclass.
        **fields: Further fields of `MergeMethod`.
    """

    def register(function: _F) -> _F:
        _METHODS[name] = MergeMethod(name=name, function=function, options=options, **fields)
        return function

    return register


def known_methods() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    # Names come from the packages' metadata; no plug-in is imported to list it.
    plugins = {point.name for point in metadata.entry_points(group=ENTRY_POINTS)}
    return tuple(sorted({*_METHODS, *plugins}))


def get_method(name: str, path: str = "merge_method") -> MergeMethod:
    """Return the method called `name`.

    Raises:
        MergeError: If there is no such method; the message names the field `path`.
    """
    if name not in _METHODS:
        # Loading runs the plug-in's decorators. Only the named one: a broken plug-in of somebody
        # else must not stop a merge that does not use it.
        for point in metadata.entry_points(group=ENTRY_POINTS, name=name):
            point.load()
    if name not in _METHODS:
        known = known_methods()
        suggestion = did_you_mean(name, known)
        raise MergeError.at(
            path, name, "not a merge method", allowed=f"Known: {', '.join(known)}", fix=suggestion
        )
    return _METHODS[name]
