"""Preparing a corpus of token files without copying them: an index of the files, and a manifest.

Only indices are read, and tokens here and there to check them: ids against the vocabulary, and
end-of-text at the ends of documents. Files without an index are searched for it once. What is
written is the manifest, the tokenizer, and 8 bytes per document where a format has no index that
can be mapped.

Held out are the last documents of a domain: those that begin at or after token
floor((1 - valid_fraction) * T) of its T tokens, or the last one if none does. So both splits are
contiguous ranges, and need no copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from raymix.corpus.passes.assemble import automatic_block_tokens
from raymix.corpus.passes.choose_tokenizer import saved_tokenizer
from raymix.corpus.passes.select import length_histogram, length_quantiles
from raymix.corpus.progress import Reporter
from raymix.corpus.read.sources import DomainSources, SourceFile
from raymix.corpus.read.token_files import check_samples, file_digest
from raymix.corpus.read.token_records import file_options
from raymix.errors import CorpusError, format_problem
from raymix.recipe import CorpusConfig, DomainConfig, TrainedTokenizer
from raymix.store import (
    SPLITS,
    DomainInfo,
    Manifest,
    Split,
    SplitInfo,
    TokenizerInfo,
    atomic_write_text,
)
from raymix.store.formats.detect import MAPPED, token_files
from raymix.store.formats.info import (
    EdgesInfo,
    FileStamp,
    MappedFormat,
    TokenFileInfo,
    TokenFileOptions,
)
from raymix.store.formats.token_file import Ints, TokenFile
from raymix.store.loss_mask import LOSS_MASK_FILE, write_loss_mask
from raymix.store.manifest import MANIFEST, in_place_manifest
from raymix.store.remote import files
from raymix.store.remote.errors import is_remote

# One byte of the mask and one of the edges per token are in memory at a time.
_CHUNK_TOKENS = 1 << 22
# Places of a file at which tokens are read: a domain of 10,000 files takes 40,000 short reads.
_MIN_SAMPLES, _MAX_SAMPLES, _DOMAIN_SAMPLES = 4, 64, 4096


def prepare_in_place(
    config: CorpusConfig, sources: dict[str, DomainSources], report: Reporter
) -> Manifest:
    """Return the manifest of a corpus that stays in its token files, having written it.

    Raises:
        CorpusError: If a file cannot be read in place, is damaged, or does not go with the
            tokenizer; with a message per file.
    """
    _refuse_other_formats(config, sources)
    assert not isinstance(config.tokenizer, TrainedTokenizer)  # a rule of the recipe
    tokenizer = saved_tokenizer(config, config.tokenizer)
    problems: list[str] = []
    indexed: dict[str, _Domain] = {}
    for domain in config.domains:
        try:
            indexed[domain.name] = _index(config, domain, sources[domain.name], tokenizer)
        except CorpusError as error:
            problems += error.problems
    problems += _empty_problems(config, indexed)
    if problems:
        raise CorpusError(*dict.fromkeys(problems))
    block_tokens = config.block_tokens
    if block_tokens == "auto":
        block_tokens = automatic_block_tokens([each.cut for each in indexed.values()])
    count = sum(len(each.infos) for each in indexed.values())
    report.note(f"{len(indexed)} domains, {count} token files, read in place")
    infos = {
        name: _domain_info(config.path, name, each, block_tokens) for name, each in indexed.items()
    }
    manifest = in_place_manifest(tokenizer, block_tokens, infos)
    atomic_write_text(files.join(config.path, MANIFEST), manifest.model_dump_json(indent=1))
    return manifest


def refuse_changed_files(manifest: Manifest) -> None:
    """Check that the token files of a corpus are those of which the manifest was made.

    Raises:
        CorpusError: If one is missing or has changed; with a message per file.
    """
    problems: list[str] = []
    for domain in manifest.domains.values():
        for stamp in _stamps(domain.token_files):
            try:
                stamp.check()
            except CorpusError as error:
                problems += error.problems
    if problems:
        raise CorpusError(*dict.fromkeys(problems))


def _stamps(infos: Sequence[TokenFileInfo]) -> Iterator[FileStamp]:
    for info in infos:
        yield info.file
        # Indices that raymix wrote lie in the corpus, under relative paths.
        if info.edges is not None and info.edges.file.path.startswith("/"):
            yield info.edges.file


def _refuse_other_formats(config: CorpusConfig, sources: dict[str, DomainSources]) -> None:
    problems = [
        format_problem(
            f"corpus.domains.{number}.{split}",
            file.url,
            f"a file of format {file.format} cannot be read in place",
            allowed=f"allowed: {', '.join(MAPPED)}",
            fix="leave out corpus.in_place",
        )
        for number, domain in enumerate(config.domains)
        for split in SPLITS
        for file in getattr(sources[domain.name], split)
        if file.format not in MAPPED
    ]
    if problems:
        raise CorpusError(*problems)


@dataclass
class _Domain:
    """The indexed files of one domain; tokens before `cut` are trained on."""

    infos: list[TokenFileInfo]
    options: TokenFileOptions
    cut: int
    lengths: dict[Split, Counter[int]] = field(
        default_factory=lambda: {"train": Counter(), "valid": Counter()}
    )

    @property
    def tokens(self) -> int:
        return sum(info.tokens for info in self.infos)


def _index(
    config: CorpusConfig, domain: DomainConfig, sources: DomainSources, tokenizer: TokenizerInfo
) -> _Domain:
    options = file_options(domain, tokenizer)
    train = _infos(sources.train, options)
    infos = train + _infos(sources.valid, options)
    infos = [
        _with_edges(config.path, domain.name, number, info, options)
        for number, info in enumerate(infos)
    ]
    opened = [TokenFile(info, options, config.path) for info in infos]
    if sources.valid:
        cut = sum(info.tokens for info in train)
    else:
        cut = _cut(opened, config.valid_fraction)
    indexed = _Domain(infos, options, cut)
    before = 0
    problems: list[str] = []
    samples = max(_MIN_SAMPLES, min(_MAX_SAMPLES, _DOMAIN_SAMPLES // len(infos)))
    for number, file in enumerate(opened):
        try:
            check_samples(file, options, samples)
        except CorpusError as error:
            problems += error.problems
        documents = _count(file, cut - before, indexed)
        update = {"documents": documents, "digest": file_digest(file, samples)}
        infos[number] = infos[number].model_copy(update=update)
        before += file.info.tokens
    if problems:
        raise CorpusError(*problems)
    return indexed


def _infos(sources: Sequence[SourceFile], options: TokenFileOptions) -> list[TokenFileInfo]:
    def infos_of(file: SourceFile) -> list[TokenFileInfo] | CorpusError:
        try:
            return token_files(file.url, cast(MappedFormat, file.format), options)
        except CorpusError as error:
            return error

    # Each waits for the disk; all faults are told at once.
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(infos_of, sources))
    problems = [line for each in results if isinstance(each, CorpusError) for line in each.problems]
    if problems:
        raise CorpusError(*problems)
    return [info for each in results if not isinstance(each, CorpusError) for info in each]


def _with_edges(
    corpus: str, domain: str, number: int, info: TokenFileInfo, options: TokenFileOptions
) -> TokenFileInfo:
    """Return the facts of a file with an index that can be mapped, written if there is none."""
    if info.edges is not None or (info.eos_at == "none" and info.text_index is None):
        return info
    if is_remote(corpus):
        raise CorpusError.at(
            "corpus.path",
            corpus,
            f"the index of {info.file.path} is to be mapped, and this is no local directory",
            fix="choose a path on a file system that all workers see",
        )
    name = f"{domain}/index/{number:05d}.starts"
    url = files.join(corpus, name)
    with files.AtomicFile(url) as written:
        for starts in TokenFile(info, options).edges.chunks():
            written.write(starts.astype("<i8").data)
    stamp = FileStamp.of(url).model_copy(update={"path": name})
    edges = EdgesInfo(file=stamp, offset=0, count=written.size // 8, dtype="<i8")
    return info.model_copy(update={"edges": edges})


def _cut(opened: Sequence[TokenFile], valid_fraction: float) -> int:
    """Return the first held-out token of a domain: the start of a document."""
    ends = np.cumsum([file.info.tokens for file in opened])
    total = int(ends[-1])
    target = int((1 - valid_fraction) * total)
    for file, end in zip(opened, ends.tolist(), strict=True):
        before = end - file.info.tokens
        if end > target:
            # From token 1 of the domain on: something must be left to train on.
            start = before + file.edges.next(max(target - before, 0 if before else 1))
            # At the end of a file the next one begins with a document.
            if start < total:
                return start
    last = int(opened[-1].edges.between(0, opened[-1].info.tokens)[-1]) + total
    start = last - opened[-1].info.tokens
    # With one document to train on, none can be spared for evaluation.
    return start if start else total


def _count(file: TokenFile, cut: int, domain: _Domain) -> int:
    """Return the documents of a file, adding their lengths to those of their split."""
    last = np.zeros(0, np.int64)
    documents = 0
    total = np.array([file.info.tokens], np.int64)
    for starts in (*file.edges.chunks(), total):
        edges = np.concatenate([last, starts])
        lengths, begins, last = np.diff(edges), edges[:-1], edges[-1:]
        documents += len(lengths)
        for split, chosen in (("train", begins < cut), ("valid", begins >= cut)):
            values, counts = np.unique(lengths[chosen], return_counts=True)
            pairs = zip(values.tolist(), counts.tolist(), strict=True)
            domain.lengths[cast(Split, split)].update(dict(pairs))
    return documents


def _empty_problems(config: CorpusConfig, indexed: dict[str, _Domain]) -> list[str]:
    return [
        format_problem(
            f"corpus.domains.{number}.train",
            list(domain.train),
            f"no document of domain {domain.name!r} is left to train on",
            fix="give it more text, or leave it out",
        )
        for number, domain in enumerate(config.domains)
        if domain.name in indexed and not indexed[domain.name].cut
    ]


def _domain_info(corpus: str, name: str, domain: _Domain, block_tokens: int) -> DomainInfo:
    splits: dict[Split, SplitInfo] = {}
    for split, first, last in (("train", 0, domain.cut), ("valid", domain.cut, domain.tokens)):
        lengths = domain.lengths[cast(Split, split)]
        info = SplitInfo(
            documents=lengths.total(),
            tokens=last - first,
            bytes=0,
            blocks=-(-(last - first) // block_tokens),
            shards=(),
            length_quantiles=length_quantiles(lengths),
            length_histogram=length_histogram(lengths),
            # Counting them would read every token.
            unigram_entropy=None,
            bigram_entropy=None,
            first_token=first,
        )
        splits[cast(Split, split)] = _with_loss_mask(corpus, f"{name}/{split}", domain, info)
    documents = sum(info.documents for info in domain.infos)
    records = sum(_records(info) for info in domain.infos)
    return DomainInfo(
        train=splits["train"],
        valid=splits["valid"],
        records_read=records,
        rejected=0,
        duplicates=0,
        too_short=max(records - documents, 0),
        too_long=0,
        token_files=tuple(domain.infos),
    )


def _records(info: TokenFileInfo) -> int:
    """Return the documents of a file with the empty ones, which its index may name."""
    if info.edges is None or info.format not in ("megatron", "datatrove", "litdata"):
        return info.documents
    return info.edges.count - (info.format == "litdata")


def _with_loss_mask(corpus: str, directory: str, domain: _Domain, info: SplitInfo) -> SplitInfo:
    """Return the facts of a split, having written its loss mask where a file has one."""
    if not info.tokens or all(file.loss is None for file in domain.infos):
        return info
    loss_tokens = 0

    def edges() -> Iterator[Ints]:
        nonlocal loss_tokens
        state, position = 0, 0
        for mask in _masks(domain, corpus, info.first_token, info.first_token + info.tokens):
            loss_tokens += int(np.count_nonzero(mask))
            turns = np.diff(mask.astype(np.int8), prepend=np.int8(state))
            yield np.flatnonzero(turns) + position
            state, position = int(mask[-1]), position + len(mask)
        if state:
            yield np.array([position], np.int64)

    digest = write_loss_mask(files.join(corpus, directory, LOSS_MASK_FILE), edges())
    return info.model_copy(update={"loss_mask": digest, "loss_tokens": loss_tokens})


def _masks(domain: _Domain, corpus: str, first: int, last: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield which tokens of a range of the domain's stream are to be predicted."""
    before = 0
    for info in domain.infos:
        low, high = max(first - before, 0), min(last - before, info.tokens)
        before += info.tokens
        if low >= high:
            continue
        file = TokenFile(info, domain.options, corpus)
        for begin in range(low, high, _CHUNK_TOKENS):
            end = min(begin + _CHUNK_TOKENS, high)
            in_loss = file.in_loss(begin, end)
            mask = np.ones(end - begin, np.bool_) if in_loss is None else in_loss
            # Nothing comes before a document's first token that it could be predicted from.
            mask[file.edges.between(begin, end) - begin] = False
            yield mask
