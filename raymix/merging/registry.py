"""The seam of merging: `merge_method`, the lazily read task vectors, and what a method returns.

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

# Entries per chunk: K + 3 arrays of them fit a core's cache of 2 MB, and a call still does work.
_CHUNK = 1 << 16
_CHUNK_GPU = 1 << 24


@dataclass(frozen=True, slots=True)
class PerModel:
    """Marks an option that has one value per model, in the order of the models."""


Scale = Annotated[Number, Field(ge=-1e9, le=1e9)]
"""What entries are multiplied by: bounded far beyond any use, so that fp32 holds it."""
EachScale = Annotated[tuple[Scale, ...], PerModel()]
"""One number per model; a single one serves them all."""
Share = Annotated[Number, Field(ge=0, le=1)]
EachShare = Annotated[tuple[Share, ...], PerModel()]


class Options(RecipeModel):
    """Base of the options of a method: frozen and strict, one field per name in the YAML file."""

    @classmethod
    def per_model(cls) -> frozenset[str]:
        """Return the YAML names of the options that have a value per model."""
        return frozenset(
            field.alias or name
            for name, field in cls.model_fields.items()
            if any(isinstance(mark, PerModel) for mark in field.metadata)
        )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the YAML names of all options."""
        return tuple(field.alias or name for name, field in cls.model_fields.items())


def each(values: Sequence[float], k_tasks: int) -> list[float]:
    """Return one value per task: the values themselves, or the only one repeated."""
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


class FactoredDelta(Sequence[Tensor]):
    """Tensors each of which is made anew when it is asked for, so that few are in memory."""

    @abstractmethod
    def make(self, index: int) -> Tensor:
        """Return the tensor at an index, which is the caller's."""

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self.make(k) for k in range(*index.indices(len(self)))]
        return self.make(index)


class Deltas(FactoredDelta):
    """Task vectors of one parameter, read and converted each time they are asked for.

    An item is a new tensor, so a method may change it in place; nothing is kept between reads.
    `chunk` gives rows of the parameter seen as a matrix (one row when it has one dimension).
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        base: Tensor | Sequence[Tensor | None] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Keep views of what lies on disk.

        Args:
            parts: The K models' tensors (any floating dtype), or their deltas where `base` is None.
            base: What is subtracted from each part: one tensor, or one (or None) per part.
            dtype: The dtype of every item.
            device: Where the items are.
        """
        self._parts = parts
        self._base = [base] * len(parts) if base is None or isinstance(base, Tensor) else base
        self._held: tuple[Tensor, slice, Tensor] | None = None
        self.dtype, self.device = dtype, torch.device(device)
        self.shape = parts[0].shape
        rows = self.shape[0] if len(self.shape) > 1 else 1
        self.matrix_shape = (rows, parts[0].numel() // rows if rows else 0)

    def __len__(self) -> int:
        return len(self._parts)

    def make(self, index: int) -> Tensor:
        """See `FactoredDelta`."""
        return self._read(index, self.new_matrix())

    def in_turn(self) -> Iterator[Tensor]:
        """Yield the deltas to be read, not changed; each lasts until the next is asked for.

        What is not stored as it is asked for goes through one buffer: to be given new memory takes
        longer than to fill it.
        """
        buffer: Tensor | None = None
        for k, (part, base) in enumerate(zip(self._parts, self._base, strict=True)):
            if base is None and part.dtype == self.dtype and part.device == self.device:
                yield part
            else:
                buffer = self.new_matrix() if buffer is None else buffer
                yield self._read(k, buffer)

    def _read(self, k: int, out: Tensor) -> Tensor:
        """Fill `out`, shape `matrix_shape`, with delta k and return it in its own shape."""
        for rows in self.chunks():
            self.chunk(k, rows, out=out[rows])
        return out.view(self.shape)

    def chunks(self) -> Iterator[slice]:
        """Yield ranges of rows that cover the parameter, each some ten thousand entries."""
        rows, columns = self.matrix_shape
        size = _CHUNK if self.device.type == "cpu" else _CHUNK_GPU
        step = max(1, size // max(1, columns))
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step))

    def chunk(self, k: int, rows: slice, out: Tensor | None = None) -> Tensor:
        """Return rows of delta k, shape (rows, columns), in a new tensor or in `out`."""
        stored = self._parts[k].reshape(self.matrix_shape)[rows]
        part = (
            torch.empty_like(stored, dtype=self.dtype, device=self.device) if out is None else out
        )
        # bf16 and fp16 convert exactly, so the difference is that of the stored values.
        part.copy_(stored)
        base = self._base[k]
        return part if base is None else part.sub_(self._base_chunk(base, rows))

    def _base_chunk(self, base: Tensor, rows: slice) -> Tensor:
        """Return rows of the base in the deltas' dtype; those of the last call are at hand."""
        if self._held is None or self._held[0] is not base or self._held[1] != rows:
            stored = base.reshape(self.matrix_shape)[rows]
            self._held = (base, rows, stored.to(self.device, self.dtype))
        return self._held[2]

    def new_matrix(self) -> Tensor:
        """Return an empty result, shape `matrix_shape`."""
        return torch.empty(self.matrix_shape, dtype=self.dtype, device=self.device)

    def unstacked(self) -> Iterator[Deltas]:
        """Yield the deltas of each entry of the first dimension: experts of a stack."""
        for at in range(self.shape[0]):
            base = [None if one is None else one[at] for one in self._base]
            parts = [part[at] for part in self._parts]
            yield Deltas(parts, base, dtype=self.dtype, device=str(self.device))


