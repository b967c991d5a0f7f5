"""The stream without Ray: the same batches whatever the ranks, restarts and budgets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymix.errors import CorpusError, RecipeError, TrainingError
from raymix.mixers import DomainStats, Planned
from raymix.sampling import realized_error_bound
from raymix.store import Corpus
from tests.support.corpora import labeled_domain, write_corpus
from tests.support.streams import (
    BLOCK,
    ROW,
    TokensMixer,
    fixed,
    local,
    local_stream,
    packed,
    read,
    slow_rows,
    small_corpus,
)

SHARES = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("length", [ROW, 20, BLOCK])
def test_rows_are_what_a_slow_reader_finds(corpus: Corpus, length: int) -> None:
    data = packed(sequence_length=length)
    stream = local_stream(corpus, local(fixed(SHARES), corpus), data)
    seen = read(stream, 60)  # several epochs, short last blocks among them
    for step, (tokens, starts, labels) in zip(
        seen, slow_rows(corpus, stream.log.entries, data, 60), strict=True
    ):
        np.testing.assert_array_equal(step.tokens, tokens)
        assert step.starts == starts
        assert step.label_tokens == labels


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_batches_that_one_rank_would_read(corpus: Corpus, world_size: int) -> None:
    whole = read(local_stream(corpus, local(fixed(SHARES), corpus)), 40)
    parts = [
        read(
            local_stream(corpus, local(fixed(SHARES), corpus), rank=rank, world_size=world_size),
            40,
        )
        for rank in range(world_size)
    ]
    for alone, *together in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(alone.tokens, np.concatenate([p.tokens for p in together]))
        assert alone.starts == [starts for part in together for starts in part.starts]
        assert {part.batch_hash for part in together} == {alone.batch_hash}
        assert {part.label_tokens for part in together} == {alone.label_tokens}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(0, 40), world_size=st.integers(1, 3))
def test_a_run_resumes_anywhere_on_any_number_of_ranks(
    corpus: Corpus, stop: int, world_size: int
) -> None:
    whole = read(local_stream(corpus, local(fixed(SHARES), corpus)), 45)
    stream = local_stream(corpus, local(fixed(SHARES), corpus), rank=0, world_size=world_size)
    read(stream, stop)
    state = json.loads(json.dumps(stream.state_dict()))
    again = local_stream(corpus, local(fixed(SHARES), corpus), state=state)
    assert again.step == stop
    assert [s.batch_hash for s in read(again, 45 - stop)] == [s.batch_hash for s in whole[stop:]]


def test_a_budget_of_a_few_blocks_changes_nothing_but_what_is_held(corpus: Corpus) -> None:
    whole = read(local_stream(corpus, local(fixed(SHARES), corpus)), 80)
    tight = local_stream(corpus, local(fixed(SHARES), corpus), budget_bytes=8 * BLOCK * 2)
    for step, alike in zip(read(tight, 80), whole, strict=True):
        assert step.batch_hash == alike.batch_hash
        np.testing.assert_array_equal(step.tokens, alike.tokens)


def test_batches_stay_valid_while_they_are_held(corpus: Corpus) -> None:
    stream = local_stream(corpus, local(fixed(SHARES), corpus))
    batches = [stream.next() for _ in range(50)]
    fresh = read(local_stream(corpus, local(fixed(SHARES), corpus)), 50)
    for batch, seen in zip(batches, fresh, strict=True):
        np.testing.assert_array_equal(batch.tokens, seen.tokens)
        assert batch.label_tokens == seen.label_tokens
        assert batch.batch_hash == seen.batch_hash


def test_realized_shares_keep_the_proved_bound_at_every_step(corpus: Corpus) -> None:
    controller = local(fixed(SHARES), corpus)
    stream = local_stream(corpus, controller)
    requested_rows, given_rows = np.zeros(3), np.zeros(3)
    generator = np.random.default_rng(0)
    for step in range(300):
        if step % 7 == 3:
            controller.set_weights(generator.dirichlet([0.3] * 3).tolist())
        batch = stream.next()
        requested_rows += batch.shares * 6
        given_rows += batch.counts_D
        assert batch.counts_D.sum() == 6
        assert np.bincount(batch.domain_rows, minlength=3).tolist() == batch.counts_D.tolist()
        assert (requested_rows - given_rows).max() <= realized_error_bound(3) + 1e-9
        assert (given_rows - requested_rows).max() <= 1 - 1 / 3 + 1e-9


def test_asked_weights_hold_from_the_step_told(corpus: Corpus) -> None:
    controller = local(fixed(SHARES), corpus)
    stream = local_stream(corpus, controller)
    for _ in range(20):
        batch = stream.next()
    first = controller.set_weights({"d1": 1.0})
    while batch.step < first - 1:
        batch = stream.next()
        assert batch.shares.tolist() == list(SHARES)
    batch = stream.next()
    assert batch.step == first
    assert batch.counts_D.tolist() == [0, 6, 0]
    assert set(batch.domain_rows.tolist()) == {1}


def test_a_schedule_changes_exactly_at_its_steps(corpus: Corpus) -> None:
    pieces = [np.array(p, float) for p in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]
    mixer = Planned("schedule", pieces, boundaries=(0, 7, 8))
    stream = local_stream(corpus, local(mixer, corpus))
    domains = [set(stream.next().domain_rows.tolist()) for _ in range(12)]
    assert domains == [{0}] * 7 + [{1}] + [{2}] * 4


def test_adaptive_weights_are_a_function_of_what_was_read(corpus: Corpus) -> None:
    def run(stop: int | None) -> tuple[list[str], list[str]]:
        controller = local(TokensMixer(3), corpus, probe_interval=5)
        stream = local_stream(corpus, controller)
        hashes, tokens_D = [], np.zeros(3, np.int64)
        while stream.step < 60:
            batch = stream.next()
            hashes.append(batch.batch_hash)
            tokens_D += batch.counts_D * ROW
            if (batch.step + 1) % 5 == 0:
                window = batch.step // 5
                loss_D = np.full(3, np.nan)
                stats = DomainStats(step=5 * window, window=5, tokens_D=tokens_D, loss_D=loss_D)
                controller.push(window, stats)
                tokens_D = np.zeros(3, np.int64)
            if stream.step == stop:
                saved = json.loads(json.dumps([stream.state_dict(), controller.snapshot(stop)]))
                controller = local(TokensMixer(3), corpus, probe_interval=5, snapshot=saved[1])
                stream = local_stream(corpus, controller, state=saved[0])
        # How far the last lease reached beyond what was read depends on the time.
        read = [line for line in stream.log.to_lines() if json.loads(line)["first_step"] < 60]
        return hashes, read

    hashes, log = run(None)
    assert len(log) > 8
    # At a window's edge, as what is in the middle of one is the training loop's to keep.
    assert run(30) == (hashes, log)


def test_without_statistics_an_adaptive_mixer_says_what_it_misses(corpus: Corpus) -> None:
    stream = local_stream(corpus, local(TokensMixer(3), corpus, probe_interval=5))
    read(stream, 10)
    with pytest.raises(TrainingError, match="statistics of steps before 10, never pushed"):
        stream.next()


def test_a_domain_at_its_cap_leaves_its_share_to_the_others(corpus: Corpus) -> None:
    data = packed(max_epochs={"d0": 1.0})
    stream = local_stream(corpus, local(fixed(SHARES), corpus), data)
    counts = np.array([batch.counts for batch in read(stream, 60)])
    rows = corpus.split("d0", "train").tokens // BLOCK * (BLOCK // ROW) + 40 // ROW
    assert counts.sum(axis=0)[0] == rows
    assert (counts.sum(axis=1) == 6).all()
    late = counts[-20:].sum(axis=0)
    assert abs(late[1] - 120 * 0.6) <= 2


def test_the_last_step_is_the_limit(corpus: Corpus) -> None:
    stream = local_stream(corpus, local(fixed(SHARES), corpus), limit=3)
    assert [stream.next().step for _ in range(3)] == [0, 1, 2]
    assert stream.done
    with pytest.raises(StopIteration):
        stream.next()


def test_zero_weights_are_never_read(corpus: Corpus) -> None:
    stream = local_stream(corpus, local(fixed((0.5, 0, 0.5)), corpus))
    assert all(step.counts[1] == 0 for step in read(stream, 50))


def test_another_corpus_is_refused_unless_told_otherwise(corpus: Corpus, tmp_path: Path) -> None:
    other = small_corpus(tmp_path, tokens=6 * BLOCK)
    stream = local_stream(corpus, local(fixed(SHARES), corpus))
    read(stream, 3)
    state = stream.state_dict()
    with pytest.raises(CorpusError, match="made with another corpus"):
        local_stream(other, local(fixed(SHARES), other), state=state)
    data = packed(accept_changed_corpus=True)
    assert local_stream(other, local(fixed(SHARES), other), data, state=state).next().step == 3
    with pytest.raises(RecipeError, match=r"data\.sequence_length = 8: .* made with 16"):
        local_stream(corpus, local(fixed(SHARES), corpus), packed(sequence_length=8), state=state)


def test_rows_longer_than_a_block_are_refused(corpus: Corpus) -> None:
    with pytest.raises(RecipeError, match="longer than a block of the corpus, 96 tokens"):
        local_stream(corpus, local(fixed(SHARES), corpus), packed(sequence_length=BLOCK + 1))


def test_a_domain_of_max_epochs_must_exist(corpus: Corpus) -> None:
    with pytest.raises(RecipeError, match=r"data\.max_epochs\.d9 = 2\.0: .*no such domain"):
        local_stream(corpus, local(fixed(SHARES), corpus), packed(max_epochs={"d9": 2.0}))


def test_a_corrupt_block_is_named_when_its_turn_comes(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    shard = tmp_path / "d1" / "train" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    tokens = corpus.read_block("d1", "train", 4).tokens.tobytes()
    content[content.index(tokens) + 5] ^= 0xFF
    shard.write_bytes(bytes(content))
    stream = local_stream(Corpus.open(str(tmp_path)), local(fixed((1, 0, 0)), corpus))
    read(stream, 50)  # its domain is not read
    stream = local_stream(Corpus.open(str(tmp_path)), local(fixed(SHARES), corpus))
    with pytest.raises(CorpusError, match=r"d1/train/shard-00001\.arrow, block 1 of the file"):
        read(stream, 60)


def test_many_domains_of_very_different_weights(tmp_path: Path) -> None:
    corpus = write_corpus(
        tmp_path / "many",
        {f"d{d}": labeled_domain(d % 16, 2 * ROW, 9.0) for d in range(64)},
        block_tokens=2 * ROW,
    )
    weights = np.random.default_rng(0).dirichlet([0.2] * 64)
    stream = local_stream(corpus, local(fixed(weights.tolist()), corpus))
    counts = np.sum([step.counts for step in read(stream, 200)], axis=0)
    assert np.abs(counts - 1200 * weights).max() <= realized_error_bound(64) + 1
