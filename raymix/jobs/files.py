"""Files of a project to ship: all that its `.gitignore` and `.rayignore` files do not ignore.

The rules are git's: a pattern holds from the directory of its file downwards, a later pattern and
a deeper file win, and the content of an ignored directory stays ignored. `.git`, virtual
environments, Python's caches and what may hold a secret are never shipped.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathspec import GitIgnoreSpec

from raymix.errors import RecipeError
from raymix.jobs.secrets import may_be_secret

_Fate = Literal["shipped", "secret", "ignored", "outside"]

_IGNORE_FILES = (".gitignore", ".rayignore")
# Whatever the ignore files say: git never lists .git, and virtual
# environments hold paths of this machine.
_NEVER_SHIPPED = frozenset({".git", ".hg", ".venv", "venv", "__pycache__"})
_PROJECT_MARKERS = (".git", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a project."""

    root: Path
    """The project's directory."""
    files: tuple[str, ...]
    """Files to ship, relative to the root, sorted, with slashes."""
    left_out: tuple[str, ...]
    """Links that lead out of the project, and entries that are neither file nor directory."""
    secrets: tuple[str, ...] = ()
    """Files that may hold a secret; see `raymix.jobs.secrets`."""
    ignored: tuple[str, ...] = ()
    """Files and directories that an ignore file names, or that are never shipped; directories end
    in a slash, and what is in them is not listed."""

    @property
    def size_bytes(self) -> int:
        """Return the size of the files to ship."""
        return sum((self.root / name).stat().st_size for name in self.files)

    def reason(self, name: str) -> str:
        """Return why a file of the project, or all files of a directory, do not travel."""
        if any(each == name or each.startswith(f"{name}/") for each in self.secrets):
            return "by its name it may hold a secret"
        return "an ignore file names it, or a link leads outwards"


@dataclass(frozen=True, slots=True)
class _Rules:
    """The patterns of one directory's ignore files."""

    spec: GitIgnoreSpec
    base: str = ""
    """Prefix to remove from paths, for a directory inside the project."""
    above: str = ""
    """Prefix to add to paths, for a directory above the project."""

    def verdict(self, path: str) -> bool | None:
        """Return whether `path` is ignored; None if no pattern matches it."""
        return self.spec.check_file(_as_bytes(self.above + path.removeprefix(self.base))).include


def find_project(start: Path) -> Path:
    """Return the nearest directory from `start` upwards that git or a pyproject.toml marks."""
    # Resolved first: the parents of a linked directory are not those where git looks.
    start = start.resolve()
    for folder in (start, *start.parents):
        if any((folder / marker).exists() for marker in _PROJECT_MARKERS):
            return folder
    return start


def list_files(root: Path) -> Listing:
    """Return the files of the project at `root` to ship.

    Raises:
        RecipeError: If `root` is no directory, or one that holds more than a project.
    """
    root = root.resolve()
    if not root.is_dir():
        raise RecipeError.at("project", str(root), "not a directory")
    if root in (Path.home().resolve(), Path(root.anchor)):
        raise RecipeError.at(
            "project",
            str(root),
            "this would ship everything in it",
            fix="Put the recipe into a directory of its own, or name one by --project",
        )
    by_fate: dict[_Fate, list[str]] = defaultdict(list)
    for path, fate in _walk(root, "", _above(root)):
        by_fate[fate].append(path)
    # File systems list in different orders; equal projects have to give equal archives.
    files, outside, secret, ignored = (
        tuple(sorted(by_fate[fate])) for fate in ("shipped", "outside", "secret", "ignored")
    )
    return Listing(root, files, outside, secret, ignored)


def _walk(root: Path, base: str, rules: Sequence[_Rules]) -> Iterator[tuple[str, _Fate]]:
    """Yield the files below `base` and what is to become of each; ignored directories as one."""
    # Deepest first: the first rule with a verdict wins.
    inner = [*(_Rules(spec, base) for spec in _specs(root / base)), *rules]
    with os.scandir(root / base) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            # Links to directories are not walked: they may lead out of the project, or in a circle.
            folder = entry.is_dir(follow_symlinks=False)
            # A pattern that ends in a slash matches directories only, so
            # paths of directories end in one.
            path = base + entry.name + "/" * folder
            if entry.name in _NEVER_SHIPPED or _ignored(path, inner):
                yield path, "ignored"
            elif folder:
                yield from _walk(root, path, inner)
            else:
                yield path, _fate(root, path, entry)


def _fate(root: Path, path: str, entry: os.DirEntry[str]) -> _Fate:
    if not _stays_inside(root, entry):
        return "outside"
    # A link of a harmless name would ship what it leads to.
    target = os.path.relpath(os.path.realpath(entry.path), root)
    return "secret" if may_be_secret(path) or may_be_secret(target) else "shipped"


def _stays_inside(root: Path, entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file of the project, following links."""
    if not entry.is_symlink():
        return entry.is_file()
    # A link out of the project would ship private files, or dangle on the cluster.
    target = Path(os.path.realpath(entry.path))
    return target.is_file() and target.is_relative_to(root)


def _ignored(path: str, rules: Sequence[_Rules]) -> bool:
    """Return the verdict of the first of `rules`, the deepest first, that has one."""
    for each in rules:
        verdict = each.verdict(path)
        # None is no verdict, but False is one: that of a pattern with `!`.
        if verdict is not None:
            return verdict
    return False


def _specs(folder: Path) -> Iterator[GitIgnoreSpec]:
    for name in _IGNORE_FILES:
        file = folder / name
        if file.is_file():
            # Not `splitlines`, which also breaks at form feeds and at
            # \x85, the end of some UTF-8 letters.
            yield GitIgnoreSpec.from_lines(file.read_bytes().decode("latin-1").split("\n"))


def _as_bytes(path: str) -> str:
    """Return `path` with one character per byte: git's `?` and `[...]` match bytes, not letters."""
    return os.fsencode(path).decode("latin-1")


def _above(root: Path) -> list[_Rules]:
    """Return the rules of the directories above `root`, up to their repository's own.

    A project may be a part of a repository, whose patterns then hold in it too.
    """
    # The root of a repository: git reads no ignore file above it.
    if (root / ".git").exists():
        return []
    parents = list(root.parents)
    top = next((at for at, place in enumerate(parents) if (place / ".git").exists()), None)
    if top is None:
        return []
    return [
        _Rules(spec, above=root.relative_to(place).as_posix() + "/")
        for place in parents[: top + 1]
        for spec in _specs(place)
    ]
