"""Geometry of a prepared corpus: blocks, and samples in them (rows of equal length, or documents).

Blocks are numbered across domains, domain after domain: the *global block number*.
Letters: D domains, G blocks of all domains.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from raymix.errors import CorpusError, RecipeError, did_you_mean, format_problem
from raymix.recipe import DocumentData, PackedData
from raymix.sampling import NO_LIMIT, DomainGeometry
from raymix.store import Corpus, Split

Ints = npt.NDArray[np.int64]

GROUP_DOCUMENTS = 1024
"""Documents per group in document mode: the unit that is shuffled, as blocks are in packed mode."""


class BlockNumbers:
    """The global numbers of a split's blocks.

    Attributes:
        first_D: Number of each domain's first block, then G: shape (D + 1,).
        total: Number of blocks, G.
    """

    def __init__(self, corpus: Corpus, split: Split = "train") -> None:
        blocks = [corpus.split(name, split).blocks for name in corpus.domain_names]
        self.first_D = np.concatenate([[0], np.cumsum(blocks, dtype=np.int64)])
        self.total = int(self.first_D[-1])
        # A list: bisect on Python integers is faster for single look-ups than numpy.
        self._first: list[int] = self.first_D.tolist()
        self._names = corpus.domain_names
        self._tokens = [corpus.split(name, split).tokens for name in corpus.domain_names]
        self._block_tokens = corpus.manifest.block_tokens

    def domain(self, number: int) -> int:
        """Return the index of the domain of a block."""
        return bisect_right(self._first, number) - 1

    def locate(self, number: int) -> tuple[str, int]:
        """Return the domain's name and the index of the block in it."""
        domain = self.domain(number)
        return self._names[domain], number - self._first[domain]

    def tokens(self, number: int) -> int:
        """Return the number of tokens in a block."""
        # All blocks of a domain are full but its last.
        domain = self.domain(number)
        before = (number - self._first[domain]) * self._block_tokens
        return min(self._block_tokens, self._tokens[domain] - before)

    @property
    def total_tokens(self) -> int:
        """Return the number of tokens in all blocks."""
        return sum(self._tokens)


def row_geometry(
    corpus: Corpus, sequence_length: int, split: Split = "train", *, allow_empty: bool = False
) -> list[DomainGeometry]:
    """Return the rows of each domain and the rows per block; rows do not straddle blocks.

    Tokens at the end of a block that do not fill a row are left out.

    Args:
        corpus: The corpus.
        sequence_length: Tokens per row.
        split: Split to read.
        allow_empty: Allow a domain without a whole row: it has one on paper, which
            `sample_limits` says is never read.

    Raises:
        RecipeError: If a row is longer than a block.
        CorpusError: If a domain has no whole row.
    """
    block_tokens = corpus.manifest.block_tokens
    rows_per_block = block_tokens // sequence_length
    if rows_per_block == 0:
        raise RecipeError.at(
            "data.sequence_length",
            sequence_length,
            f"longer than a block of the corpus, {block_tokens} tokens",
            fix="Shorten it, or prepare the corpus with a larger corpus.block_tokens",
        )
    geometries = []
    for name in corpus.domain_names:
        rows = epoch_rows(corpus.split(name, split).tokens, block_tokens, sequence_length)
        geometries.append(DomainGeometry(name, rows or int(allow_empty), rows_per_block))
    return geometries


def empty_domains(corpus: Corpus, data: PackedData | DocumentData) -> tuple[str, ...]:
    """Return the domains without a sample to train on: a whole row, or a document."""
    if isinstance(data, DocumentData):
        sizes = {name: corpus.split(name, "train").documents for name in corpus.domain_names}
    else:
        block_tokens = corpus.manifest.block_tokens
        sizes = {
            name: epoch_rows(corpus.split(name, "train").tokens, block_tokens, data.sequence_length)
            for name in corpus.domain_names
        }
    return tuple(name for name, size in sizes.items() if size == 0)


def sample_limits(
    corpus: Corpus, data: PackedData | DocumentData, geometries: list[DomainGeometry]
) -> Ints | None:
    """Return the maximum samples of each domain, shape (D,); None where no domain has a limit.

    By `data.max_epochs`, and 0 for a domain without a sample.

    Raises:
        RecipeError: If `data.max_epochs` names a domain that does not exist.
    """
    limit_D = epoch_limits(geometries, data.max_epochs)
    empty = set(empty_domains(corpus, data))
    if not empty:
        return limit_D
    if limit_D is None:
        limit_D = np.full(len(geometries), NO_LIMIT, dtype=np.int64)
    return np.where([geometry.name in empty for geometry in geometries], 0, limit_D)


class ReadableShares:
    """The check that no domain without a sample has a share, unless others are to take it over.

    Args of the constructor:
        corpus: The corpus.
        data: The recipe's `data` section.
    """

    def __init__(self, corpus: Corpus, data: PackedData | DocumentData) -> None:
        skipped = isinstance(data, PackedData) and data.skip_empty
        names = () if skipped else empty_domains(corpus, data)
        self._empty = [(corpus.domain_names.index(name), name) for name in names]

    def check(self, weights: Sequence[float]) -> None:
        """Raise CorpusError if a domain without a sample has a share; `weights` are of all."""
        for at, name in self._empty:
            if weights[at] > 0:
                raise CorpusError.at(
                    f"corpus.{name}",
                    weights[at],
                    "the domain has this share, and no samples: no whole row, or no document",
                    fix="Give it more text or a share of 0, shorten data.sequence_length, or set "
                    "data.skip_empty: true",
                )


def epoch_rows(tokens: int, block_tokens: int, sequence_length: int) -> int:
    """Return the rows of one epoch; the rest of each block, less than a row, is not read."""
    full, tail = divmod(tokens, block_tokens)
    return full * (block_tokens // sequence_length) + tail // sequence_length


def document_geometry(
    corpus: Corpus, split: Split = "train", *, allow_empty: bool = False
) -> list[DomainGeometry]:
    """Return the documents of each domain and the documents per group of consecutive ones.

    Args:
        corpus: The corpus.
        split: Split to read.
        allow_empty: Allow a domain without a document: it has one on paper, which `sample_limits`
            says is never read.

    Raises:
        CorpusError: If a domain has no document.
    """
    return [
        DomainGeometry(
            name, corpus.split(name, split).documents or int(allow_empty), GROUP_DOCUMENTS
        )
        for name in corpus.domain_names
    ]


def epoch_limits(
    geometries: list[DomainGeometry], max_epochs: float | Mapping[str, float] | None
) -> Ints | None:
    """Return the maximum samples of each domain, shape (D,), by `data.max_epochs`; None: no limit.

    Raises:
        RecipeError: If it names a domain that does not exist.
    """
    if max_epochs is None:
        return None
    names = [geometry.name for geometry in geometries]
    if isinstance(max_epochs, Mapping):
        unknown = [name for name in max_epochs if name not in names]
        # All wrong names in one error, so that one edit mends the recipe.
        if unknown:
            raise RecipeError(
                *(
                    format_problem(
                        f"data.max_epochs.{name}",
                        max_epochs[name],
                        "the corpus has no such domain",
                        fix=did_you_mean(name, names),
                    )
                    for name in unknown
                )
            )
    limits = []
    for geometry in geometries:
        epochs = max_epochs.get(geometry.name) if isinstance(max_epochs, Mapping) else max_epochs
        limits.append(NO_LIMIT if epochs is None else int(epochs * geometry.units))
    return np.array(limits, dtype=np.int64)
