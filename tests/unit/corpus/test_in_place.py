"""Corpora whose tokens stay in the files that they are in: splits, checks, and what they refuse."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.corpus import prepare
from raymix.errors import CorpusError, RecipeError
from raymix.laws.entropy import entropy_shares
from raymix.recipe import CorpusConfig
from raymix.store import Corpus, Manifest
from raymix.streaming.blocks.sources import LocalSource
from tests.support.token_corpora import FIXTURES

EOS = 256


def write_datatrove(path: Path, lengths: list[int], seed: int = 0) -> np.ndarray:
    """Write documents of so many ids, end-of-text among them; return all ids."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 256, sum(lengths)).astype(np.uint16)
    ends = np.cumsum(lengths)
    ids[ends[np.array(lengths) > 0] - 1] = EOS
    ids.tofile(path)
    Path(f"{path}.index").write_bytes(ends.astype("<u8").tobytes())
    return ids


def config(path: Path, train: str | list[str], **options: Any) -> CorpusConfig:
    domain_keys = ("valid", "format", "eos_at", "token_dtype")
    domain = {key: options.pop(key) for key in domain_keys if key in options}
    document = {
        "path": str(path),
        "in_place": True,
        "domains": [{"name": "d", "train": train, **domain}],
        "block_tokens": 16,
    }
    return CorpusConfig.model_validate({**document, **options})


def prepared(path: Path, train: str | list[str], **options: Any) -> Corpus:
    prepare(config(path, train, **options), parallelism=0)
    return Corpus.open(str(path))


def stream(corpus: Corpus, split: Any) -> list[int]:
    blocks = range(corpus.split("d", split).blocks)
    return [i for n in blocks for i in corpus.read_block("d", split, n).tokens.tolist()]


