"""The blocks of a corpus that is read in place: ranges of its token files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from raymix.store.block import Block, StartArray, TokenArray
from raymix.store.formats.info import TokenFileInfo, TokenFileOptions
from raymix.store.formats.token_file import Ints, TokenFile
from raymix.store.manifest import Manifest, SplitInfo

# Two mappings each: below the usual limit of 1,024 open files.
_OPEN_FILES = 128


class TokenFileBlocks:
    """Reads the blocks and document lengths of a corpus from the files that it names.

    The files of a domain are one stream of tokens, a split is a range of it, and block i of the
    split the tokens [i * block_tokens, (i + 1) * block_tokens) of that range.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        """Read for the corpus at `path`; files are mapped when they are first needed."""
        self._path = path
        self._manifest = manifest
        tokenizer = manifest.tokenizer
        self._options = TokenFileOptions(tokenizer.vocab_size, tokenizer.eos_id)
        self._ends: dict[str, Ints] = {}
        self._files: OrderedDict[tuple[str, int], TokenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read_block(self, domain: str, split: SplitInfo, block: int) -> Block:
        """Return one block; a view of the file where it lies in one file of the corpus' type.

        Raises:
            CorpusError: If a file is missing or has changed, or an id is outside the vocabulary.
        """
        first = block * self._manifest.block_tokens
        last = min(first + self._manifest.block_tokens, split.tokens)
        tokens: list[TokenArray] = []
        starts: list[Ints] = []
        offset = 0
        for file, low, high in self._ranges(domain, split.first_token + first, last - first):
            tokens.append(file.read(low, high, self._manifest.dtype))
            starts.append(file.edges.between(low, high) - low + offset)
            offset += high - low
        joined: StartArray = np.concatenate(starts).astype(np.uint32)
        return Block(tokens[0] if len(tokens) == 1 else np.concatenate(tokens), joined)

    def document_lengths(self, domain: str, split: SplitInfo) -> npt.NDArray[np.uint32]:
        """Return the tokens of each document of a split, shape (documents,).

        Raises:
            CorpusError: If a file is missing or has changed.
        """
        starts: list[Ints] = []
        before = 0
        for file, low, high in self._ranges(domain, split.first_token, split.tokens):
            starts.append(file.edges.between(low, high) - low + before)
            before += high - low
        starts.append(np.array([before], np.int64))
        return np.diff(np.concatenate(starts)).astype(np.uint32)

    def _ranges(self, domain: str, first: int, count: int) -> Iterator[tuple[TokenFile, int, int]]:
        """Yield the files that hold tokens of a domain's stream, each with its range."""
        infos = self._manifest.domains[domain].token_files
        ends = self._ends.get(domain)
        if ends is None:
            ends = np.cumsum([info.tokens for info in infos], dtype=np.int64)
            self._ends[domain] = ends
        number = int(np.searchsorted(ends, first, side="right"))
        while count > 0:
            low = first - (int(ends[number]) - infos[number].tokens)
            high = min(low + count, infos[number].tokens)
            yield self._file(domain, number, infos[number]), low, high
            first, count, number = first + high - low, count - (high - low), number + 1

    def _file(self, domain: str, number: int, info: TokenFileInfo) -> TokenFile:
        with self._lock:
            # Popped and put back: the order of the dictionary is the order of use.
            key = domain, number
            file = self._files.pop(key, None) or TokenFile(info, self._options, self._path)
            self._files[key] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file
