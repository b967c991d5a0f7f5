"""Sources: from the globs of a recipe to the files they mean, in an order that never varies."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import pyarrow as pa
import pyarrow.fs as pafs

from raymix._utils.hub import HUB
from raymix.errors import CorpusError, did_you_mean, format_problem
from raymix.recipe import CorpusConfig, DomainConfig
from raymix.recipe.corpus import TOKEN_FORMATS
from raymix.store.formats.detect import INDEX_JSON, detect, is_companion, named_file
from raymix.store.formats.info import TokenFormat
from raymix.store.remote import files
from raymix.store.remote.errors import is_remote, storage_errors
from raymix.store.remote.hub import pinned

Format = Literal["parquet", "jsonl", "text", "arrow"] | TokenFormat

_FORMATS: dict[str, Format] = {
    "parquet": "parquet",
    "pq": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    # Hugging Face datasets name JSON Lines files .json.
    "json": "jsonl",
    "txt": "text",
    "text": "text",
    "md": "text",
    "arrow": "arrow",
    "ipc": "arrow",
    "feather": "arrow",
}
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "zstd": "zstd", "bz2": "bz2"}
_WILDCARD = re.compile(r"[*?\[]")
# What `glob.escape` makes of a character that is meant as it stands.
_ESCAPE = re.compile(r"\[([*?\[])\]")
_MAX_NAMES_SHOWN = 10


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file as it was found; `size` in bytes, `changed` is its time in ns since 1970."""

    url: str
    size: int
    changed: int
    format: Format
    compression: str | None


@dataclass(frozen=True, slots=True)
class DomainSources:
    """The files of one domain; `valid` is empty where the held-out part is taken from `train`."""

    train: tuple[SourceFile, ...]
    valid: tuple[SourceFile, ...]


def find_sources(config: CorpusConfig) -> dict[str, DomainSources]:
    """Return the files of every domain, in the order of the globs and sorted within each.

    Raises:
        CorpusError: With one message per glob that matches nothing, file that is missing, of no
            known format, both trained on and held out, or inside the corpus to be written.
    """
    problems: list[str] = []
    sources: dict[str, DomainSources] = {}
    listings = Listings()  # thousands of domains may share a directory
    for number, domain in enumerate(config.domains):
        path = f"corpus.domains.{number}"
        train = _expand_all(f"{path}.train", domain.train, domain, problems, listings)
        valid = _expand_all(f"{path}.valid", domain.valid, domain, problems, listings)
        problems += _overlaps(path, train, valid)
        problems += _inside(f"{path}.train", config.path, domain.name, (*train, *valid))
        sources[domain.name] = DomainSources(train, valid)
    if problems:
        raise CorpusError(*problems)
    return sources


def _expand_all(
    path: str,
    globs: Iterable[str],
    domain: DomainConfig,
    problems: list[str],
    listings: Listings,
) -> tuple[SourceFile, ...]:
    matched: dict[str, SourceFile] = {}
    for pattern in globs:
        try:
            for url, info in _named(path, pattern, domain, listings):
                # A file that two globs match is one source, at the place of the first.
                matched.setdefault(url, _source_file(path, url, info, domain))
        except CorpusError as error:
            problems += error.problems
    return tuple(matched.values())


def _named(
    path: str, pattern: str, domain: DomainConfig, listings: Listings
) -> list[tuple[str, pafs.FileInfo]]:
    """Return the files that a pattern means, less the indices of token files."""
    token_file = domain.format in TOKEN_FORMATS
    if token_file:
        _check_local(path, pattern)
        pattern = named_file(pattern, cast(TokenFormat, domain.format))
    matched = expand(path, pattern, listings)
    if domain.format != "auto" and not token_file:
        return matched
    tokens = [(url, info) for url, info in matched if not is_companion(url)]
    if not tokens:
        fix = "name the files of tokens that they belong to"
        raise CorpusError.at(path, pattern, "only indices of token files match", fix=fix)
    return tokens


def _source_file(path: str, url: str, info: pafs.FileInfo, domain: DomainConfig) -> SourceFile:
    kind, compression = file_format(path, url, domain)
    return SourceFile(url, info.size or 0, info.mtime_ns or 0, kind, compression)