@settings(max_examples=25, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), min_size=1,
                   max_size=4),
    fraction=st.sampled_from([0.01, 0.2, 0.5, 0.9]),
)  # fmt: skip
def test_splits_are_ranges_of_whole_documents(
    files: list[list[int]], fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    ids = [write_datatrove(folder / f"{n}.ds", file, n) for n, file in enumerate(files)]
    corpus = prepared(folder / "c", str(folder / "*.ds"), valid_fraction=fraction)
    tokens = np.concatenate(ids)
    train, valid = corpus.split("d", "train"), corpus.split("d", "valid")
    assert stream(corpus, "train") + stream(corpus, "valid") == tokens.tolist()
    lengths = [length for file in files for length in file if length]
    stored = [*corpus.document_lengths("d", "train"), *corpus.document_lengths("d", "valid")]
    assert stored == lengths
    starts = np.cumsum([0, *lengths])[:-1]
    held_out = starts[starts >= int((1 - fraction) * len(tokens))]
    cut = next((s for s in held_out.tolist() if s), None) or (starts[-1] or len(tokens))
    assert train.tokens == cut
    assert valid.documents == len(lengths) - train.documents


def test_files_named_as_held_out_are(tmp_path: Path) -> None:
    train = write_datatrove(tmp_path / "t.ds", [5, 40])
    valid = write_datatrove(tmp_path / "v.ds", [9])
    corpus = prepared(tmp_path / "c", str(tmp_path / "t.ds"), valid=str(tmp_path / "v.ds"))
    assert stream(corpus, "train") == train.tolist()
    assert stream(corpus, "valid") == valid.tolist()


def test_something_is_always_left_to_train_on(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "t.ds", [1, 1, 5])
    corpus = prepared(tmp_path / "c", str(tmp_path / "t.ds"), valid_fraction=0.9)
    assert corpus.document_lengths("d", "train").tolist() == [1]


def test_a_block_inside_one_file_is_a_view_of_it(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "t.ds", [100, 5])
    corpus = prepared(tmp_path / "c", str(tmp_path / "t.ds"))
    tokens = corpus.read_block("d", "train", 1).tokens
    assert tokens.base is not None
    assert not tokens.flags.writeable
    assert sum(file.stat().st_size for file in (tmp_path / "c").rglob("*") if "token" not in
               str(file.parent) and file.is_file()) < 8192  # fmt: skip


def test_the_fingerprint_is_of_the_tokens_and_not_of_the_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_datatrove(tmp_path / name / "t.ds", [30, 20, 9])
    first, second = (prepared(tmp_path / f"c{n}", str(tmp_path / n / "t.ds")) for n in "ab")
    assert first.fingerprint == second.fingerprint
    assert pickle.loads(pickle.dumps(first)).fingerprint == first.fingerprint
    other = prepared(tmp_path / "cc", str(tmp_path / "a" / "t.ds"), valid_fraction=0.5)
    assert other.fingerprint != first.fingerprint
    write_datatrove(tmp_path / "b" / "t.ds", [30, 20, 9], seed=1)
    assert prepared(tmp_path / "cd", str(tmp_path / "b" / "t.ds")).fingerprint != first.fingerprint


def test_the_fingerprint_is_the_same_in_another_format(tmp_path: Path) -> None:
    ids = write_datatrove(tmp_path / "t.ds", [30, 20, 9])
    ids.astype(np.uint32).tofile(tmp_path / "t.bin")
    raw = {"format": "nanogpt", "token_dtype": "uint32"}
    first = prepared(tmp_path / "a", str(tmp_path / "t.ds"))
    second = prepared(tmp_path / "b", str(tmp_path / "t.bin"), **raw)
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("change", ["touch", "truncate", "index", "remove"])
def test_a_file_that_changed_is_refused_before_it_is_read(change: str, tmp_path: Path) -> None:
    write_datatrove(tmp_path / "t.ds", [30, 20, 9])
    path = str(tmp_path / "t.ds")
    corpus = prepared(tmp_path / "c", path)
    if change == "touch":
        os.utime(path, ns=(5, 5))
    elif change == "truncate":
        os.truncate(path, 50)
    elif change == "index":
        os.utime(path + ".index", ns=(5, 5))
    else:
        os.unlink(path)
    with pytest.raises(CorpusError, match=r"file = '.*t\.ds.*': (it has changed|cannot be read)"):
        corpus.read_block("d", "train", 0)
    # Not opened before: `train` begins by this.
    with pytest.raises(CorpusError, match=r"has changed|cannot be read"):
        prepare(config(tmp_path / "c", path), parallelism=0)
    if change == "touch":
        assert prepare(config(tmp_path / "c", path), parallelism=0, if_exists="new")


def test_end_of_text_is_checked_at_the_ends_of_documents(tmp_path: Path) -> None:
    ids = write_datatrove(tmp_path / "t.ds", [30, 20, 9])
    ids[-1] = 7
    ids.tofile(tmp_path / "t.ds")
    path = str(tmp_path / "t.ds")
    with pytest.raises(CorpusError, match=r"last document ends with id 7 and not .* 256"):
        prepared(tmp_path / "c", path)
    assert prepared(tmp_path / "c", path, eos_at="none").split("d", "train").documents == 2
    with pytest.raises(CorpusError, match="begins with id"):
        prepared(tmp_path / "c2", path, eos_at="start")


def test_a_file_without_end_of_text_is_not_taken_for_one_document(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(60, dtype=np.uint16))
    with pytest.raises(CorpusError, match="begins no document"):
        prepared(tmp_path / "c", str(tmp_path / "t.npy"))
    corpus = prepared(tmp_path / "c", str(tmp_path / "t.npy"), eos_at="none")
    assert corpus.document_lengths("d", "train").tolist() == [60]


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    ids = write_datatrove(tmp_path / "t.ds", [30, 20, 9])
    ids[3] = 9999
    ids.tofile(tmp_path / "t.ds")
    with pytest.raises(CorpusError, match=r"token 3 is 9,999, outside the vocabulary of 257 ids"):
        prepared(tmp_path / "c", str(tmp_path / "t.ds"))


def test_raw_ids_are_never_guessed(tmp_path: Path) -> None:
    ids = write_datatrove(tmp_path / "t.ds", [30, 20, 9])
    ids.tofile(tmp_path / "t.bin")
    with pytest.raises(CorpusError, match=r"corpus.domains.0.train = .*neither an .idx"):
        prepared(tmp_path / "c", str(tmp_path / "t.bin"))
    corpus = prepared(tmp_path / "c", str(tmp_path / "t.bin"), format="nanogpt")
    assert corpus.document_lengths("d", "train").tolist() == [30, 20]
    # Searched for once: 8 bytes per document are kept.
    assert (tmp_path / "c" / "d" / "index" / "00000.starts").stat().st_size == 24


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "a.ds", [30])
    write_datatrove(tmp_path / "b.ds", [30])
    os.unlink(tmp_path / "a.ds.index")
    os.truncate(tmp_path / "b.ds.index", 4)
    with pytest.raises(CorpusError) as caught:
        prepared(tmp_path / "c", str(tmp_path / "*.ds"))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "mds"}, "cannot be read in place"),
        ({"format": "parquet"}, "cannot be read in place"),
        ({"tokenizer": {"train": "bpe", "vocab_size": 300}}, "need the tokenizer's ids"),
    ],
)
def test_recipes_that_cannot_be_read_in_place(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        config(tmp_path / "c", "x", **options)


def test_other_files_and_remote_ones_cannot_be_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CorpusError, match=r"format text cannot be read in place"):
        prepared(tmp_path / "c", str(tmp_path / "a.txt"))
    with pytest.raises(CorpusError, match="no local file"):
        prepared(tmp_path / "c", "memory://a/b.ds", format="datatrove")


