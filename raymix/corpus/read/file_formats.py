"""File formats: which reader a file needs, by its name unless the recipe says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from raymix.errors import CorpusError
from raymix.recipe import DomainConfig
from raymix.store.formats.detect import INDEX_JSON, detect
from raymix.store.formats.info import TokenFormat
from raymix.store.remote.errors import is_remote

Format = Literal["parquet", "jsonl", "csv", "text", "arrow"] | TokenFormat

_FORMATS: dict[str, Format] = {
    "parquet": "parquet",
    "pq": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    # Hugging Face datasets name JSON Lines files .json; others hold one array of records.
    "json": "jsonl",
    "csv": "csv",
    "tsv": "csv",
    "txt": "text",
    "text": "text",
    "md": "text",
    "arrow": "arrow",
    "ipc": "arrow",
    "feather": "arrow",
}
# Source code and markup are plain text under other names.
_TEXT_ENDING = re.compile(
    r"bash|c|cc|clj|cpp|cs|css|cu|ex|f90|go|h|hpp|hs|html?|java|jl|js|kt|lua|mjs|ml|php|pl|pyi?|r|rb"
    r"|rs|rst|scala|sh|sql|swift|tex|toml|tsx?|vue|xml|ya?ml|yml|zig"
)
_COMPRESSIONS = {
    "gz": "gzip",
    # pandas' documentation names its files so.
    "gzip": "gzip",
    "zst": "zstd",
    "zstd": "zstd",
    "bz2": "bz2",
}

# Written beside the data by Spark, Hive, Hadoop and Delta Lake, and by Hugging Face datasets.
_BOOKKEEPING = re.compile(
    r"(?:.*/)?(?:_(?:SUCCESS|metadata|common_metadata|started_.*|committed_.*|commit_.*)"
    r"|(?:_delta_log|_temporary|_spark_metadata|_change_data|_symlink_format_manifest)/.*"
    r"|.*\.(?:crc|lock|incomplete))"
)
_DESCRIPTIONS = re.compile(
    r"(?:.*/)?(?:(?:README|LICENSE|LICENCE|CITATION|CHANGELOG|NOTICE)(?:\.\w+)?"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json)",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"(?:^|/)(train|test|valid|val|dev|eval)(?:ing|idation|uation)?(?=[-_./]|$)")


def file_format(path: str, url: str, domain: DomainConfig) -> tuple[Format, str | None]:
    """Return the format and the compression of a file, by its name unless the recipe says.

    Raises:
        CorpusError: If the name's ending is not known and the recipe says `auto`.
    """
    endings, compression = _endings(url)
    if domain.format != "auto":
        return domain.format, compression
    kind = _token_format(path, url) or _named_format(endings)
    # Only where the format is guessed: the recipe's own choice is checked by its model.
    if kind in ("text", "csv") and domain.column_field != "text_column":
        has = "has no" if kind == "text" else "has no list in"
        raise CorpusError.at(
            path,
            url,
            f"a {kind} file {has} column {domain.column!r}",
            fix="lists come in parquet, jsonl or arrow",
        )
    if kind is None:
        raise CorpusError.at(
            path,
            url,
            "the ending of the file's name tells no format",
            allowed=f"known endings: {', '.join(_FORMATS)} and those of source code, also with "
            f"{', '.join(_COMPRESSIONS)}",
            fix=f"set `format` of domain {domain.name!r} to parquet, jsonl, csv, text or arrow",
        )
    return kind, compression


def _endings(url: str) -> tuple[list[str], str | None]:
    # Of the name alone: a directory may have dots as well.
    endings = url.rsplit("/", 1)[-1].lower().split(".")[1:]
    compression = _COMPRESSIONS.get(endings[-1]) if endings else None
    return (endings[:-1] if compression else endings), compression


def _named_format(endings: list[str]) -> Format | None:
    if not endings:
        return None
    return "text" if _TEXT_ENDING.fullmatch(endings[-1]) else _FORMATS.get(endings[-1])


def without_bookkeeping(tails: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the files that hold documents, and those that only describe them.

    The files of Spark, Hive and Delta Lake (`_SUCCESS`, `*.crc`) never hold any. A README or a
    JSON of Hugging Face datasets does where it stands among texts, not beside files of columns.

    Args:
        tails: Paths below the directory that a glob lists.
    """
    every = list(tails)
    data = [tail for tail in every if not _BOOKKEEPING.fullmatch(tail)]
    others = [tail for tail in data if not _DESCRIPTIONS.fullmatch(tail)]
    columns = ("parquet", "jsonl", "arrow", "csv")
    if any(_named_format(_endings(tail)[0]) in columns for tail in others):
        data = others
    return data, sorted(set(every) - set(data))


def splits_of(tails: Iterable[str]) -> dict[str, list[str]]:
    """Return the files by the split that their names tell: `train`, `test`, `valid`, `dev` ...

    Files whose names tell none are left out.
    """
    splits: dict[str, list[str]] = {}
    for tail in tails:
        if match := _SPLIT.search(tail.lower()):
            splits.setdefault(match[1], []).append(tail)
    return splits


def is_json_values(head: bytes) -> bool:
    """Return whether a file of JSON that begins so is to be read value by value, not by lines.

    An array does; so does an object that goes on after its first line.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return text.startswith(b"[") or text.splitlines()[:1] == [b"{"]


def _token_format(path: str, url: str) -> TokenFormat | None:
    """Return the format of a token file, None for one of another kind."""
    name = url.rsplit("/", 1)[-1]
    if not name.endswith((".bin", ".npy", ".ds")) and name != INDEX_JSON:
        return None
    check_local(path, url)
    kind = detect(url)
    if kind is None and name.endswith(".bin"):
        raise CorpusError.at(
            path,
            url,
            "it has neither an .idx beside it (Megatron) nor llm.c's header",
            fix="restore the .idx, or set format: nanogpt for raw ids that end-of-text separates",
        )
    return kind


def check_local(path: str, url: str) -> None:
    """Raise CorpusError for token files in a store, which cannot be mapped."""
    if is_remote(url):
        fix = "mount the store, or copy the files"
        raise CorpusError.at(
            path, url, "token files are mapped, and this is no local file", fix=fix
        )
