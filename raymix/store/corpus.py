"""Reading a prepared corpus: cheap to open, picklable, without Ray."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymix.errors import CorpusError, did_you_mean
from raymix.store.block import Block
from raymix.store.columns import read_lengths
from raymix.store.formats.blocks import TokenFileBlocks
from raymix.store.loss_mask import LOSS_MASK_FILE, LossMask, read_loss_mask
from raymix.store.manifest import Manifest, SplitInfo, corpus_fingerprint, read_manifest
from raymix.store.remote import files
from raymix.store.remote.errors import is_remote, storage_errors, with_retries
from raymix.store.shard import ShardReader

# Mapped shards kept open: below the usual limit of 1,024 open files, with several per process.
_OPEN_SHARDS = 64

_Result = TypeVar("_Result")


class Corpus:
    """A prepared corpus, opened for reading.

    Safe to share between threads. Pickles as its path, so another process opens it anew.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        """Stand for the corpus at `path`; use `Corpus.open`, which reads the manifest."""
        self.path = path
        self._remote = is_remote(path)  # retries are for stores: a local error stays
        self.manifest = manifest
        self.domain_names: tuple[str, ...] = tuple(manifest.domains)
        self._ends: dict[tuple[str, str], npt.NDArray[np.int64]] = {}
        self._loss_mask: dict[tuple[str, str], LossMask] = {}
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()
        self._token_files = TokenFileBlocks(path, manifest) if manifest.in_place else None
        # Ranks, the evaluator and the probe read from threads of one process.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str) -> Corpus:
        """Return the prepared corpus at `path`, a directory or any fsspec URL.

        Raises:
            CorpusError: If it is absent, incomplete, damaged, or of a newer format.
        """
        return cls(str(path), read_manifest(str(path)))

    def __reduce__(self) -> tuple[Callable[[str], Corpus], tuple[str]]:
        # Mapped files and locks cannot be pickled; a manifest is cheaper to read than to send to
        # each rank.
        return Corpus.open, (self.path,)

    @property
    def fingerprint(self) -> str:
        """Return the hash that stands for the content."""
        return self.manifest.fingerprint

    def domain_fingerprints(self) -> dict[str, str]:
        """Return a hash of each domain's content, its tokenizer and blocks; by name."""
        manifest = self.manifest
        return {
            name: corpus_fingerprint(manifest.tokenizer, manifest.block_tokens, {name: info})
            for name, info in manifest.domains.items()
        }

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Return the type of a token id: uint16 or uint32."""
        return self.manifest.dtype

    @property
    def tokenizer_path(self) -> str:
        """Return the directory that `AutoTokenizer.from_pretrained` loads."""
        return files.join(self.path, "tokenizer")

    def split(self, domain: str, split: str) -> SplitInfo:
        """Return the description of `train` or `valid` of a domain.

        Raises:
            CorpusError: If the corpus has no such domain or split.
        """
        if domain not in self.manifest.domains:
            known = ", ".join(self.domain_names)
            raise CorpusError.at(
                "domain",
                domain,
                "not in the corpus",
                allowed=f"it holds: {known}",
                fix=did_you_mean(domain, self.domain_names),
            )
        if split not in ("train", "valid"):
            raise CorpusError.at("split", split, "not a split", allowed="allowed: train, valid")
        info = self.manifest.domains[domain]
        return info.train if split == "train" else info.valid

    def shard_of(self, domain: str, split: str, block: int) -> tuple[str, int]:
        """Return the shard (path under the corpus directory) of a block and the row in it.

        Raises:
            CorpusError: If the split has no such block.
        """
        info = self.split(domain, split)
        self._check_number(domain, split, block)
        ends = self._ends.get((domain, split))
        if ends is None:
            # Computed on first use: with 10,000 domains most splits are never read by a rank.
            ends = np.cumsum([shard.blocks for shard in info.shards], dtype=np.int64)
            self._ends[domain, split] = ends
        shard = int(np.searchsorted(ends, block, side="right"))
        return info.shards[shard].file, block - int(ends[shard - 1] if shard else 0)

    def read_block(self, domain: str, split: str, block: int) -> Block:
        """Return one block; its arrays are views of the mapped file where that is local.

        Raises:
            CorpusError: If there is no such block, or the file is missing, corrupt or changed; the
                message names it.
        """
        if self._token_files is not None:
            self._check_number(domain, split, block)
            return self._token_files.read_block(domain, self.split(domain, split), block)
        file, row = self.shard_of(domain, split, block)
        content = self._guarded(file, row, lambda: self._read(file, row))
        # The checksum shows that the block is intact, this that it is the one meant.
        self._check(content, domain, split, block)
        return content

    def read_blocks(self, domain: str, split: str, blocks: Sequence[int]) -> list[Block]:
        """Return several blocks of a split in the order asked.

        Raises:
            CorpusError: As `read_block`.
        """
        return [self.read_block(domain, split, block) for block in blocks]

    def document_lengths(self, domain: str, split: str) -> npt.NDArray[np.uint32]:
        """Return the tokens of each document in stream order, shape (documents,).

        Raises:
            CorpusError: If the file is missing or corrupt.
        """
        expected = self.split(domain, split).documents
        if not expected:
            return np.empty(0, dtype=np.uint32)
        if self._token_files is not None:
            return self._token_files.document_lengths(domain, self.split(domain, split))
        file = f"{domain}/{split}/documents.arrow"
        lengths = self._guarded(file, None, lambda: read_lengths(files.join(self.path, file)))
        # A file of the right form from another corpus would shift every document.
        if len(lengths) != expected:
            raise self._corrupt(file, None, f"{len(lengths)} documents, {expected} expected")
        return lengths

    def loss_mask(self, domain: str, split: str) -> LossMask | None:
        """Return which tokens of a split are learned; None: all but each document's first.

        Raises:
            CorpusError: If the file that says so is missing or corrupt.
        """
        info = self.split(domain, split)
        if info.loss_mask is None:
            return None
        # Without the lock: two threads may read it twice, and get equal masks.
        cached = self._loss_mask.get((domain, split))
        if cached is not None:
            return cached
        file = f"{domain}/{split}/{LOSS_MASK_FILE}"
        mask = self._guarded(file, None, lambda: read_loss_mask(files.join(self.path, file)))
        tokens = int(mask.count(np.zeros(1, np.int64), np.array([info.tokens]))[0])
        if tokens != info.loss_tokens:
            raise self._corrupt(file, None, f"{tokens} tokens, {info.loss_tokens} expected")
        self._loss_mask[domain, split] = mask
        return mask

    def _check_number(self, domain: str, split: str, block: int) -> None:
        blocks = self.split(domain, split).blocks
        if not 0 <= block < blocks:
            raise CorpusError.at(f"{domain}.{split}.block", block, f"the split has {blocks} blocks")

    def _read(self, file: str, row: int) -> Block:
        with self._lock:
            # Popped and put back: the order of the dictionary is the order of use.
            reader = self._readers.pop(file, None) or ShardReader(files.join(self.path, file))
            self._readers[file] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader.read(row)

    def _check(self, content: Block, domain: str, split: str, block: int) -> None:
        info = self.split(domain, split)
        cut = self.manifest.block_tokens
        # Only the last block of a split may be shorter.
        expected = min(cut, info.tokens - block * cut)
        if len(content.tokens) != expected or content.tokens.dtype != self.dtype:
            file, row = self.shard_of(domain, split, block)
            actual = f"{len(content.tokens)} tokens of {content.tokens.dtype}"
            raise self._corrupt(file, row, f"{actual}, {expected} of {self.dtype} expected")

    def _guarded(self, file: str, row: int | None, read: Callable[[], _Result]) -> _Result:
        if not self._remote:
            return self._read_or_explain(file, row, read)
        return with_retries(lambda: self._read_or_explain(file, row, read))

    def _read_or_explain(self, file: str, row: int | None, read: Callable[[], _Result]) -> _Result:
        try:
            return read()
        except FileNotFoundError as error:
            raise self._corrupt(file, row, "the file is missing") from error
        except (OSError, ValueError, IndexError, KeyError, pa.ArrowException) as error:
            # A store that does not answer says nothing about the file.
            if known := storage_errors(files.join(self.path, file), error):
                raise known from error
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise self._corrupt(file, row, first) from error

    def _corrupt(self, file: str, row: int | None, problem: str) -> CorpusError:
        where = "" if row is None else f", block {row} of the file"
        return CorpusError.at(
            "corpus.path",
            self.path,
            f"{file}{where} is corrupt: {problem}",
            fix="restore the file or prepare the corpus again",
        )
