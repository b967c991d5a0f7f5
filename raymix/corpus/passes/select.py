"""The second pass, domain by domain: which documents stay, and in which split.

Duplicates are found by hash, the first in source order stays. Where no held-out files are given,
a document is held out when its hash is below `valid_fraction` of the hash space, so it does not
depend on the other documents or on their order; only a domain so small that one split came out
empty gets its nearest document moved, since a domain without held-out text cannot be evaluated.

Memory: 2 bytes per document of the domain, plus that of one bucket of 8 million hashes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from raymix._utils.json import parse_json
from raymix.corpus.passes.tokenize import DOCUMENT, part_base
from raymix.corpus.read.parts import HeldOut
from raymix.store import SPLITS, Split, atomic_write_text
from raymix.store.columns import write_lengths
from raymix.store.loss_mask import LOSS_MASK_FILE, write_loss_mask
from raymix.store.remote import files

DROPPED, TRAIN, VALID = 0, 1, 2
CODES: dict[Split, int] = {"train": TRAIN, "valid": VALID}
"""Split of a document, one byte each in `part-N.splits`."""

_BUCKET_DOCUMENTS = 1 << 23
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}

Hashes = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SelectJob:
    """Input of the selection of one domain.

    `held_out` and `documents` are per part; `key` stands for the content of all of them.
    """

    domain: str
    held_out: tuple[HeldOut, ...]
    documents: tuple[int, ...]
    valid_fraction: float
    deduplicate: bool
    corpus: str
    work: str
    key: str
    answers: bool = False
    """True where only the assistant's answers are in the loss."""


@dataclass(frozen=True)
class SplitSelection:
    """Content of a split; `part_tokens` are the tokens that each part contributes.

    `loss_mask` is the hash of the loss mask's file and `loss_tokens` the number of tokens in the
    loss; None where every token but the first of each document is.
    """

    documents: int
    tokens: int
    bytes: int
    part_tokens: list[int]
    length_quantiles: dict[str, int]
    length_histogram: dict[str, int]
    loss_mask: str | None
    loss_tokens: int | None


@dataclass(frozen=True)
class Selection:
    """The documents of a domain that stay, by split."""

    key: str
    duplicates: int
    train: SplitSelection
    valid: SplitSelection


def select_documents(job: SelectJob) -> Selection:
    """Return what stays of a domain, having written each part's `splits` and the lengths.

    Raises:
        CorpusError: If the disk is full.
    """
    codes, duplicates = _codes(job)
    train, valid = (_write_split(job, split, codes) for split in SPLITS)
    for number, part_codes in enumerate(codes):
        base = part_base(job.work, job.domain, number)
        files.atomic_write_bytes(base + ".splits", part_codes.tobytes())
    selection = Selection(job.key, duplicates, train, valid)
    atomic_write_text(_marker(job), json.dumps(asdict(selection)))
    return selection


def _marker(job: SelectJob) -> str:
    return files.join(job.work, job.domain, "selection.json")


def finished_selection(job: SelectJob) -> Selection | None:
    """Return the selection that was made before, or None if it must be made."""
    try:
        stored = parse_json(files.read_bytes(_marker(job)))
    except (FileNotFoundError, ValueError):
        return None
    if stored["key"] != job.key:
        return None
    train, valid = (SplitSelection(**stored[split]) for split in SPLITS)
    return Selection(job.key, stored["duplicates"], train, valid)


def read_documents(work: str, domain: str, number: int) -> npt.NDArray[np.void]:
    """Return the `DOCUMENT` records of a part, shape (documents,)."""
    raw = files.read_bytes(part_base(work, domain, number) + ".documents")
    return np.frombuffer(raw, dtype=DOCUMENT)


def _codes(job: SelectJob) -> tuple[list[Codes], int]:
    """Return the split codes of each part's documents, and the number of duplicates."""

    def load(number: int) -> Hashes:
        return read_documents(job.work, job.domain, number)["hash"]

    edges = np.cumsum([0, *job.documents])
    is_first = first_of_each(load, job.documents) if job.deduplicate else np.ones(edges[-1], bool)
    # One byte per document: a domain of a billion documents takes 1 GB.
    codes = np.where(is_first, np.uint8(TRAIN), np.uint8(DROPPED))
    parts = np.split(codes, edges[1:-1])
    for number, (held_out, part) in enumerate(zip(job.held_out, parts, strict=True)):
        if held_out == "by hash":
            part[is_held_out(load(number), job.valid_fraction) & (part == TRAIN)] = VALID
        elif held_out == "yes":
            part[part == TRAIN] = VALID
    # Files named as held out are the user's choice, even if a split is empty.
    if "by hash" in job.held_out:
        _fill_empty_split(parts, load)
    return parts, int(np.count_nonzero(~is_first))


def is_held_out(hashes: Hashes, fraction: float) -> npt.NDArray[np.bool_]:
    """Return which documents are held out, by their hashes (N, 2) alone; shape (N,)."""
    return hashes[:, 0] < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


