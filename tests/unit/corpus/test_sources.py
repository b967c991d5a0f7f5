"""Sources and parts: which files a glob means, and how they are cut into work."""

from __future__ import annotations

import glob
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.corpus.read.file_formats import file_format
from raymix.corpus.read.globs import expand
from raymix.corpus.read.parts import MIN_PART_BYTES, plan_parts
from raymix.corpus.read.sources import find_sources
from raymix.errors import CorpusError
from raymix.recipe import CorpusConfig, DomainConfig
from raymix.store import atomic_write_bytes
from raymix.store.remote import files

TREE = ("a.jsonl", "b.jsonl", "b.txt", ".hidden.jsonl", "x/c.jsonl", "x/y/d.jsonl", "x/y/.e.jsonl")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name in TREE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "x"}\n')
    return root


def names(root: Path, pattern: str) -> list[str]:
    matches = expand("p", f"{root}/{pattern}")
    return [str(Path(url).relative_to(root)) for url, _ in matches]


@pytest.mark.parametrize(
    "pattern",
    ["*.jsonl", "?.jsonl", "[ab].jsonl", "[!a].jsonl", "*", "**/*.jsonl", "x/**/d.jsonl", "*/*"],
)
def test_globs_mean_what_python_says(tree: Path, pattern: str) -> None:
    wanted = sorted(
        name
        for name in glob.glob(pattern, root_dir=tree, recursive=True)
        if (tree / name).is_file()
    )
    assert names(tree, pattern) == wanted