def test_an_index_of_ours_needs_a_local_corpus(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "t.ds", [30, 20])
    shutil.copy(tmp_path / "t.ds", tmp_path / "t.bin")
    local = config(tmp_path / "c", str(tmp_path / "t.bin"), format="nanogpt")
    remote = local.model_copy(update={"path": "memory://in-place"})
    with pytest.raises(CorpusError, match=r"corpus.path = 'memory://.*no local directory"):
        prepare(remote, parallelism=0)


@pytest.mark.parametrize(
    ("case", "train", "kind"),
    [
        ("megatron", "text_document", "megatron"),
        ("megatron", "*", "auto"),
        ("megatron", "text_document.idx", "megatron"),
        ("litdata", "", "litdata"),
        ("litdata", "*", "auto"),
    ],
)
def test_data_sets_may_be_named_as_their_owners_name_them(
    case: str, train: str, kind: str, tmp_path: Path
) -> None:
    corpus = prepared(tmp_path / "c", str(FIXTURES / case / train), format=kind)
    arrays = np.load(FIXTURES / "expected.npz")
    tokens = stream(corpus, "train") + stream(corpus, "valid")
    assert tokens == arrays[f"{case}/tokens"].tolist()


def test_an_index_alone_is_no_source(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "t.ds", [30, 20])
    with pytest.raises(CorpusError, match="only indices of token files match"):
        prepared(tmp_path / "c", str(tmp_path / "*.index"))


def test_one_document_is_trained_on(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "t.ds", [30])
    corpus = prepared(tmp_path / "c", str(tmp_path / "t.ds"))
    assert corpus.split("d", "train").tokens == 30
    assert corpus.split("d", "valid").tokens == 0


def test_blocks_come_by_the_sources_that_training_reads(tmp_path: Path) -> None:
    ids = write_datatrove(tmp_path / "t.ds", [30, 20, 50])
    corpus = prepared(tmp_path / "c", str(tmp_path / "t.ds"))
    batches = LocalSource(corpus, row_tokens=8).fetch([0, 2])
    assert np.concatenate([batch.rows_NL.ravel() for batch in batches]).tolist() == [
        *ids[:16].tolist(), *ids[32:48].tolist()
    ]  # fmt: skip


def test_entropies_are_not_known(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "t.ds", [30, 20])
    corpus = prepared(tmp_path / "c", str(tmp_path / "t.ds"))
    with pytest.raises(ValueError, match="not counted"):
        entropy_shares(corpus.manifest.domains)


def test_manifests_before_the_format_are_read_as_they_were(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "t.ds", [30, 20])
    manifest = prepared(tmp_path / "c", str(tmp_path / "t.ds")).manifest
    assert (manifest.format, manifest.in_place) == (2, True)
    copied = prepared(tmp_path / "d", str(tmp_path / "t.ds"), in_place=False).manifest
    assert (copied.format, copied.in_place) == (1, False)
    assert Manifest.model_validate_json(copied.model_dump_json()) == copied


def test_clearing_leaves_the_files_of_others(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "t.ds", [30, 20])
    shutil.copy(tmp_path / "t.ds", tmp_path / "t.bin")
    train = str(tmp_path / "t.bin")
    prepared(tmp_path / "c", train, format="nanogpt")
    prepare(config(tmp_path / "c", train, format="nanogpt"), parallelism=0, if_exists="new")
    assert (tmp_path / "t.bin").stat().st_size == 100
