"""Preparing a corpus: from files of text to shards of token blocks and a manifest.

Three passes, each of many independent jobs: tokenize parts, select documents domain by domain
(duplicates, held-out split), assemble shards. Every job leaves a marker, so running again goes on
where it stopped; every cut depends on the input alone, so the bytes that come out do not depend
on how many jobs ran at once or on how often it was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from raymix.corpus import state
from raymix.corpus.chats.saved import chat_options
from raymix.corpus.in_place import prepare_in_place, refuse_changed_files
from raymix.corpus.passes import rejects
from raymix.corpus.passes.assemble import (
    EntropyJob,
    ShardJob,
    ShardResult,
    automatic_block_tokens,
    entropies,
    finished_shard,
    plan_shards,
    write_shard,
)
from raymix.corpus.passes.choose_tokenizer import ReadyTokenizer, ready_tokenizer
from raymix.corpus.passes.domain_info import domain_info, record_counts
from raymix.corpus.passes.select import (
    Selection,
    SelectJob,
    finished_selection,
    select_documents,
)
from raymix.corpus.passes.tokenize import PartCounts, PartJob, finished_counts, tokenize_part
from raymix.corpus.progress import Listener, Reporter, Stage
from raymix.corpus.read.parts import Part, digest, plan_parts
from raymix.corpus.read.readers import check_first_records
from raymix.corpus.read.sources import DomainSources, find_sources
from raymix.corpus.read.token_records import check_indices, has_loss_mask
from raymix.corpus.runner import Runner, choose_runner, in_order
from raymix.errors import CorpusError, format_problem
from raymix.recipe import CorpusConfig
from raymix.store import (
    SPLITS,
    Corpus,
    Manifest,
    Split,
    SplitInfo,
    TokenizerInfo,
    atomic_write_text,
    corpus_fingerprint,
    token_dtype,
)
from raymix.store.manifest import MANIFEST
from raymix.store.remote import files

IfExists = Literal["resume", "fail", "new"]

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

Parts = dict[str, list[Part]]


def prepare(
    config: CorpusConfig,
    *,
    parallelism: int | None = None,
    address: str | None = None,
    wait_minutes: float = 0,
    if_exists: IfExists = "resume",
    progress: Listener | None = None,
) -> Manifest:
    """Return the manifest of the corpus at `config.path`, preparing what is not there yet.

    The same configuration over the same files gives the same bytes, whatever the parallelism.

    Args:
        config: The corpus section of a recipe, its paths absolute or from the working directory.
        parallelism: Tasks at a time on Ray; 0 works in this process without Ray; None takes all
            CPUs of the cluster, or this process for a small corpus where no cluster runs.
        address: Ray cluster to work on; left out, the one connected to, RAY_ADDRESS, or a
            private one for the time of the work.
        wait_minutes: Minutes to wait for a node with CPUs of a cluster that adds nodes on demand.
        if_exists: What to do about a corpus that is there: `resume` goes on with it, or does
            nothing when it is finished; `fail` refuses; `new` replaces it.
        progress: Called as the work goes on.

    Raises:
        CorpusError: If the sources cannot be used, too many records are bad, a domain is empty,
            the disk is full, or the corpus that is there is of another configuration.
        ClusterError: If the Ray cluster does not answer or has no CPU.
    """
    report = Reporter(progress)
    files.check_store(config.path, "corpus.path")
    if not config.domains:
        return Corpus.open(config.path).manifest
    existing = state.manifest_of(config.path)
    if if_exists == "fail" and (existing or state.recorded(config.path)):
        problem = "a corpus is there already"
        raise CorpusError.at("corpus.path", config.path, problem, fix="allowed: --if-exists new")
    if if_exists == "resume":
        state.refuse_differences(config)
        if existing:
            return _nothing_to_do(config, existing, report)
    config = state.pin_tokenizer(config, afresh=if_exists == "new")
    report.begin("plan")
    sources = find_sources(config, report.note)
    parts: Parts = {} if config.in_place else plan_parts(config.domains, sources)
    check_first_records(config.domains, parts)
    with state.locked(config.path):
        if if_exists == "new":
            state.clear(config)
        state.remove_temporary(config.path)
        state.record(config, sources)
        if config.in_place:
            return _prepare_in_place(config, sources, report)
        options = {"parallelism": parallelism, "address": address, "wait_minutes": wait_minutes}
        return _prepare(config, sources, parts, options, report)


def _nothing_to_do(config: CorpusConfig, manifest: Manifest, report: Reporter) -> Manifest:
    state.refuse_missing_shards(config.path, manifest)
    refuse_changed_files(manifest)
    files.remove(files.join(config.path, state.WORK))
    changed = state.changed_sources(config)
    for line in changed[:10]:
        report.note(line)
    if changed:
        more = f"{len(changed)} sources are not what they were when the corpus was prepared"
        report.note(f"{more}; it was left as it is (--if-exists new prepares it again)")
    report.begin("done")
    report.note(f"{config.path} is prepared already: nothing to do")
    return manifest


def _prepare_in_place(
    config: CorpusConfig, sources: dict[str, DomainSources], report: Reporter
) -> Manifest:
    manifest = prepare_in_place(config, sources, report)
    files.remove(files.join(config.path, state.WORK))
    report.begin("done")
    return manifest


def _prepare(
    config: CorpusConfig,
    sources: dict[str, DomainSources],
    parts: Parts,
    runner_options: dict[str, Any],
    report: Reporter,
) -> Manifest:
    size = sum(part.size for domain_parts in parts.values() for part in domain_parts)
    count = sum(len(source.train) + len(source.valid) for source in sources.values())
    try:
        with choose_runner(size, say=report.note, **runner_options) as runner:
            report.note(
                f"{len(sources)} domains, {count} files, about {size / 1e6:,.0f} MB of text; "
                f"{runner.description}"
            )
            manifest = _Preparation(config, sources, parts, runner, report).run()
    finally:
        state.remove_temporary(config.path)
    files.remove(files.join(config.path, state.WORK))
    report.begin("done")
    return manifest


@dataclass(frozen=True)
class _Preparation:
    """One run over a corpus; each method is a pass."""

    config: CorpusConfig
    sources: dict[str, DomainSources]
    parts: Parts
    runner: Runner
    report: Reporter

    @property
    def work(self) -> str:
        return files.join(self.config.path, state.WORK)

    def run(self) -> Manifest:
        """Return the manifest, having written everything."""
        ready = ready_tokenizer(self.config, self.parts, self.runner, self.report)
        tokenizer = ready.info
        check_indices(self.config, self.sources, tokenizer)
        part_counts = self._tokenize(ready)
        self._check_rejects(part_counts)
        selections = self._select(part_counts)
        splits, block_tokens = self._assemble(selections, tokenizer)
        domains = {
            name: domain_info(
                part_counts[name], selections[name], splits[name, "train"], splits[name, "valid"]
            )
            for name in self.parts
        }
        manifest = Manifest(
            fingerprint=corpus_fingerprint(tokenizer, block_tokens, domains),
            tokenizer=tokenizer,
            block_tokens=block_tokens,
            domains=domains,
        )
        target = files.join(self.config.path, MANIFEST)
        atomic_write_text(target, manifest.model_dump_json(indent=1))
        return manifest

    def _tokenize(self, ready: ReadyTokenizer) -> dict[str, list[PartCounts]]:
        domains = {domain.name: domain for domain in self.config.domains}
        masked = self._masked()
        jobs = [
            PartJob(
                part,
                domains[name],
                ready.info,
                self.config.path,
                self.work,
                self.config.min_characters,
                self.config.max_characters,
                ready.template,
                chat_options=chat_options(self.config),
                bos_id=ready.bos_id,
                special_in_text=self.config.special_tokens_in_text == "special",
                masked=masked[name],
            )
            for name, domain_parts in self.parts.items()
            for part in domain_parts
        ]
        # The largest first, so that no CPU is left with a large one at the end.
        jobs.sort(key=lambda job: -job.part.size)
        results = self._run(
            "tokenize", jobs, finished_counts, tokenize_part, lambda job: job.part.size
        )
        keys = ((job.part.domain, job.part.number) for job in jobs)
        part_counts = dict(zip(keys, results, strict=True))
        return {
            name: [part_counts[name, part.number] for part in domain_parts]
            for name, domain_parts in self.parts.items()
        }

    def _masked(self) -> dict[str, bool]:
        return {
            domain.name: has_loss_mask(domain, self.sources[domain.name])
            for domain in self.config.domains
        }

    def _run(
        self,
        stage: Stage,
        jobs: Sequence[_Job],
        finished: Callable[[_Job], _Result | None],
        function: Callable[[_Job], _Result],
        size: Callable[[_Job], int],
    ) -> list[_Result]:
        """Return the results of jobs in order; those finished in an earlier run are read."""
        # Markers are read by threads: on an object store each is a round trip.
        with ThreadPoolExecutor(8) as pool:
            results = dict(enumerate(pool.map(finished, jobs)))
        unfinished = [index for index, result in results.items() if result is None]
        sizes = [size(jobs[index]) for index in unfinished]
        self.report.begin(stage, len(unfinished), sum(sizes))
        if done := len(jobs) - len(unfinished):
            self.report.note(f"{done} of {len(jobs)} pieces were done before")
        for number, result in self.runner.run(function, [jobs[i] for i in unfinished], sizes):
            results[unfinished[number]] = result
            produced = (result.documents, result.tokens) if isinstance(result, PartCounts) else ()
            self.report.advance(sizes[number], *produced)
        return [result for result in results.values() if result is not None]

    def _check_rejects(self, part_counts: dict[str, list[PartCounts]]) -> None:
        """Write the samples of bad records; raise where there are too many."""
        problems: list[str] = []
        for name, domain_counts in part_counts.items():
            shown = rejects.write_rejects(self.config.path, self.parts[name], domain_counts)
            problems += rejects.too_many(name, domain_counts, shown, self.config.max_rejected)
        if problems:
            raise CorpusError(*problems)

    def _select(self, part_counts: dict[str, list[PartCounts]]) -> dict[str, Selection]:
        jobs = []
        answers = self._masked()
        for name, domain_counts in part_counts.items():
            keys = [counts.key for counts in domain_counts]
            options = [self.config.valid_fraction, self.config.deduplicate]
            jobs.append(
                SelectJob(
                    domain=name,
                    held_out=tuple(part.held_out for part in self.parts[name]),
                    documents=tuple(counts.documents for counts in domain_counts),
                    valid_fraction=self.config.valid_fraction,
                    deduplicate=self.config.deduplicate,
                    corpus=self.config.path,
                    work=self.work,
                    key=digest([keys, options]),
                    answers=answers[name],
                )
            )
        results = self._run(
            "select", jobs, finished_selection, select_documents, lambda job: sum(job.documents)
        )
        selections = {job.domain: result for job, result in zip(jobs, results, strict=True)}
        self._refuse_empty(part_counts, selections)
        return selections

    def _refuse_empty(
        self, part_counts: dict[str, list[PartCounts]], selections: dict[str, Selection]
    ) -> None:
        problems: list[str] = []
        for number, domain in enumerate(self.config.domains):
            info = record_counts(part_counts[domain.name], selections[domain.name])
            counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in info.items())
            for split in SPLITS:
                globs = domain.train if split == "train" else domain.valid
                if globs and not getattr(selections[domain.name], split).documents:
                    path = f"corpus.domains.{number}.{split}"
                    problem = f"no document of domain {domain.name!r} is left to use ({counts})"
                    fix = "check the files and the cleaning limits, or leave the domain out"
                    problems.append(format_problem(path, list(globs), problem, fix=fix))
        if problems:
            raise CorpusError(*problems)

    def _assemble(
        self, selections: dict[str, Selection], tokenizer: TokenizerInfo
    ) -> tuple[dict[tuple[str, Split], SplitInfo], int]:
        block_tokens = self.config.block_tokens
        if block_tokens == "auto":
            block_tokens = automatic_block_tokens([s.train.tokens for s in selections.values()])
        planned: dict[tuple[str, Split], list[ShardJob]] = {
            (name, split): plan_shards(
                name,
                split,
                getattr(selection, split).part_tokens,
                block_tokens=block_tokens,
                vocab_size=tokenizer.vocab_size,
                corpus=self.config.path,
                work=self.work,
                key=digest([selection.key, split, block_tokens]),
            )
            for name, selection in selections.items()
            for split in SPLITS
        }
        jobs = [job for shards in planned.values() for job in shards]
        self._check_space(jobs, tokenizer)
        jobs.sort(key=lambda job: job.low - job.high)
        results = self._run(
            "assemble", jobs, finished_shard, write_shard, lambda job: job.high - job.low
        )
        written = dict(zip(((j.domain, j.split, j.number) for j in jobs), results, strict=True))
        return self._describe(planned, written, selections, tokenizer), block_tokens

    def _check_space(self, jobs: Sequence[ShardJob], tokenizer: TokenizerInfo) -> None:
        """Refuse to begin writing shards that the disk cannot take."""
        if (free := files.free_bytes(self.config.path)) is None:
            return
        missing = [job for job in jobs if not files.exists(files.join(job.corpus, job.file))]
        tokens = sum(job.high - job.low for job in missing)
        needed = tokens * token_dtype(tokenizer.vocab_size).itemsize
        if free < needed:
            raise files.disk_full(self.config.path, needed)

    def _describe(
        self,
        planned: dict[tuple[str, Split], list[ShardJob]],
        written: dict[tuple[str, Split, int], ShardResult],
        selections: dict[str, Selection],
        tokenizer: TokenizerInfo,
    ) -> dict[tuple[str, Split], SplitInfo]:
        jobs = [
            EntropyJob(
                tuple(shards),
                tuple(tuple(written[name, split, job.number].runs) for job in shards),
                tokenizer.vocab_size,
            )
            for (name, split), shards in planned.items()
        ]
        sizes = [sum(shard.high - shard.low for shard in job.shards) for job in jobs]
        results = in_order(self.runner.run(entropies, jobs, sizes), len(jobs))
        splits: dict[tuple[str, Split], SplitInfo] = {}
        for (name, split), (unigram, bigram) in zip(planned, results, strict=True):
            selection = getattr(selections[name], split)
            infos = tuple(written[name, split, job.number].info for job in planned[name, split])
            splits[name, split] = SplitInfo(
                documents=selection.documents,
                tokens=selection.tokens,
                bytes=selection.bytes,
                blocks=sum(info.blocks for info in infos),
                shards=infos,
                length_quantiles=selection.length_quantiles,
                length_histogram=selection.length_histogram,
                unigram_entropy=unigram,
                bigram_entropy=bigram,
                loss_mask=selection.loss_mask,
                loss_tokens=selection.loss_tokens,
            )
        return splits