def as_deltas(deltas: Sequence[Tensor]) -> Deltas:
    """Return `deltas` with the reading interface; plain tensors keep their dtype."""
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
    """What a method made of one parameter, and what there is to say about it."""

    delta: Tensor
    """The merged delta (or the merged weight, of a method without a base)."""
    kept: float | None = None
    """Part of the tasks' entries that survived pruning, where the method prunes."""
    rank: int | None = None
    """Directions kept, where the method decomposes."""


Function = Callable[[Tensor | None, Sequence[Tensor], Any], Tensor | Merged]
_F = TypeVar("_F", bound=Function)
Factored = Callable[[Sequence[Factors], Any], Factors]
WorkingBytes = Callable[[tuple[int, int], int, int, Any], int]
"""Returns about how many bytes K matrices take: of (m, n), K, the bytes per entry, and the
options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeMethod:
    """A registered method and what the engine must know to call it."""

    name: str
    function: Function
    options: type[Options]
    base: str = "required"
    """`required`: works on deltas; `none`: on the models; `optional`: deltas if there is a base;
    `first`: on the models, the base being the first."""
    least: int = 1
    """Fewest models, the base not counted."""
    most: int | None = None
    matrix: bool = False
    """Whether it is for weight matrices; `otherwise` then serves everything else."""
    working_bytes: WorkingBytes | None = None
    """What merging a weight matrix takes at most beside three copies of it, for one that takes
    more."""
    otherwise: Function | None = None
    factored: Factored | None = None
    """The same on factors: what makes LoRA in, LoRA out exact."""
    scale_option: str = "lambda"
    """The option that the whole merged delta is in proportion to, where the method has it."""

    @property
    def scaled_by(self) -> str | None:
        """Return that option, None where the method has none."""
        return self.scale_option if self.scale_option in self.options.names() else None


_METHODS: dict[str, MergeMethod] = {}


def merge_method(name: str, *, options: type[Options], **about: Any) -> Callable[[_F], _F]:
    """Return a decorator that registers `(base, deltas, options) -> delta` under `name`.

    Packages outside raymix name the module of the function in the entry-point group
    `raymix.merge_methods`; it is imported when a file asks for the name.

    Args:
        name: The value of `merge_method` in the YAML file.
        options: Its options, an `Options` subclass.
        **about: Further fields of `MergeMethod`.
    """

    def register(function: _F) -> _F:
        _METHODS[name] = MergeMethod(name=name, function=function, options=options, **about)
        return function

    return register


def known_methods() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    plugins = {point.name for point in metadata.entry_points(group=ENTRY_POINTS)}
    return tuple(sorted({*_METHODS, *plugins}))


def get_method(name: str, path: str = "merge_method") -> MergeMethod:
    """Return the method called `name`.

    Raises:
        MergeError: If there is none; `path` is what the message calls the field.
    """
    if name not in _METHODS:
        for point in metadata.entry_points(group=ENTRY_POINTS, name=name):
            point.load()
    if name not in _METHODS:
        known = known_methods()
        near = did_you_mean(name, known)
        raise MergeError.at(
            path, name, "not a merge method", allowed=f"Known: {', '.join(known)}", fix=near
        )
    return _METHODS[name]
