"""Sources: from the globs of a recipe to the files they mean, in an order that never varies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import cast

import pyarrow.fs as pafs

from raymix.corpus.read.file_formats import (
    Format,
    check_local,
    file_format,
    splits_of,
    without_bookkeeping,
)
from raymix.corpus.read.globs import Listings, expand, is_glob
from raymix.errors import CorpusError, format_problem
from raymix.recipe import CorpusConfig, DomainConfig
from raymix.recipe.corpus import TOKEN_FORMATS
from raymix.store.formats.detect import is_companion, named_file
from raymix.store.formats.info import TokenFormat
from raymix.store.remote import files
from raymix.store.remote.errors import is_remote

_MAX_NAMES_SHOWN = 4

Note = Callable[[str], None]
"""Called with a line for the user."""

Matched = list[tuple[str, pafs.FileInfo]]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file as it was found; `size` in bytes, `changed` is its time in ns since 1970."""

    url: str
    size: int
    changed: int
    format: Format
    compression: str | None


@dataclass(frozen=True, slots=True)
class DomainSources:
    """The files of one domain; `valid` is empty where the held-out part is taken from `train`."""

    train: tuple[SourceFile, ...]
    valid: tuple[SourceFile, ...]


def find_sources(config: CorpusConfig, note: Note = lambda line: None) -> dict[str, DomainSources]:
    """Return the files of every domain, in the order of the globs and sorted within each.

    A directory means all files below it. A file under several names, such as a link, is read once.

    Args:
        config: The corpus section of a recipe.
        note: Called with a line per pattern of which something is left out.

    Raises:
        CorpusError: With one message per glob that matches nothing, file that is missing, of no
            known format, both trained on and held out, or inside the corpus to be written, and
            directory with files of several splits.
    """
    problems: list[str] = []
    sources: dict[str, DomainSources] = {}
    listings = Listings()  # thousands of domains may share a directory
    for number, domain in enumerate(config.domains):
        path = f"corpus.domains.{number}"
        train, valid = (
            _DomainFiles(f"{path}.{split}", domain, listings, problems, note).of(globs)
            for split, globs in (("train", domain.train), ("valid", domain.valid))
        )
        problems += _overlaps(path, train, valid)
        problems += _inside(f"{path}.train", config.path, domain.name, (*train, *valid))
        sources[domain.name] = DomainSources(train, valid)
    if problems:
        raise CorpusError(*problems)
    return sources


@dataclass(frozen=True)
class _DomainFiles:
    """The files of one field of a domain; `problems` and `note` take what is wrong with it."""

    path: str
    domain: DomainConfig
    listings: Listings
    problems: list[str]
    note: Note

    def of(self, globs: Iterable[str]) -> tuple[SourceFile, ...]:
        """Return the files that the globs mean, each once."""
        matched: dict[object, SourceFile] = {}
        patterns = list(globs)
        for pattern in dict.fromkeys(patterns):
            if (times := patterns.count(pattern)) > 1:
                self.note(
                    f"{self.path}: {pattern} is listed {times} times and read once; weights of the "
                    "mixer say how often a domain is read"
                )
            try:
                self._add(pattern, matched)
            except CorpusError as error:
                self.problems.extend(error.problems)
        return tuple(matched.values())

    def _add(self, pattern: str, matched: dict[object, SourceFile]) -> None:
        linked: list[str] = []
        for url, info in self._named(pattern):
            kind, compression = file_format(self.path, url, self.domain)
            file = SourceFile(url, info.size or 0, info.mtime_ns or 0, kind, compression)
            # A file that two globs match is one source, at the place of the first.
            first = matched.setdefault(_identity(url), file)
            if first.url != url:
                linked.append(f"{url} is {first.url}")
        if linked:
            self.note(f"{self.path}: one file under two names, read once: {_some(linked)}")

    def _named(self, pattern: str) -> Matched:
        """Return the files that a pattern means, less those that hold no documents."""
        token_file = self.domain.format in TOKEN_FORMATS
        if token_file:
            check_local(self.path, pattern)
            pattern = named_file(pattern, cast(TokenFormat, self.domain.format))
            return expand(self.path, pattern, self.listings)
        matched = expand(self.path, pattern, self.listings)
        if len(matched) > 1 and not is_glob(pattern):
            self._refuse_splits(pattern, matched)
        if self.domain.format == "auto":
            matched = self._without_indices(pattern, matched)
        return matched if len(matched) == 1 else self._documents(pattern, matched)

    def _without_indices(self, pattern: str, matched: Matched) -> Matched:
        tokens = [(url, info) for url, info in matched if not is_companion(url)]
        if not tokens:
            fix = "name the files of tokens that they belong to"
            raise CorpusError.at(self.path, pattern, "only indices of token files match", fix=fix)
        return tokens

    def _documents(self, pattern: str, matched: Matched) -> Matched:
        urls = [url for url, _ in matched]
        # Below the directory that all share, which is that of the first and the last, as they are
        # sorted: one above may have any name.
        pairs = zip(urls[0].split("/")[:-1], urls[-1].split("/"), strict=False)
        root = "/".join([*(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), ""])
        names, others = without_bookkeeping(url.removeprefix(root) for url in urls)
        if not names:
            fix = "name the files that hold documents"
            raise CorpusError.at(self.path, pattern, f"only {_some(others)} match", fix=fix)
        if others:
            self.note(f"{self.path}: no documents are in {_some(others)}: left out")
        left_out = {root + name for name in others}
        return [(url, info) for url, info in matched if url not in left_out]

    def _refuse_splits(self, directory: str, matched: Matched) -> None:
        """Raise CorpusError where a directory has files to train on and others to evaluate on."""
        root = files.locate(directory)[1]
        splits = splits_of(url.rpartition(root)[2] for url, _ in matched)
        if len(splits) < 2:
            return
        counts = ", ".join(f"{split}: {len(names)}" for split, names in splits.items())
        example = files.join(directory, next(iter(splits.values()))[0].lstrip("/"))
        raise CorpusError.at(
            self.path,
            directory,
            f"a directory with files of several splits ({counts})",
            fix=f"name those that are meant, such as {example}",
        )


def _identity(url: str) -> object:
    """Return what tells a file from others: not its name where it is local, as links have many."""
    if is_remote(url):
        return url
    try:
        status = os.stat(url)
    except OSError:
        # It went away since it was listed; reading it will say so.
        return url
    return status.st_dev, status.st_ino


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES_SHOWN:,} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + more


def _overlaps(path: str, train: Iterable[SourceFile], valid: Iterable[SourceFile]) -> list[str]:
    trained = {_identity(file.url) for file in train}
    both = [file.url for file in valid if _identity(file.url) in trained]
    return [
        format_problem(
            f"{path}.valid",
            url,
            "the file is both trained on and held out",
            fix="name it in one of them",
        )
        for url in both
    ]


def _inside(path: str, corpus: str, domain: str, sources: Iterable[SourceFile]) -> list[str]:
    output = files.join(corpus, domain) + "/"
    return [
        format_problem(
            path,
            file.url,
            f"the file lies where the prepared corpus of the domain goes ({output})",
            fix="choose another corpus.path",
        )
        for file in sources
        if file.url.startswith(output)
    ]
