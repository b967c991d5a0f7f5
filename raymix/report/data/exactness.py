"""Error of the realized mixture: tokens read against tokens requested, and its proved bound.

Shapes: S recorded steps, V entries of the mixture log, D domains. `raymix.sampling.allocate` and
`raymix.sampling.documents` prove the bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymix.errors import CorpusError
from raymix.report.data.read import RunRecord
from raymix.report.data.steps import DomainValues, Floats
from raymix.sampling import realized_error_bound


@dataclass(frozen=True, slots=True, kw_only=True)
class RealizedMixture:
    """Tokens requested of and read from each domain, in total and after each step."""

    asked_D: Floats
    """Tokens requested of each domain over the recorded steps, shape (D,)."""
    read_D: Floats | None
    """Tokens read from each domain, shape (D,); None where a step has no counts."""
    ahead_S: Floats
    """Largest excess of a domain over its due amount after each step, rows or tokens."""
    behind_S: Floats
    """Largest shortfall of a domain after each step, rows or tokens, negative."""
    capped: bool
    """Whether a domain reached its cap (`data.max_epochs`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBound:
    """Proved bound on read minus requested of every domain at every step."""

    ahead: float
    """Largest possible excess, in `unit`."""
    behind: float
    """Largest possible shortfall, in `unit`, negative."""
    unit: str
    """`rows`, or `tokens` for whole documents."""
    because: str
    """The condition that decides which bound applies, in words."""


def realized_mixture(run: RunRecord, asked_SD: Iterator[Floats]) -> RealizedMixture:
    """Return requested and read tokens of a run's recorded steps.

    The *due* amount of a domain is the requested one, except that a domain at its cap
    (`data.max_epochs`) is due what it gave, and the others share the rest.

    Args:
        run: The run.
        asked_SD: Requested shares of each recorded step, shape (D,) each, in order.
    """
    index = {name: at for at, name in enumerate(run.domains)}
    asked_D, due_D, read_D = np.zeros((3, len(index)))
    limit_D = _limits(run)
    before, unit_tokens = 0.0, row_tokens(run) or 1
    ahead: list[float] = []
    behind: list[float] = []
    complete = True
    for counts, tokens, share_D in zip(
        run.steps.counts, run.steps.tokens_S.tolist(), asked_SD, strict=True
    ):
        asked_D += share_D * (tokens - before)
        step_D = _tokens_of(counts, index)
        # The error is cumulative: once a step's counts are missing, it is unknown for good.
        complete = complete and step_D is not None
        if step_D is not None:
            due_D += _due(share_D, tokens - before, step_D, capped_D=read_D + step_D >= limit_D)
            read_D += step_D
        error_D = (read_D - due_D) / unit_tokens
        ahead.append(error_D.max(initial=0.0) if complete else np.nan)
        behind.append(error_D.min(initial=0.0) if complete else np.nan)
        before = tokens
    return RealizedMixture(
        asked_D=asked_D,
        read_D=read_D if complete and len(run.steps) else None,
        ahead_S=np.array(ahead),
        behind_S=np.array(behind),
        capped=bool((read_D >= limit_D).any()),
    )


def _due(share_D: Floats, tokens: float, step_D: Floats, *, capped_D: NDArray[np.bool_]) -> Floats:
    if not capped_D.any():
        return share_D * tokens
    due_D = np.where(capped_D, step_D, 0.0)
    open_D = np.where(capped_D, 0.0, share_D)
    # All domains capped: nothing to divide the (zero) rest by.
    return due_D + open_D / (open_D.sum() or 1.0) * (tokens - due_D.sum())


def _limits(run: RunRecord) -> Floats:
    """Return the token cap of each domain over the run, shape (D,); infinite without a cap."""
    caps = (run.recipe.get("data") or {}).get("max_epochs")
    # Whole rows only: an epoch's last, incomplete row is never read.
    length = row_tokens(run) or 1
    limit_D = np.full(len(run.domains), np.inf)
    if caps is None:
        return limit_D
    for at, name in enumerate(run.domains):
        epochs = caps.get(name) if isinstance(caps, dict) else caps
        usable = usable_tokens(run, name)
        if epochs is not None and usable is not None:
            limit_D[at] = int(epochs * (usable // length)) * length
    return limit_D


def usable_tokens(run: RunRecord, domain: str) -> int | None:
    """Return the tokens that one epoch of a domain reads, None where the corpus is unreadable.

    Packed rows do not straddle blocks, so a block's remainder is not read; documents are cut to
    the sequence length.
    """
    if run.corpus is None or domain not in run.corpus.manifest.domains:
        return None
    tokens, length = run.corpus.split(domain, "train").tokens, row_tokens(run)
    if length is not None:
        # Rows do not straddle blocks: the end of each block that is no whole row is lost.
        full, rest = divmod(tokens, run.corpus.manifest.block_tokens)
        return (full * (run.corpus.manifest.block_tokens // length) + rest // length) * length
    try:
        lengths = run.corpus.document_lengths(domain, "train")
    # The manifest may be at hand where the index of documents, a larger file, is not.
    except CorpusError:
        return None
    longest = (run.recipe.get("data") or {}).get("sequence_length") or np.inf
    return int(np.minimum(lengths, longest).sum(dtype=np.int64))


def _tokens_of(counts: DomainValues | None, index: Mapping[str, int]) -> Floats | None:
    """Return the tokens of one step by domain, shape (D,), None where it has no counts."""
    if counts is None or not index.keys() >= set(counts.names):
        return None
    step_D = np.zeros(len(index))
    step_D[[index[name] for name in counts.names]] = counts.values
    return step_D


def row_tokens(run: RunRecord) -> int | None:
    """Return the tokens of a row, None where a run reads whole documents."""
    data = run.recipe.get("data") or {}
    return data.get("sequence_length") if data.get("mode", "packed") == "packed" else None


def bound(run: RunRecord, shares_VD: NDArray[np.float64], *, capped: bool) -> ErrorBound | None:
    """Return the bound on a run's mixture error, None where its shares are unknown.

    Args:
        run: The run.
        shares_VD: The shares of every entry of the mixture log, shape (V, D).
        capped: Whether a domain reached its cap.
    """
    data = run.recipe.get("data") or {}
    # Without the mixture or the unit nothing is proved.
    if not shares_VD.size or data.get("sequence_length") is None:
        return None
    n_domains = int((shares_VD > 0).any(axis=0).sum())
    fixed = bool(((shares_VD > 0) == (shares_VD[0] > 0)).all())
    unit, longest = ("rows", 1.0) if row_tokens(run) else ("tokens", data["sequence_length"])
    # The tight bound of the allocator holds for a constant support only: a domain that joins or
    # leaves, or stops at its cap, carries its rounding error along.
    if not fixed or capped:
        half = (n_domains - 1) / (2 if unit == "rows" else 1) * longest
        because = f"{n_domains} domains that may come and go"
        return ErrorBound(ahead=half, behind=-half, unit=unit, because=because)
    because = f"{n_domains} domains, always the same"
    if unit == "rows":
        ahead, behind = 1 - 1 / n_domains, -realized_error_bound(n_domains)
    else:
        # A document is read whole, so a domain may exceed its due amount by the longest one.
        ahead = longest
        behind = -longest * (realized_error_bound(n_domains - 1) + 1)
    return ErrorBound(ahead=ahead, behind=behind, unit=unit, because=because)
