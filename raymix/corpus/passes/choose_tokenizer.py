"""The tokenizer of a corpus, ready under `CORPUS/tokenizer` before the first part is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raymix._utils.json import parse_json
from raymix.corpus import state
from raymix.corpus.passes.sample import TrainJob, train_tokenizer
from raymix.corpus.progress import Reporter
from raymix.corpus.read.chat import save_template
from raymix.corpus.read.parts import Part, digest
from raymix.corpus.runner import Runner, in_order
from raymix.corpus.tokenizers.tokenizer import LoadedTokenizer, byte_tokenizer, load_pretrained
from raymix.recipe import ByteTokenizer, CorpusConfig, PretrainedTokenizer, TrainedTokenizer
from raymix.store import TokenizerInfo, atomic_write_text
from raymix.store.remote import files


def ready_tokenizer(
    config: CorpusConfig, parts: Mapping[str, Sequence[Part]], runner: Runner, report: Reporter
) -> tuple[TokenizerInfo, str]:
    """Return the corpus' tokenizer and the name of its chat template, having saved both in it.

    Raises:
        CorpusError: If the one the recipe names cannot be used.
    """
    chosen = config.tokenizer
    if isinstance(chosen, TrainedTokenizer):
        template = save_template(config)
        return _trained(config, chosen, parts, template, runner, report), template
    return saved_tokenizer(config, chosen), save_template(config)


def saved_tokenizer(
    config: CorpusConfig, chosen: ByteTokenizer | PretrainedTokenizer
) -> TokenizerInfo:
    """Return a tokenizer that needs no training, having saved it in the corpus.

    Raises:
        CorpusError: If it cannot be used.
    """
    if isinstance(chosen, PretrainedTokenizer):
        loaded = load_pretrained(chosen)
    else:
        loaded = LoadedTokenizer.made(byte_tokenizer(), "byte")
    loaded.save(config.path)
    return loaded.info


def _trained(
    config: CorpusConfig,
    chosen: TrainedTokenizer,
    parts: Mapping[str, Sequence[Part]],
    template: str,
    runner: Runner,
    report: Reporter,
) -> TokenizerInfo:
    job = _train_job(config, chosen, parts, template)
    # The sample depends on every part, so a changed file trains the tokenizer anew.
    keys = [part.key() for _, domain_parts in job.domains for part in domain_parts]
    columns = [domain.model_dump(mode="json") for domain, _ in job.domains]
    limits = [config.min_characters, config.max_characters, config.valid_fraction]
    key = digest([chosen.model_dump(), keys, columns, limits, template])
    marker = files.join(config.path, state.WORK, "tokenizer.json")
    finished = _read_marker(marker)
    if finished.get("key") == key:
        return TokenizerInfo(**finished["info"])
    size = min(
        chosen.sample_bytes,
        sum(part.size for _, domain_parts in job.domains for part in domain_parts),
    )
    report.begin("tokenizer", 1, size)
    report.note(f"training a tokenizer of {chosen.vocab_size:,} tokens on {size / 1e6:,.1f} MB")
    (info,) = in_order(runner.run(train_tokenizer, [job], [size]), 1)
    atomic_write_text(marker, json.dumps({"key": key, "info": info.model_dump()}))
    report.advance(size)
    return info


def _read_marker(marker: str) -> dict[str, Any]:
    try:
        return parse_json(files.read_bytes(marker))
    except (FileNotFoundError, ValueError):
        return {}


def _train_job(
    config: CorpusConfig,
    chosen: TrainedTokenizer,
    parts: Mapping[str, Sequence[Part]],
    template: str,
) -> TrainJob:
    domains = [
        (domain, tuple(part for part in parts[domain.name] if part.held_out != "yes"))
        for domain in config.domains
    ]
    # By name where sizes are equal, so that the sample does not depend on the recipe's order.
    domains.sort(key=lambda entry: (sum(part.size for part in entry[1]), entry[0].name))
    return TrainJob(
        config=chosen,
        domains=tuple(domains),
        min_characters=config.min_characters,
        max_characters=config.max_characters,
        valid_fraction=config.valid_fraction,
        corpus=config.path,
        template=template,
    )
