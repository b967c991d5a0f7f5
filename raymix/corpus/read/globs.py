"""Globs: the files that a pattern matches, on any store, in an order that never varies."""

from __future__ import annotations

import functools
import os
import posixpath
import re

import pyarrow as pa
import pyarrow.fs as pafs

from raymix._utils.hub import HUB
from raymix.errors import CorpusError, did_you_mean
from raymix.store.remote import files
from raymix.store.remote.errors import storage_errors
from raymix.store.remote.hub import pinned

_WILDCARD = re.compile(r"[*?\[]")
# What `glob.escape` makes of a character that is meant as it stands.
_ESCAPE = re.compile(r"\[([*?\[])\]")
_MAX_NAMES_SHOWN = 10


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
            listed = [
                (info.path[start:].lstrip("/"), info)
                for info in filesystem.get_file_info(selector)
                if info.type == pafs.FileType.File
            ]
            if deep and isinstance(filesystem, pafs.LocalFileSystem):
                listed = _without_loops(base, listed)
            self._known[key] = listed
        return self._known[key]


def _without_loops(
    base: str, listed: list[tuple[str, pafs.FileInfo]]
) -> list[tuple[str, pafs.FileInfo]]:
    """Leave out what a link to a directory above lists again, forty times over."""

    @functools.cache
    def real(directory: str) -> str:
        return os.path.realpath(posixpath.join(base, directory))

    @functools.cache
    def in_loop(directory: str) -> bool:
        above = posixpath.dirname(directory)
        if not directory or posixpath.join(real(""), directory) == real(directory):
            return False
        seen = {real("")}
        while above:
            seen.add(real(above))
            above = posixpath.dirname(above)
        return real(directory) in seen or in_loop(posixpath.dirname(directory))

    return [(tail, info) for tail, info in listed if not in_loop(posixpath.dirname(tail))]


def expand(
    path: str, pattern: str, listings: Listings | None = None
) -> list[tuple[str, pafs.FileInfo]]:
    """Return the sorted URLs that a glob matches, with what the file system says of each.

    `*` and `?` stay within a name, `**` spans directories, `[abc]` is one of the characters;
    hidden files (`.name`) need a pattern that starts with a dot. The name of a directory means
    all files below it.

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
            if info.type == pafs.FileType.Directory:
                return expand(path, f"{pattern.rstrip('/')}/**", listings)
            if info.type == pafs.FileType.NotFound:
                files.check_store(root, path)
                raise CorpusError.at(path, root, "no such file", fix=_describe_directory(root))
            return [(root, info)]
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


def is_glob(pattern: str) -> bool:
    """Return whether a pattern has wildcards, which may match several files."""
    return bool(_split(pattern)[1])


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