def file_format(path: str, url: str, domain: DomainConfig) -> tuple[Format, str | None]:
    """Return the format and the compression of a file, by its name unless the recipe says.

    Raises:
        CorpusError: If the name's ending is not known and the recipe says `auto`.
    """
    # Of the name alone: a directory may have dots as well.
    endings = url.rsplit("/", 1)[-1].lower().split(".")[1:]
    compression = _COMPRESSIONS.get(endings[-1]) if endings else None
    if compression:
        endings = endings[:-1]
    if domain.format != "auto":
        return domain.format, compression
    kind = _token_format(path, url) or (_FORMATS.get(endings[-1]) if endings else None)
    # Only where the format is guessed: the recipe's own choice is checked by its model.
    if kind == "text" and domain.column_field != "text_column":
        raise CorpusError.at(
            path,
            url,
            f"a text file has no column {domain.column!r}",
            fix="columns come in parquet, jsonl or arrow",
        )
    if kind is None:
        raise CorpusError.at(
            path,
            url,
            "the ending of the file's name tells no format",
            allowed=f"known endings: {', '.join(_FORMATS)}, also with {', '.join(_COMPRESSIONS)}",
            fix=f"set `format` of domain {domain.name!r} to parquet, jsonl, text or arrow",
        )
    return kind, compression


def _token_format(path: str, url: str) -> TokenFormat | None:
    """Return the format of a token file, None for one of another kind."""
    name = url.rsplit("/", 1)[-1]
    if not name.endswith((".bin", ".npy", ".ds")) and name != INDEX_JSON:
        return None
    _check_local(path, url)
    kind = detect(url)
    if kind is None and name.endswith(".bin"):
        raise CorpusError.at(
            path,
            url,
            "it has neither an .idx beside it (Megatron) nor llm.c's header",
            fix="restore the .idx, or set format: nanogpt for raw ids that end-of-text separates",
        )
    return kind


def _check_local(path: str, url: str) -> None:
    if is_remote(url):
        fix = "mount the store, or copy the files"
        raise CorpusError.at(
            path, url, "token files are mapped, and this is no local file", fix=fix
        )


class Listings:
    """The files under directories, each listed once."""

    def __init__(self) -> None:
        """Begin with none."""
        self._known: dict[tuple[str, bool], list[tuple[str, pafs.FileInfo]]] = {}

    def files(
        self, filesystem: pafs.FileSystem, base: str, *, deep: bool
    ) -> list[tuple[str, pafs.FileInfo]]:
        """Return the paths under `base` and what is known of each file there."""
        key = (f"{filesystem.type_name}:{base}", deep)
        if key not in self._known:
            selector = pafs.FileSelector(base, recursive=deep, allow_not_found=True)
            start = len(base.rstrip("/"))
            self._known[key] = [
                (info.path[start:].lstrip("/"), info)
                for info in filesystem.get_file_info(selector)
                if info.type == pafs.FileType.File
            ]
        return self._known[key]


def expand(
    path: str, pattern: str, listings: Listings | None = None
) -> list[tuple[str, pafs.FileInfo]]:
    """Return the sorted URLs that a glob matches, with what the file system says of each.

    `*` and `?` stay within a name, `**` spans directories, `[abc]` is one of the characters;
    hidden files (`.name`) need a pattern that starts with a dot.

    Args:
        path: Dotted path of the recipe's field, for messages.
        pattern: A glob or a plain name, local or any URL.
        listings: Directories listed before.

    Raises:
        CorpusError: If nothing matches; it says what lies there instead.
    """
    # A branch of the Hub may move while workers read.
    root, segments = _split(pinned(pattern, path))
    try:
        filesystem, base = files.locate(root, path)
        # What the Hub's cache holds keeps its URL: other nodes have other caches.
        if isinstance(filesystem, pafs.LocalFileSystem) and not root.startswith(HUB):
            root = base  # workers have another working directory
        if not segments:
            info = filesystem.get_file_info(base)
            if info.type == pafs.FileType.NotFound:
                files.check_store(root, path)
            return [(root, _plain_file(path, root, info))]
        # A flat listing where one level is enough: a bucket may hold millions of keys below.
        deep = len(segments) > 1 or "**" in segments
        tails = (listings or Listings()).files(filesystem, base, deep=deep)
    except Exception as error:
        if known := storage_errors(root, error, path):
            raise known from error
        if not isinstance(error, OSError | pa.ArrowException):
            raise
        raise CorpusError.at(path, pattern, f"cannot be listed: {error}") from error
    match = _matcher(tuple(segments)).fullmatch
    root = root.rstrip("/")
    # Listings come in any order, and the order of sources decides the bytes of the corpus.
    matched = sorted((f"{root}/{tail}", info) for tail, info in tails if match(tail))
    if not matched:
        files.check_store(root, path)  # nothing is listed of a bucket that does not exist
        raise CorpusError.at(path, pattern, "no file matches", fix=_describe_directory(pattern))
    return matched