@given(st.text("ab.[]*?!{}+ ", min_size=1, max_size=12).filter(lambda name: name.strip(". ")))
def test_escaped_names_mean_themselves(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.mktemp(glob.escape("odd [dir]"))
    (root / name).write_text("x")
    (root / "a").write_text("x")
    matches = expand("p", glob.escape(str(root / name)))
    assert [url for url, _ in matches] == [str(root / name)]


def test_hidden_files_need_a_dot(tree: Path) -> None:
    assert names(tree, ".*.jsonl") == [".hidden.jsonl"]


def test_globs_work_on_any_store() -> None:
    for name in ("b", "a", "sub/c"):
        atomic_write_bytes(f"memory://raymix-glob/{name}.txt", b"x")
    urls = [url for url, _ in expand("p", "memory://raymix-glob/**/*.txt")]
    assert [url.rsplit("raymix-glob/")[-1] for url in urls] == ["a.txt", "b.txt", "sub/c.txt"]
    assert all(files.read_bytes(url) == b"x" for url in urls)
    files.remove("memory://raymix-glob")


def config(tmp: Path, **domain: object) -> CorpusConfig:
    return CorpusConfig.model_validate(
        {"path": str(tmp / "corpus"), "domains": [{"name": "d", **domain}]}
    )


def refusal(corpus_config: CorpusConfig) -> str:
    with pytest.raises(CorpusError) as caught:
        find_sources(corpus_config)
    return str(caught.value)


def test_glob_without_match_names_it_and_what_is_there(tree: Path) -> None:
    said = refusal(config(tree, train=f"{tree}/*.parquet"))
    assert f"corpus.domains.0.train = '{tree}/*.parquet': no file matches" in said
    assert "holds .hidden.jsonl, a.jsonl, b.jsonl, b.txt, x" in said


def test_missing_file_names_the_nearest(tree: Path) -> None:
    assert "Did you mean 'b.txt'?" in refusal(config(tree, train=f"{tree}/bb.txt"))
    said = refusal(config(tree, train=f"{tree}/nowhere/deep/c.jsonl"))
    assert f"no such file. {tree} holds" in said


def test_every_fault_is_told_at_once(tree: Path) -> None:
    both = [f"{tree}/none*", f"{tree}/no.jsonl", f"{tree}/x/../b.md"]
    assert len(refusal(config(tree, train=both)).splitlines()) == 3


def chosen(root: Path, *train: str, **fields: object) -> tuple[list[str], list[str]]:
    """Return the names of the files that patterns below `root` mean, and the notes."""
    notes: list[str] = []
    patterns = [f"{root}/{pattern}".rstrip("/") for pattern in train]
    sources = find_sources(config(root.parent, train=patterns, **fields), notes.append)
    return [str(Path(file.url).relative_to(root)) for file in sources["d"].train], notes


def written(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("x\n")
    return root


def test_a_directory_means_the_files_below_it(tree: Path) -> None:
    assert chosen(tree, "x") == (["x/c.jsonl", "x/y/d.jsonl"], [])


def test_a_directory_of_several_splits_is_refused(tmp_path: Path) -> None:
    hub = written(tmp_path / "hub", "data/train-00000.parquet", "data/test-00000.parquet")
    said = refusal(config(tmp_path, train=str(hub)))
    assert "a directory with files of several splits (test: 1, train: 1)" in said
    assert f"{hub}/data/te" in said
    # A pattern that names one of them is taken at its word.
    assert chosen(hub, "data/train*")[0] == ["data/train-00000.parquet"]


@pytest.mark.parametrize(
    "others",
    [
        ("_SUCCESS", "lang=en/.part-0.c000.parquet.crc", "part-0.crc"),
        ("_delta_log/00000.json", "_committed_123", "_started_123"),
        ("_metadata", "_common_metadata", "_temporary/0/part-0.parquet"),
        ("README.md", "LICENSE", "dataset_infos.json"),
        ("dataset_info.json", "state.json", "dataset_dict.json"),
        ("data-00000.parquet.lock", "x.incomplete"),
    ],
)
def test_files_that_hold_no_documents_are_left_out(tmp_path: Path, others: tuple[str, ...]) -> None:
    root = written(tmp_path / "spark", "lang=en/part-0.c000.snappy.parquet", *others)
    for patterns in (["**"], [""]):
        names, (note,) = chosen(root, *patterns)
        assert names == ["lang=en/part-0.c000.snappy.parquet"]
        visible = [name for name in others if "/." not in name]
        assert all(name in note for name in visible)


def test_a_directory_above_may_have_any_name(tmp_path: Path) -> None:
    root = written(tmp_path / "_temporary" / "mine", "a.jsonl", "b.jsonl", "_SUCCESS")
    assert chosen(root, "**")[0] == chosen(root, "*")[0] == ["a.jsonl", "b.jsonl"]


def test_a_readme_among_texts_is_a_text(tmp_path: Path) -> None:
    root = written(tmp_path / "docs", "README.md", "guide.md")
    assert chosen(root, "*.md") == (["README.md", "guide.md"], [])


def test_a_file_under_several_names_is_read_once(tmp_path: Path) -> None:
    root = written(tmp_path / "linked", "ok.jsonl", "sub/other.jsonl")
    (root / "link.jsonl").symlink_to(root / "ok.jsonl")
    (root / "sub" / "hard.jsonl").hardlink_to(root / "ok.jsonl")
    (root / "sub" / "loop").symlink_to(root)
    names, (note,) = chosen(root, "link.jsonl", "ok.jsonl")
    assert names == ["link.jsonl"]
    assert f"{root}/ok.jsonl is {root}/link.jsonl" in note
    names, _ = chosen(root, "**")
    assert names == ["link.jsonl", "sub/other.jsonl"]
    assert chosen(root, "sub/./other.jsonl", "sub/other.jsonl") == (["sub/other.jsonl"], [])
    said = refusal(config(tmp_path, train=f"{root}/ok.jsonl", valid=f"{root}/link.jsonl"))
    assert "both trained on and held out" in said


def test_a_pattern_listed_again_is_read_once_and_said(tree: Path) -> None:
    names, (note,) = chosen(tree, "a.jsonl", "a.jsonl", "a.jsonl")
    assert names == ["a.jsonl"]
    assert "listed 3 times and read once" in note
    # Two patterns that overlap are ordinary.
    assert chosen(tree, "*.jsonl", "a.jsonl") == (["a.jsonl", "b.jsonl"], [])


def test_a_file_is_in_one_split_only(tree: Path) -> None:
    said = refusal(config(tree, train=f"{tree}/*.jsonl", valid=f"{tree}/a.jsonl"))
    assert "both trained on and held out" in said


def test_sources_may_not_lie_where_the_corpus_goes(tmp_path: Path) -> None:
    (tmp_path / "d" / "train").mkdir(parents=True)
    (tmp_path / "d" / "train" / "a.txt").write_text("x")
    inside = {"name": "d", "train": f"{tmp_path}/d/train/*.txt"}
    corpus_config = CorpusConfig.model_validate({"path": str(tmp_path), "domains": [inside]})
    assert "where the prepared corpus of the domain goes" in refusal(corpus_config)


def test_order_is_that_of_the_globs_then_sorted(tree: Path) -> None:
    sources = find_sources(config(tree, train=[f"{tree}/b.*", f"{tree}/*.jsonl"], format="text"))
    assert [Path(file.url).name for file in sources["d"].train] == ["b.jsonl", "b.txt", "a.jsonl"]


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.parquet", "parquet", None),
        ("a.JSONL.gz", "jsonl", "gzip"),
        ("a.b.jsonl.zst", "jsonl", "zstd"),
        ("a.txt.bz2", "text", "bz2"),
        ("a.arrow", "arrow", None),
        ("a.parquet.gzip", "parquet", "gzip"),
        ("a.csv.gz", "csv", "gzip"),
        ("a.tsv", "csv", None),
        ("setup.py", "text", None),
    ],
)
def test_format_goes_by_the_ending(name: str, kind: str, compression: str | None) -> None:
    domain = DomainConfig(name="d", train=("x",))
    assert file_format("p", f"/x/{name}", domain) == (kind, compression)


