"""Planner of whole documents (fine-tuning): a step is a budget of tokens.

The rule is that of `raymix.sampling.allocate`, with documents in place of rows: the domain with
the largest carry gives its next document, of l tokens; its carry falls by l and every carry rises
by l times its share. So carries sum to zero after each document, and where a step ends (once its
budget is met) changes nothing in what follows.

Bounds, with L the longest document: -L < c_d, since the largest of carries that sum to zero is
>= 0 and loses less than L. Above, while all D domains stay in use, c_d <= L H_{D-1}: let S_k be
the largest mean of k carries and K the k largest after a document from d. If d is in K the sum
over K did not grow. Else, with l <= L, mean(K) rose by l q(K) / k and was at most d's carry
before, so c_d >= mean(K) - l (1 - q_d + q(K) / k) >= mean(K) - L (1 + 1/k); the sum over K and d
did not grow, so mean(K) <= S_{k+1}(before) + L / k, and S_k <= L (1/k + ... + 1/(D-1)) follows by
induction from S_D = 0. When domains leave and return at will, |c_d| <= L (D - 1): the parabola
argument of `allocate` with second difference -2 L.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymix.errors import CorpusError, format_problem
from raymix.sampling.allocate import NO_LIMIT
from raymix.sampling.mixture_log import MixtureLog
from raymix.sampling.order import CorpusOrder, DomainOrder
from raymix.sampling.planner_state import dump_state, load_state
from raymix.sampling.shares import SHARE_BITS, Ints, fixed_point, restricted

# Documents located per call: per domain, and over all domains. A call costs some microseconds
# however many it locates.
_LOOKUP_DOCUMENTS = 512
_LOOKUP_DOCUMENTS_IN_ALL = 1 << 17


@dataclass(frozen=True, slots=True)
class DocumentStep:
    """The documents of one step, in order; N documents."""

    step: int
    version: int
    """Version of the log entry the step follows."""
    domain_N: NDArray[np.int32]
    index_N: Ints
    """How many documents of its domain came before."""
    document_N: Ints
    """Position of the document in its domain's stream."""
    length_N: Ints
    """Tokens, truncated to the sequence length."""


@dataclass(slots=True)
class _Draft:
    """A step while it is planned; the planner's state changes only once it is complete."""

    carry_D: Ints
    count_D: Ints
    picked: list[tuple[int, int, int, int]] = field(default_factory=list)
    tokens: int = 0


