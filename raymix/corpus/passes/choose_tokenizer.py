"""The tokenizer of a corpus, ready under `CORPUS/tokenizer` before the first part is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymix._utils.json import parse_json
from raymix.corpus import state
from raymix.corpus.chats.saved import chat_options, save_template
from raymix.corpus.passes.sample import TrainJob, train_tokenizer
from raymix.corpus.progress import Reporter
from raymix.corpus.read.parts import Part, digest
from raymix.corpus.runner import Runner, in_order
from raymix.corpus.tokenizers.tokenizer import LoadedTokenizer, byte_tokenizer, load_pretrained
from raymix.errors import CorpusError
from raymix.recipe import ByteTokenizer, CorpusConfig, PretrainedTokenizer, TrainedTokenizer
from raymix.store import TokenizerInfo, atomic_write_text
from raymix.store.remote import files


@dataclass(frozen=True, slots=True)
class ReadyTokenizer:
    """The tokenizer of a corpus, the name of its chat template, and what texts begin with."""

    info: TokenizerInfo
    template: str
    bos_id: int | None


def ready_tokenizer(
    config: CorpusConfig, parts: Mapping[str, Sequence[Part]], runner: Runner, report: Reporter
) -> ReadyTokenizer:
    """Return the corpus' tokenizer and chat template, having saved both in it.

    Raises:
        CorpusError: If the one the recipe names cannot be used.
    """
    chosen = config.tokenizer
    if isinstance(chosen, TrainedTokenizer):
        if config.bos == "always":
            raise CorpusError.at(
                "corpus.bos", config.bos, "a tokenizer trained here has no such token"
            )
        template = save_template(config)
        info = _trained(config, chosen, parts, template, runner, report)
        return ReadyTokenizer(info, template, None)
    loaded = _saved(config, chosen)
    bos = loaded.bos_token(config.bos)
    texts = any(domain.column_field == "text_column" for domain in config.domains)
    if texts and isinstance(chosen, PretrainedTokenizer):
        begins = f"begin with {bos[0]!r}" if bos else "do not begin with a token of their own"
        report.note(f"documents of text {begins} (corpus.bos: {config.bos})")
    return ReadyTokenizer(loaded.info, save_template(config), bos[1] if bos else None)


def saved_tokenizer(
    config: CorpusConfig, chosen: ByteTokenizer | PretrainedTokenizer
) -> TokenizerInfo:
    """Return a tokenizer that needs no training, having saved it in the corpus.

    Raises:
        CorpusError: If it cannot be used.
    """
    return _saved(config, chosen).info


def _saved(config: CorpusConfig, chosen: ByteTokenizer | PretrainedTokenizer) -> LoadedTokenizer:
    if isinstance(chosen, PretrainedTokenizer):
        loaded = load_pretrained(chosen)
    else:
        loaded = LoadedTokenizer.made(byte_tokenizer(), "byte")
    loaded.save(config.path)
    return loaded


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
        chat_options=chat_options(config),
    )