def first_of_each(
    load: Callable[[int], Hashes], documents: Sequence[int], *, bucket: int = _BUCKET_DOCUMENTS
) -> npt.NDArray[np.bool_]:
    """Return which documents are the first with their hash, shape (documents of all parts,).

    Args:
        load: Returns the hashes of a part's documents, shape (N, 2); called once per bucket.
        documents: Documents of each part, in source order.
        bucket: Hashes to compare at a time, about; bounds the memory.
    """
    starts = np.cumsum([0, *documents])
    is_first = np.ones(starts[-1], dtype=bool)
    # A hash falls in the same bucket wherever it occurs, so each bucket is decided on its own and
    # only one has to fit in memory; the price is reading every part once per bucket.
    buckets = -(-int(starts[-1]) // bucket)
    for number in range(buckets):
        hashes: list[Hashes] = []
        positions: list[npt.NDArray[np.int64]] = []
        for part, start in enumerate(starts[:-1]):
            part_hashes = load(part)
            # By the second word: the first decides the split, and is not uniform within one.
            rows = np.flatnonzero(part_hashes[:, 1] % np.uint64(buckets) == number)
            hashes.append(part_hashes[rows])
            positions.append(rows + start)
        is_first[_repeated(np.concatenate(hashes), np.concatenate(positions))] = False
    return is_first


def _repeated(hashes: Hashes, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the places of documents whose hash came before; `places` ascend."""
    order = np.lexsort((hashes[:, 0], hashes[:, 1]))  # stable: equal hashes stay in order
    ordered = hashes[order]
    return positions[order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]]


def _fill_empty_split(parts: Sequence[Codes], load: Callable[[int], Hashes]) -> None:
    """Move one document where all that stay are in one split: the one nearest to the border."""
    counts = np.sum([np.bincount(part, minlength=3) for part in parts], axis=0)
    if counts[TRAIN] and counts[VALID]:
        return
    full, empty = (TRAIN, VALID) if counts[TRAIN] else (VALID, TRAIN)
    # With one document to train on, none can be spared for evaluation.
    if counts[full] < 2 and full == TRAIN:
        return
    # Nearest to the border: a slightly different `valid_fraction` would have moved it as well.
    pick, nearest_of = (np.argmin, min) if full == TRAIN else (np.argmax, max)
    nearest: list[tuple[int, int, int]] = []
    for number, part in enumerate(parts):
        rows = np.flatnonzero(part == full)
        if len(rows):
            part_hashes = load(number)[rows, 0]
            row = int(pick(part_hashes))
            nearest.append((int(part_hashes[row]), number, int(rows[row])))
    if nearest:
        _, number, row = nearest_of(nearest)
        parts[number][row] = empty


def _write_split(job: SelectJob, split: Split, codes: Sequence[Codes]) -> SplitSelection:
    lengths: Counter[int] = Counter()
    part_tokens: list[int] = []
    size = 0

    def pieces() -> Iterator[npt.NDArray[np.uint32]]:
        nonlocal size
        for number, part_codes in enumerate(codes):
            selected = read_documents(job.work, job.domain, number)[part_codes == CODES[split]]
            values, counts = np.unique(selected["tokens"], return_counts=True)
            lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            part_tokens.append(int(selected["tokens"].sum(dtype=np.int64)))
            size += int(selected["bytes"].sum(dtype=np.int64))
            yield selected["tokens"]

    directory = files.join(job.corpus, job.domain, split)
    write_lengths(files.join(directory, "documents.arrow"), pieces())
    loss_mask, loss_tokens = _write_split_loss_mask(job, split, codes, directory)
    return SplitSelection(
        documents=lengths.total(),
        tokens=sum(part_tokens),
        bytes=size,
        part_tokens=part_tokens,
        length_quantiles=length_quantiles(lengths),
        length_histogram=length_histogram(lengths),
        loss_mask=loss_mask,
        loss_tokens=loss_tokens,
    )


def _write_split_loss_mask(
    job: SelectJob, split: Split, codes: Sequence[Codes], directory: str
) -> tuple[str | None, int | None]:
    """Write the loss mask of a split; return the file's hash and the tokens in the loss."""
    if not job.answers:
        return None, None
    before = loss_tokens = 0

    def pieces() -> Iterator[npt.NDArray[np.int64]]:
        nonlocal before, loss_tokens
        for number, part_codes in enumerate(codes):
            documents = read_documents(job.work, job.domain, number)
            selected_N = part_codes == CODES[split]
            raw = files.read_bytes(part_base(job.work, job.domain, number) + ".edges")
            edge_E = np.frombuffer(raw, "<u4").astype(np.int64)
            selected_E = np.repeat(selected_N, 2 * documents["spans"])
            length_N = np.where(selected_N, documents["tokens"], 0).astype(np.int64)
            start_N = before + np.cumsum(length_N) - length_N
            edges = (edge_E + np.repeat(start_N, 2 * documents["spans"]))[selected_E]
            before += int(length_N.sum())
            loss_tokens += int((edges[1::2] - edges[::2]).sum())
            yield edges

    return write_loss_mask(files.join(directory, LOSS_MASK_FILE), pieces()), loss_tokens


def length_quantiles(lengths: Counter[int]) -> dict[str, int]:
    """Return the quantiles of document lengths; the q-th is the least length that covers q."""
    if not lengths:
        return {}
    values = np.array(sorted(lengths))
    covered = np.cumsum([lengths[value] for value in values.tolist()])
    places = {name: np.searchsorted(covered, q * covered[-1]) for name, q in _QUANTILES.items()}
    return {name: int(values[place]) for name, place in places.items()}


def length_histogram(lengths: Counter[int]) -> dict[str, int]:
    """Return documents per power-of-two bin; the key is the bin's lower end, in tokens."""
    bins: Counter[int] = Counter()
    for value, count in lengths.items():
        bins[1 << max(value.bit_length() - 1, 0)] += count
    return {str(low): bins[low] for low in sorted(bins)}
