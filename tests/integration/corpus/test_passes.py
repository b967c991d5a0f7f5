"""The passes' laws: blocks partition the stream, duplicates, the split by hash, entropies."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.corpus.passes import entropy
from raymix.corpus.passes.assemble import automatic_block_tokens, plan_shards
from raymix.corpus.passes.cut import TokenPiece, clip, cut_blocks
from raymix.corpus.passes.entropy import PairCounter, bigram_entropy, unigram_entropy
from raymix.corpus.passes.select import (
    SelectJob,
    first_of_each,
    is_held_out,
    length_histogram,
    length_quantiles,
    select_documents,
)
from raymix.corpus.passes.tokenize import DOCUMENT, part_base
from raymix.corpus.tokenizers.encoders import ByteEncoder, HuggingFaceEncoder, saved_encoder
from raymix.corpus.tokenizers.tokenizer import (
    END_OF_TEXT,
    LoadedTokenizer,
    byte_tokenizer,
    fingerprint,
    load_pretrained,
    train_bpe,
)
from raymix.errors import CorpusError
from raymix.recipe import PretrainedTokenizer
from raymix.store import read_lengths

Lengths = list[int]


def pieces_of(lengths: Lengths, per_piece: int) -> list[TokenPiece]:
    """Return documents of known tokens, several to a piece."""
    pieces, at = [], 0
    for low in range(0, len(lengths), per_piece):
        inside = np.array(lengths[low : low + per_piece])
        tokens = np.arange(at, at + inside.sum(), dtype=np.uint32)
        pieces.append(TokenPiece(tokens, np.cumsum(inside) - inside))
        at += int(inside.sum())
    return pieces


documents = st.lists(st.integers(1, 40), max_size=20)


@given(documents, st.integers(1, 5), st.integers(1, 30))
def test_blocks_partition_the_stream(lengths: Lengths, per_piece: int, cut: int) -> None:
    blocks = list(cut_blocks(pieces_of(lengths, per_piece), cut))
    assert [len(block.tokens) for block in blocks[:-1]] == [cut] * (len(blocks) - 1)
    assert all(0 < len(block.tokens) <= cut for block in blocks)
    joined = np.concatenate([np.empty(0, int), *(block.tokens for block in blocks)])
    np.testing.assert_array_equal(joined, np.arange(sum(lengths)))
    starts = [int(s) + cut * n for n, block in enumerate(blocks) for s in block.starts]
    assert starts == (np.cumsum(lengths) - lengths).tolist() if lengths else starts == []


@given(documents, st.integers(1, 5), st.tuples(st.integers(0, 800), st.integers(0, 800)))
def test_clip_is_a_stretch_of_the_stream(
    lengths: Lengths, per_piece: int, ends: tuple[int, int]
) -> None:
    low, high = sorted(ends)
    pieces = list(clip(pieces_of(lengths, per_piece), low, high))
    tokens = [t for piece in pieces for t in piece.tokens.tolist()]
    assert tokens == list(range(sum(lengths)))[low:high]
    starts = [int(piece.tokens[s]) for piece in pieces for s in piece.starts]
    whole = (np.cumsum(lengths) - lengths).tolist() if lengths else []
    assert starts == [start for start in whole if low <= start < high]


@given(
    st.lists(st.lists(st.integers(0, 12), max_size=10), min_size=1, max_size=5), st.integers(1, 9)
)
def test_the_first_of_equal_documents_stays(parts: list[list[int]], bucket: int) -> None:
    """Whatever the memory (bucket size), as a plain loop over all documents would have it."""
    hashes = [np.array([(w % 3, w // 3) for w in part], "<u8").reshape(-1, 2) for part in parts]
    seen: set[int] = set()
    wanted = []
    for word in (word for part in parts for word in part):
        wanted.append(word not in seen)
        seen.add(word)
    mask = first_of_each(hashes.__getitem__, [len(part) for part in parts], bucket=bucket)
    assert mask.tolist() == wanted


def write_parts(work: Path, parts: list[list[int]]) -> tuple[int, ...]:
    """Write documents whose hash words, lengths and bytes are given by one number each."""
    for number, part in enumerate(parts):
        table = np.zeros(len(part), DOCUMENT)
        # Spread over the whole range, as the words of a hash are.
        table["hash"] = [[(word * 0x9E3779B97F4A7C15) % 2**64, word] for word in part] or 0
        table["tokens"] = np.array(part, dtype=int) % 7 + 1
        table["bytes"] = np.array(part, dtype=int) + 1
        base = Path(part_base(str(work), "d", number))
        base.parent.mkdir(parents=True, exist_ok=True)
        base.with_suffix(".documents").write_bytes(table.tobytes())
    return tuple(map(len, parts))


def select_job(root: Path, parts: list[list[int]], **changes: object) -> SelectJob:
    fields: dict[str, object] = {
        "domain": "d",
        "held_out": ("by hash",) * len(parts),
        "documents": write_parts(root / "work", parts),
        "valid_fraction": 0.3,
        "deduplicate": True,
        "corpus": str(root / "corpus"),
        "work": str(root / "work"),
        "key": "k",
    }
    return SelectJob(**{**fields, **changes})


def codes(job: SelectJob) -> list[int]:
    bases = [Path(part_base(job.work, "d", n)) for n in range(len(job.documents))]
    return [code for base in bases for code in base.with_suffix(".splits").read_bytes()]


@given(st.lists(st.lists(st.integers(0, 50), max_size=12), min_size=1, max_size=4))
@settings(max_examples=40)
def test_selection_accounts_for_every_document(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]]
) -> None:
    job = select_job(tmp_path_factory.mktemp("select"), parts)
    selection = select_documents(job)
    total = sum(map(len, parts))
    distinct = len({word for part in parts for word in part})
    assert selection.duplicates == total - distinct
    assert selection.train.documents + selection.valid.documents == distinct
    assert selection.train.bytes + selection.valid.bytes == sum({w + 1 for p in parts for w in p})
    for split in ("train", "valid"):
        info = getattr(selection, split)
        lengths = read_lengths(f"{job.corpus}/d/{split}/documents.arrow")
        assert len(lengths) == info.documents == sum(info.length_histogram.values())
        assert lengths.sum() == info.tokens == sum(info.part_tokens)
        assert codes(job).count(1 if split == "train" else 2) == info.documents
    if distinct > 1:
        assert selection.train.documents
        assert selection.valid.documents
    elif distinct:
        assert selection.train.documents == 1


@given(st.lists(st.integers(0, 10_000), min_size=30, max_size=60, unique=True), st.randoms())
@settings(max_examples=40)
def test_a_document_keeps_its_split_whatever_comes_with_it(
    tmp_path_factory: pytest.TempPathFactory, words: list[int], rng: object
) -> None:
    root = tmp_path_factory.mktemp("split")
    before = dict(zip(words, codes_after(root / "a", [words]), strict=True))
    mixed = sorted(words[: len(words) - 5], key=lambda word: word * 7919 % 101)
    after = dict(zip(mixed, codes_after(root / "b", [mixed[:9], mixed[9:]]), strict=True))
    if {1, 2} <= set(after.values()):
        assert after.items() <= before.items()


def codes_after(root: Path, parts: list[list[int]]) -> list[int]:
    job = select_job(root, parts)
    select_documents(job)
    return codes(job)


def test_held_out_share_is_what_was_asked() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, (200_000, 2), dtype=np.uint64)
    for fraction in (0.001, 0.02, 0.5):
        assert is_held_out(hashes, fraction).mean() == pytest.approx(fraction, rel=0.1)


def test_named_held_out_files_decide(tmp_path: Path) -> None:
    job = select_job(tmp_path, [[1, 2], [2, 3, 3]], held_out=("yes", "no"))
    assert select_documents(job).duplicates == 2
    assert codes(job) == [2, 2, 0, 1, 0]
    with_duplicates = select_job(
        tmp_path, [[1, 2], [2, 3, 3]], held_out=("yes", "no"), deduplicate=False
    )
    assert select_documents(with_duplicates).duplicates == 0
    assert codes(with_duplicates) == [2, 2, 1, 1, 1]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_length_statistics(lengths: Lengths) -> None:
    counts = Counter(lengths)
    quantiles = length_quantiles(counts)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
        wanted = np.quantile(lengths, q, method="inverted_cdf")
        assert quantiles[name] == wanted
    histogram = length_histogram(counts)
    assert sum(histogram.values()) == len(lengths)
    for low, count in histogram.items():
        assert count == sum(int(low) <= length < 2 * int(low) for length in lengths)


def plain_entropies(stream: list[int], starts: set[int]) -> tuple[float, float]:
    pairs = Counter(p for i, p in enumerate(pairwise(stream)) if i + 1 not in starts)
    total, currents = pairs.total(), Counter[int]()
    for (current, _), count in pairs.items():
        currents[current] += count
    second = -sum(n / total * math.log(n / currents[c]) for (c, _), n in pairs.items())
    first = -sum(n / len(stream) * math.log(n / len(stream)) for n in Counter(stream).values())
    return first, second


@given(
    stream=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    starts=st.sets(st.integers(0, 79)),
    cuts=st.sets(st.integers(1, 79)),
    stretch=st.integers(1, 20),
    merged=st.integers(1, 20),
)
@settings(max_examples=40)
def test_entropies_are_exact_however_the_stream_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    stream: list[int],
    starts: set[int],
    cuts: set[int],
    stretch: int,
    merged: int,
) -> None:
    root = tmp_path_factory.mktemp("pairs")
    tokens = np.zeros(5, np.int64)
    runs: list[tuple[str, int, int]] = []
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "STRETCH_TOKENS", stretch)
        patch.setattr(entropy, "_MERGE_RECORDS", merged)
        for low, high in pairwise(edges):
            url = str(root / str(low))
            lead = min(low, 1)
            counter = PairCounter(url, 5, position=low - lead, stride=1)
            if lead:
                counter.add(piece(stream, starts, low - 1, low), count_tokens=False)
            middle = (low + high) // 2
            counter.add(piece(stream, starts, low, middle))
            counter.add(piece(stream, starts, middle, high))
            counts = counter.finish()
            tokens += counts.tokens
            runs += [(url, *run) for run in counts.runs]
        entropies = unigram_entropy(tokens), bigram_entropy(runs, 5)
    assert entropies == pytest.approx(plain_entropies(stream, starts), abs=1e-9)


def piece(stream: list[int], starts: set[int], low: int, high: int) -> TokenPiece:
    inside = sorted(start - low for start in starts if low <= start < high)
    return TokenPiece(np.array(stream[low:high], np.uint16), np.array(inside, np.int64))


def test_large_splits_count_every_kth_stretch() -> None:
    assert entropy.pair_stride(entropy.MAX_PAIRS) == 1
    assert entropy.pair_stride(entropy.MAX_PAIRS * 10) == 10


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [([1], 4096), ([10**6, 10**5], 4096), ([10**6, 10**9], 32768), ([10**9], 2**20)],
)
def test_automatic_blocks(tokens: list[int], wanted: int) -> None:
    """16 blocks in the smallest domain where 4,096 to 2**20 tokens allow it."""
    assert automatic_block_tokens(tokens) == wanted
    if 4096 < wanted < 2**20:
        assert min(tokens) // wanted >= 16


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 40))
def test_shards_cover_the_stream_and_name_their_parts(parts: list[int], cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raymix.corpus.passes.assemble.SHARD_BYTES", 64)
        jobs = plan_shards("d", "train", parts, block_tokens=cut, vocab_size=257, corpus="c",
                           work="w", key="k")  # fmt: skip
    edges = np.cumsum([0, *parts])
    assert [job.low for job in jobs] == [0, *(job.high for job in jobs[:-1])][: len(jobs)]
    assert (jobs[-1].high if jobs else 0) == edges[-1]
    for job in jobs:
        assert (job.high - job.low) % cut == 0 or job is jobs[-1]
        needed = {n for n in range(len(parts)) for at in range(max(job.low - 1, 0), job.high)
                  if edges[n] <= at < edges[n + 1]}  # fmt: skip
        assert needed <= {number for number, _ in job.parts}
        assert all(before == edges[number] for number, before in job.parts)


TEXTS = ["", "plain", "日本語 é \x00", f"a {END_OF_TEXT} b", "x" * 1000]


def test_byte_ids_are_the_bytes() -> None:
    tokens, lengths = ByteEncoder().encode(TEXTS)
    wanted = [[*text.encode(), 256] for text in TEXTS]
    assert tokens.tolist() == [token for row in wanted for token in row]
    assert lengths.tolist() == [len(row) for row in wanted]
    assert len(ByteEncoder().encode([])[0]) == 0


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_saved_tokenizers_load_in_transformers(tmp_path: Path, kind: str) -> None:
    made = byte_tokenizer() if kind == "byte" else train_bpe(iter(TEXTS * 3), 300)
    loaded = LoadedTokenizer.made(made, kind)
    loaded.save(str(tmp_path))
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert theirs.eos_token_id == loaded.info.eos_id
    assert len(theirs) == loaded.info.vocab_size
    encoder = saved_encoder(str(tmp_path), loaded.info)
    for text in ("plain", "日本語 é \x00"):
        ours = encoder.encode([text])[0].tolist()
        assert ours == [*theirs(text)["input_ids"], loaded.info.eos_id]
        assert theirs.decode(ours, skip_special_tokens=True) == text


def test_no_document_ends_another_one(tmp_path: Path) -> None:
    for kind, made in (("byte", byte_tokenizer()), ("bpe", train_bpe(iter(TEXTS), 300))):
        loaded = LoadedTokenizer.made(made, kind)
        loaded.save(str(tmp_path / kind))
        ids, _ = saved_encoder(str(tmp_path / kind), loaded.info).encode([f"a{END_OF_TEXT}b"])
        assert np.count_nonzero(ids == loaded.info.eos_id) == 1


def test_training_is_deterministic() -> None:
    texts = [f"{n} words of {n * n} kinds, über {n % 7}" for n in range(300)]
    first, second = (train_bpe(iter(texts), 400) for _ in range(2))
    assert fingerprint(first.to_str()) == fingerprint(second.to_str(pretty=True))
    assert first.get_vocab_size() == 400


def save_pretrained(directory: Path, **configuration: object) -> str:
    tokenizer = train_bpe(iter(TEXTS), 300)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if configuration:
        (directory / "tokenizer_config.json").write_text(json.dumps(configuration))
    return str(directory)


def test_pretrained_tokenizer_is_used_whole(tmp_path: Path) -> None:
    """Neither truncated nor padded, whatever the file says; the directory names the end."""
    path = save_pretrained(tmp_path / "t", eos_token={"content": END_OF_TEXT}, extra=1)
    loaded = load_pretrained(PretrainedTokenizer(path=path))
    same = load_pretrained(PretrainedTokenizer(path=f"{path}/tokenizer.json"))
    assert loaded.info == same.info
    loaded.save(str(tmp_path / "c"))
    encoder = saved_encoder(str(tmp_path / "c"), loaded.info)
    assert isinstance(encoder, HuggingFaceEncoder)
    ids, lengths = encoder.encode(["one two three four", "a"])
    assert lengths.sum() == len(ids)
    assert lengths[0] > 4
    saved = json.loads((tmp_path / "c" / "tokenizer" / "tokenizer_config.json").read_text())
    assert saved["extra"] == 1
    assert saved["eos_token"] == END_OF_TEXT


def refusal(**fields: object) -> str:
    with pytest.raises(CorpusError) as caught:
        load_pretrained(PretrainedTokenizer.model_validate(fields))
    return str(caught.value)


def test_unusable_tokenizers_say_why(tmp_path: Path) -> None:
    assert "does not exist" in refusal(path=str(tmp_path / "none"))
    (tmp_path / "x.model").write_text("x")
    assert "holds x.model" in refusal(path=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a Hugging Face tokenizer" in refusal(path=str(tmp_path))
    path = save_pretrained(tmp_path / "t")
    said = refusal(path=path)
    assert "corpus.tokenizer.eos_token = None" in said
    assert f"its special tokens are: {END_OF_TEXT}" in said
    assert f"Did you mean '{END_OF_TEXT}'?" in refusal(path=path, eos_token="<|endoftex|>")