def _split(pattern: str) -> tuple[str, list[str]]:
    """Return the part of a glob before its first magic segment, and the segments after it."""
    segments = pattern.split("/")
    is_wildcard = [bool(_WILDCARD.search(_ESCAPE.sub("", segment))) for segment in segments]
    first = is_wildcard.index(True) if True in is_wildcard else len(segments)
    root = _ESCAPE.sub(r"\1", "/".join(segments[:first]))
    return (root or ("/" if pattern.startswith("/") else ".")), segments[first:]


@functools.lru_cache(maxsize=64)
def _matcher(segments: tuple[str, ...]) -> re.Pattern[str]:
    parts = []
    for number, segment in enumerate(segments):
        last = number == len(segments) - 1
        # Like a shell: neither `*` nor `**` matches hidden names such as `.cache`.
        if segment == "**":
            parts.append(r"(?:[^/.][^/]*/)*" + (r"[^/.][^/]*" if last else ""))
        else:
            parts.append(_segment_pattern(segment) + ("" if last else "/"))
    return re.compile("".join(parts), re.DOTALL)


def _segment_pattern(segment: str) -> str:
    pattern = "" if segment.startswith((".", "[")) else r"(?!\.)"
    position = 0
    while position < len(segment):
        character = segment[position]
        # From the second character on: in `[]a]` the first bracket is a member.
        end = segment.find("]", position + 2) if character == "[" else -1
        if end > 0:
            inside = segment[position + 1 : end].replace("\\", r"\\").replace("[", r"\[")
            pattern += f"[^/{inside[1:]}]" if inside[0] in "!^" else f"[{inside}]"
            position = end + 1
            continue
        # Not fnmatch.translate, whose `*` matches slashes too.
        pattern += {"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character))
        position += 1
    return pattern


def _plain_file(path: str, url: str, info: pafs.FileInfo) -> pafs.FileInfo:
    if info.type == pafs.FileType.File:
        return info
    if info.type == pafs.FileType.Directory:
        raise CorpusError.at(
            path,
            url,
            "a directory",
            allowed=_describe_directory(url + "/*"),
            fix=f"name the files in it, such as {files.join(url, '*.parquet')}",
        )
    raise CorpusError.at(path, url, "no such file", fix=_describe_directory(url))


def _describe_directory(pattern: str) -> str:
    """Return a sentence on what lies in the deepest directory of a pattern that exists."""
    root, _ = _split(pattern)
    name = pattern.rsplit("/", 1)[-1]
    while "/" in root.rstrip("/") and not _is_directory(root):
        root = root.rstrip("/").rsplit("/", 1)[0] or "/"
    names = files.list_directory(root) if _is_directory(root) else []
    if not names:
        return f"{root} is empty" if _is_directory(root) else f"{root} does not exist"
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    hint = did_you_mean(name, names)
    return f"{root} holds {', '.join(names[:_MAX_NAMES_SHOWN])}{more}. {hint}".strip()


def _is_directory(url: str) -> bool:
    filesystem, path = files.locate(url)
    return filesystem.get_file_info(path).type == pafs.FileType.Directory


def _overlaps(path: str, train: Iterable[SourceFile], valid: Iterable[SourceFile]) -> list[str]:
    both = {file.url for file in train} & {file.url for file in valid}
    return [
        format_problem(
            f"{path}.valid",
            url,
            "the file is both trained on and held out",
            fix="name it in one of them",
        )
        for url in sorted(both)
    ]


def _inside(path: str, corpus: str, domain: str, sources: Iterable[SourceFile]) -> list[str]:
    output = files.join(corpus, domain) + "/"
    return [
        format_problem(
            path,
            file.url,
            f"the file lies where the prepared corpus of the domain goes ({output})",
            fix="choose another corpus.path",
        )
        for file in sources
        if file.url.startswith(output)
    ]
