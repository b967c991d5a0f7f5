"""How closely what was read followed what was asked, against the bound that is proved.

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
from raymix.report.data.steps import Counts, Floats
from raymix.sampling import realised_error_bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What was asked of each domain and what it gave, in tokens, at the end and on the way."""

    asked_D: Floats
    """Tokens asked of each domain over the recorded steps, shape (D,)."""
    read_D: Floats | None
    """Tokens read from each domain, shape (D,); None where no step says so."""
    ahead_S: Floats
    """Most units by which a domain was ahead of what was due, after each step."""
    behind_S: Floats
    """Most units by which a domain was behind, after each step, as a negative number."""
    capped: bool
    """A domain reached its cap (`data.max_epochs`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What is proved of the difference between read and asked, in units, at every step."""

    ahead: float
    behind: float
    """Negative."""
    unit: str
    """`rows`, or `tokens` for whole documents."""
    because: str
    """Why this bound and no tighter one."""


def account(run: RunRecord, asked_SD: Iterator[Floats]) -> Account:
    """Return the account of a run's recorded steps.

    What is *due* is what was asked, except that a domain at its cap (`data.max_epochs`) is due
    what it gave, and the others share the rest.

    Args:
        run: The run.
        asked_SD: The shares asked in each recorded step, shape (D,) each, in order.
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
        complete = complete and step_D is not None
        if step_D is not None:
            due_D += _due(share_D, tokens - before, step_D, capped_D=read_D + step_D >= limit_D)
            read_D += step_D
        error_D = (read_D - due_D) / unit_tokens
        ahead.append(error_D.max(initial=0.0) if complete else np.nan)
        behind.append(error_D.min(initial=0.0) if complete else np.nan)
        before = tokens
    return Account(
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
    return due_D + open_D / (open_D.sum() or 1.0) * (tokens - due_D.sum())


def _limits(run: RunRecord) -> Floats:
    """Return the most tokens of each domain over the run, shape (D,); infinite without a cap."""
    caps = (run.recipe.get("data") or {}).get("max_epochs")
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
    """Return the tokens that one pass over a domain reads, None where the corpus is out of reach.

    They are those of whole rows, which straddle no block, or of documents cut to length.
    """
    if run.corpus is None or domain not in run.corpus.manifest.domains:
        return None
    tokens, length = run.corpus.split(domain, "train").tokens, row_tokens(run)
    if length is not None:
        full, rest = divmod(tokens, run.corpus.manifest.block_tokens)
        return (full * (run.corpus.manifest.block_tokens // length) + rest // length) * length
    try:
        lengths = run.corpus.document_lengths(domain, "train")
    except CorpusError:
        return None
    longest = (run.recipe.get("data") or {}).get("sequence_length", np.inf)
    return int(np.minimum(lengths, longest).sum(dtype=np.int64))


def _tokens_of(counts: Counts | None, index: Mapping[str, int]) -> Floats | None:
    """Return the tokens of one step by domain, shape (D,), None where the step does not say."""
    if counts is None or not index.keys() >= set(counts.names):
        return None
    step_D = np.zeros(len(index))
    step_D[[index[name] for name in counts.names]] = counts.tokens
    return step_D


def row_tokens(run: RunRecord) -> int | None:
    """Return the tokens of a row, None where a run reads whole documents."""
    data = run.recipe.get("data") or {}
    return data.get("sequence_length") if data.get("mode", "packed") == "packed" else None


def bound(run: RunRecord, shares_VD: NDArray[np.float64], *, capped: bool) -> Bound | None:
    """Return the bound that holds for a run, None where nothing is known of its shares.

    Args:
        run: The run.
        shares_VD: The shares of every entry of the mixture log, shape (V, D).
        capped: Whether a domain reached its cap.
    """
    data = run.recipe.get("data") or {}
    if not shares_VD.size or "sequence_length" not in data:
        return None
    n_domains = int((shares_VD > 0).any(axis=0).sum())
    fixed = bool(((shares_VD > 0) == (shares_VD[0] > 0)).all())
    unit, longest = ("rows", 1.0) if row_tokens(run) else ("tokens", data["sequence_length"])
    if not fixed or capped:
        half = (n_domains - 1) / (2 if unit == "rows" else 1) * longest
        because = f"{n_domains} domains that may come and go"
        return Bound(ahead=half, behind=-half, unit=unit, because=because)
    because = f"{n_domains} domains, always the same"
    if unit == "rows":
        ahead, behind = 1 - 1 / n_domains, -realised_error_bound(n_domains)
    else:
        ahead = longest
        behind = -longest * (realised_error_bound(n_domains - 1) + 1)
    return Bound(ahead=ahead, behind=behind, unit=unit, because=because)
