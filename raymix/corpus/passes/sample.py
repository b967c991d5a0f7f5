"""The sample a tokenizer is trained on: drawn evenly from the domains, the same every time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raymix.corpus.chats.messages import Conversation
from raymix.corpus.chats.saved import saved_template
from raymix.corpus.chats.template import ChatOptions, TemplateRefused
from raymix.corpus.passes.select import is_held_out
from raymix.corpus.read.parts import MIN_PART_BYTES, Part
from raymix.corpus.read.readers import read_slice
from raymix.corpus.read.records import without_surrogates
from raymix.corpus.tokenizers.tokenizer import LoadedTokenizer, train_bpe
from raymix.recipe import DomainConfig, TrainedTokenizer
from raymix.store import TokenizerInfo

_PARTS = 64


@dataclass(frozen=True)
class TrainJob:
    """Input of training a tokenizer; domains with their parts, smallest domain first."""

    config: TrainedTokenizer
    domains: tuple[tuple[DomainConfig, tuple[Part, ...]], ...]
    min_characters: int
    max_characters: int
    valid_fraction: float
    corpus: str
    template: str
    chat_options: ChatOptions


def train_tokenizer(job: TrainJob) -> TokenizerInfo:
    """Return the description of a tokenizer trained on the sample and saved in the corpus.

    Raises:
        CorpusError: If a source is damaged.
    """
    trained = LoadedTokenizer.made(train_bpe(sample_texts(job), job.config.vocab_size), "bpe")
    trained.save(job.corpus)
    return trained.info


def sample_texts(job: TrainJob) -> Iterator[str]:
    """Yield `sample_bytes` of text in equal shares of the domains; a small one gives all it has.

    A domain's share is drawn evenly from parts spread over it; held-out documents stay out.
    """
    remaining = job.config.sample_bytes
    for number, (domain, parts) in enumerate(job.domains):
        # The smallest domain comes first, so what it cannot give is shared out among the rest.
        share = remaining // (len(job.domains) - number)
        for text, size in _domain_texts(job, domain, parts, share):
            remaining -= size
            yield text


def _domain_texts(
    job: TrainJob, domain: DomainConfig, parts: tuple[Part, ...], share: int
) -> Iterator[tuple[str, int]]:
    count = min(len(parts), max(_PARTS, 2 * share // MIN_PART_BYTES))
    # Spread over the domain, since neighboring parts often come from one source or period.
    chosen = [parts[number * len(parts) // count] for number in range(count)]
    for number, part in enumerate(chosen):
        part_budget = share // (count - number)
        for text in _part_texts(job, domain, part):
            size = len(text.encode())
            if size > part_budget:
                text = text.encode()[:part_budget].decode(errors="ignore")
                size = part_budget
            share -= size
            part_budget -= size
            yield text, size
            if not part_budget:
                break


def _part_texts(job: TrainJob, domain: DomainConfig, part: Part) -> Iterator[str]:
    for file_slice in part.slices:
        for _, value in read_slice(file_slice, domain, max_characters=job.max_characters):
            text = _rendered(job, value) if isinstance(value, Conversation) else value
            if not isinstance(text, str) or len(text) > job.max_characters:
                continue
            if len(text.strip()) < max(job.min_characters, 1):
                continue
            try:
                raw = text.encode()
            except UnicodeEncodeError:
                text = without_surrogates(text)
                raw = text.encode()
            # Held-out text must not shape the tokenizer, or its loss would look too low.
            if part.held_out == "by hash" and _held_out(raw, job.valid_fraction):
                continue
            yield text


def _rendered(job: TrainJob, chat: Conversation) -> str | None:
    try:
        template = saved_template(job.corpus, job.template, job.chat_options)
        # The last text has the most of the conversation.
        return template.examples(chat)[-1].text
    except TemplateRefused:
        return None


def _held_out(raw: bytes, fraction: float) -> bool:
    words = np.frombuffer(hashlib.blake2b(raw, digest_size=16).digest(), "<u8")
    return bool(is_held_out(words.reshape(1, 2), fraction)[0])
