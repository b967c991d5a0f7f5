"""Labels of whole documents: all tokens but the first, or the tokens of a loss mask.

Letters: N documents of a step, L tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raymix.sampling import DocumentStep
from raymix.store import Corpus, LossMask
from raymix.streaming.blocks.block_batch import Ints


class DocumentLabels:
    """The labels of documents of the train split.

    Args of the constructor:
        corpus: The prepared corpus; only its index is read.
        lengths: Tokens of the documents of each domain, in corpus order.

    Raises:
        CorpusError: If the index is missing or corrupt.
    """

    def __init__(self, corpus: Corpus, lengths: Sequence[npt.NDArray[np.uint32]]) -> None:
        # By domain, its loss mask and the offset of each document in the domain's tokens.
        self._loss_mask: dict[int, tuple[LossMask, Ints]] = {}
        for domain, name in enumerate(corpus.domain_names):
            loss_mask = corpus.loss_mask(name, "train")
            if loss_mask is not None:
                # int64 first: sums of lengths exceed 32 bits.
                length_N = lengths[domain].astype(np.int64)
                self._loss_mask[domain] = loss_mask, np.cumsum(length_N) - length_N

    def count(self, step: DocumentStep) -> int:
        """Return the labels of all documents of a step, as far as they are read."""
        unmasked_N = np.ones(len(step.length_N), dtype=np.bool_)
        labels = 0
        for domain, (loss_mask, offset_N) in self._loss_mask.items():
            domain_N = step.domain_N == domain
            first_N = offset_N[step.document_N[domain_N]]
            labels += int(loss_mask.count(first_N, first_N + step.length_N[domain_N]).sum())
            unmasked_N &= ~domain_N
        # The first token of a document has no predecessor that could predict it.
        return labels + int((step.length_N[unmasked_N] - 1).sum())

    def mask(self, domain: int, document: int, length: int) -> npt.NDArray[np.bool_] | None:
        """Return which of the first `length` tokens of a document are labels, shape (L,).

        None: all but the first.
        """
        if domain not in self._loss_mask:
            return None
        loss_mask, offset_N = self._loss_mask[domain]
        first = int(offset_N[document])
        return loss_mask.mask(first, first + length)