class DocumentPlanner:
    """Plans steps of whole documents in order; the counterpart of `PackedPlanner`.

    Args of the constructor:
        order: Orders of the domains; units are documents.
        lengths: Tokens of each document in stream order, one array per domain.
        sequence_length: Longer documents are cut here.
        tokens_per_step: A step ends with the document that reaches this.
        log: Read, never written; may grow between calls.
        limit_D: Most documents of each domain over the run, shape (D,).
    """

    def __init__(
        self,
        *,
        order: CorpusOrder,
        lengths: Sequence[NDArray[np.unsignedinteger[Any]]],
        sequence_length: int,
        tokens_per_step: int,
        log: MixtureLog,
        limit_D: Ints | None = None,
    ) -> None:
        n_domains = len(lengths)
        self.step = 0
        self.log = log
        self.carry_D = np.zeros(n_domains, dtype=np.int64)
        self.count_D = np.zeros(n_domains, dtype=np.int64)
        # Limits as a number, so that the loop needs no case for None.
        self._limit_D = np.full(n_domains, NO_LIMIT) if limit_D is None else np.array(limit_D)
        self._tokens = tokens_per_step
        self.bits = carry_bits(sequence_length, n_domains)
        lookup = min(_LOOKUP_DOCUMENTS, max(8, _LOOKUP_DOCUMENTS_IN_ALL // n_domains))
        self._lookup = [
            _DocumentLookup(
                order.of(domain), lengths[domain], max_tokens=sequence_length, count=lookup
            )
            for domain in range(n_domains)
        ]
        self._shares: tuple[tuple[float, ...], Ints] | None = None

    def plan(self, n_steps: int) -> list[DocumentStep]:
        """Return the next `n_steps` steps and advance beyond them.

        Raises:
            CorpusError: If the limits leave no document for a step.
        """
        return [self._plan_one() for _ in range(n_steps)]

    def state_dict(self) -> dict[str, Any]:
        """Return {step, carry, count} in JSON types: everything that resuming needs."""
        return dump_state(self.step, self.carry_D, self.count_D)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: If it belongs to another number of domains.
        """
        self.step, self.carry_D, self.count_D = load_state(state, self.count_D.size)

    def _plan_one(self) -> DocumentStep:
        entry = self.log.at(self.step)
        q_D = self._fixed(entry.weights)
        draft = _Draft(self.carry_D.copy(), self.count_D.copy())
        while draft.tokens < self._tokens:
            # Checked per document: a limit may be reached in the middle of a step.
            open_q_D = q_D
            if (draft.count_D[q_D > 0] >= self._limit_D[q_D > 0]).any():
                open_q_D = restricted(q_D, draft.count_D < self._limit_D)
            active = np.flatnonzero(open_q_D)
            if not active.size:
                raise CorpusError(self._exhausted())
            self._pick(draft, active, open_q_D[active])
        self.carry_D, self.count_D = draft.carry_D, draft.count_D
        self.step += 1
        domain_N, index_N, document_N, length_N = np.array(draft.picked, dtype=np.int64).T
        return DocumentStep(
            self.step - 1,
            entry.version,
            domain_N.astype(np.int32),
            index_N,
            document_N,
            length_N,
        )

    def _pick(self, draft: _Draft, active: Ints, q_A: Ints) -> None:
        """Pick until the budget is met or a domain reaches its limit."""
        carry_A = draft.carry_D[active]
        domains, count_A = active.tolist(), draft.count_D[active].tolist()
        limit_A = self._limit_D[active].tolist()
        while draft.tokens < self._tokens:
            # argmax takes the first of equal carries, the same on every platform.
            at = int(carry_A.argmax())
            domain, index = domains[at], count_A[at]
            document, length = self._lookup[domain].at(index)
            draft.picked.append((domain, index, document, length))
            draft.tokens += length
            carry_A += length * q_A
            carry_A[at] -= length << self.bits
            count_A[at] = index + 1
            # The shares of the others change here, so the caller works them out again.
            if index + 1 == limit_A[at]:
                break
        draft.carry_D[active] = carry_A
        draft.count_D[active] = count_A

    def _fixed(self, weights: tuple[float, ...]) -> Ints:
        if self._shares is None or self._shares[0] is not weights:
            self._shares = weights, fixed_point(weights, bits=self.bits)
        return self._shares[1]

    def _exhausted(self) -> str:
        return format_problem(
            "step",
            self.step,
            (
                f"the domains with a share have reached their limits and cannot fill a batch of "
                f"{self._tokens} tokens"
            ),
            fix="Raise data.max_epochs, train fewer tokens, or give other domains a share",
        )


def carry_bits(sequence_length: int, n_domains: int) -> int:
    """Return the binary digits after the point of the carries of whole documents."""
    # |carry| < sequence_length * D must fit 62 bits; see the bounds above.
    return min(SHARE_BITS, 62 - (sequence_length * n_domains).bit_length())


class _DocumentLookup:
    """Locates a domain's next documents, some hundreds per call."""

    def __init__(
        self,
        order: DomainOrder,
        lengths: NDArray[np.unsignedinteger[Any]],
        *,
        max_tokens: int,
        count: int,
    ) -> None:
        self._order = order
        self._lengths = lengths
        self._max_tokens = max_tokens
        self._count = count
        self._first = 0
        self._documents: list[int] = []
        self._tokens: list[int] = []

    def at(self, index: int) -> tuple[int, int]:
        """Return document and tokens of the `index`-th sample of the domain."""
        if not 0 <= index - self._first < len(self._documents):
            self._fetch(index)
        return self._documents[index - self._first], self._tokens[index - self._first]

    def _fetch(self, index: int) -> None:
        _, group, unit = self._order.locate(np.arange(index, index + self._count))
        documents = group * self._order.geometry.group_units + unit
        # An empty document counts as one token: a budget of tokens must end.
        tokens = np.clip(self._lengths[documents].astype(np.int64), 1, self._max_tokens)
        self._first, self._documents, self._tokens = index, documents.tolist(), tokens.tolist()