@pytest.mark.parametrize("name", ["a", "a.gz", "a.docx", "jsonl"])
def test_unknown_ending_says_what_to_set(name: str) -> None:
    domain = DomainConfig(name="d", train=("x",))
    with pytest.raises(CorpusError, match=r"known endings: parquet.*set `format` of domain 'd'"):
        file_format("p", f"/x/{name}", domain)
    assert file_format("p", name, domain.model_copy(update={"format": "text"}))[0] == "text"


def plan(tmp: Path, **domain: object) -> list[tuple[str, int, int | None]]:
    corpus_config = config(tmp, **domain)
    parts = plan_parts(corpus_config.domains, find_sources(corpus_config))["d"]
    return [(p.held_out, s.low, s.high) for p in parts for s in p.slices]


def test_parquet_is_cut_by_row_groups(tmp_path: Path) -> None:
    table = pa.table({"text": ["abcdefgh" * (MIN_PART_BYTES // 16)] * 4, "id": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1, compression="none",
                   use_dictionary=False)  # fmt: skip
    corpus_config = config(tmp_path, train=f"{tmp_path}/a.parquet")
    parts = plan_parts(corpus_config.domains, find_sources(corpus_config))["d"]
    assert [[(s.low, s.high) for s in part.slices] for part in parts] == [
        [(0, 1)], [(1, 2)], [(2, 3)], [(3, 4)],
    ]  # fmt: skip


def test_lines_are_cut_by_bytes_and_the_rest_by_files(tmp_path: Path) -> None:
    size = 5 * MIN_PART_BYTES // 2
    (tmp_path / "a.jsonl").write_bytes(b"x" * size)
    (tmp_path / "a.txt").write_bytes(b"x" * size)
    edges = [0, size // 2, size]
    ranges = [("by hash", low, high) for low, high in pairwise(edges)]
    assert plan(tmp_path, train=f"{tmp_path}/a.jsonl") == ranges
    assert plan(tmp_path, train=f"{tmp_path}/a.txt", text_unit="line") == ranges
    assert plan(tmp_path, train=f"{tmp_path}/a.txt") == [("by hash", 0, None)]


def test_held_out_files_come_first(tree: Path) -> None:
    slices = plan(tree, train=f"{tree}/a.jsonl", valid=f"{tree}/b.jsonl")
    assert [held_out for held_out, *_ in slices] == ["yes", "no"]


def unplannable(tmp: Path, **domain: object) -> str:
    with pytest.raises(CorpusError) as caught:
        plan(tmp, **domain)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_wrong_column_lists_those_found(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    table = pa.table({"id": [1], "body": ["x"], "ids": [[1, 2]]})
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    said = unplannable(tmp_path, train=str(path))
    assert f"d.text_column = 'text': no such column in {path}" in said
    assert "the columns found are: id, body, ids" in said
    assert "of type int64" in unplannable(tmp_path, train=str(path), text_column="id")
    assert "not a list of integers" in unplannable(tmp_path, train=str(path), tokens_column="id")
    assert plan(tmp_path, train=str(path), tokens_column="ids")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"ARROW1\0\0", b"\xff" * 1000, b"PAR1" * 100])
def test_unreadable_file_is_named(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"bad.{kind}"
    path.write_bytes(content)
    assert f"file = '{path}': cannot be read as {kind}" in unplannable(tmp_path, train=str(path))


def test_parts_do_not_depend_on_anything_but_the_files(tree: Path) -> None:
    corpus_config = config(tree, train=f"{tree}/**/*.jsonl")
    first, second = (
        plan_parts(corpus_config.domains, find_sources(corpus_config)) for _ in range(2)
    )
    assert first == second
    assert [part.key() for part in first["d"]] == [part.key() for part in second["d"]]
