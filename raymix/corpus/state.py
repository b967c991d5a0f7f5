"""The state of a corpus directory: `prepare.json`, and the lock of the process that prepares it.

`prepare.json` holds what the content depends on (tokenizer, domains, cleaning, block size) and
the files it came from. The place of the corpus, and limits that only decide whether preparing
fails, are left out. So a second run can tell "nothing to do" from "continue" from "refuse".
"""

from __future__ import annotations

import contextlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from raymix._utils.hub import HUB
from raymix._utils.json import parse_json
from raymix.corpus.read.sources import DomainSources, SourceFile, find_sources
from raymix.corpus.tokenizers.tokenizer import download_tokenizer, load_pretrained
from raymix.errors import CorpusError, StorageError, format_problem
from raymix.recipe import CorpusConfig, PretrainedTokenizer
from raymix.store import Manifest, atomic_write_text
from raymix.store.manifest import MANIFEST, read_manifest
from raymix.store.remote import files
from raymix.store.remote.hub import HubRepo, model_repo

STATE = "prepare.json"
WORK = ".prepare"
"""Directory of unfinished work under the corpus directory."""

# These decide where the corpus lies and whether preparing fails, not what is in it.
_NOT_CONTENT = {"path", "max_rejected", "domains"}

_ADDED_LATER = (
    "in_place",
    "chat_date",
    "chat_template_kwargs",
    "reasoning",
    "system",
    "bos",
    "special_tokens_in_text",
)

FileStamp = tuple[str, int, int]


@dataclass(frozen=True)
class Recorded:
    """The content of `prepare.json`: the identity, and URL, size and time of every source."""

    identity: dict[str, Any]
    sources: dict[str, dict[str, list[FileStamp]]]


def identity(config: CorpusConfig) -> dict[str, Any]:
    """Return the settings that the content of a corpus depends on, beside the files themselves."""
    document = config.model_dump(mode="json", exclude=_NOT_CONTENT)
    # Not written by versions without it, whose corpora must stay equal to their recipes.
    for name in _ADDED_LATER:
        field = CorpusConfig.model_fields[name]
        if document[name] == field.get_default(call_default_factory=True):
            del document[name]
    # The order of domains is content: a sampled domain is an index into it.
    document["domain_order"] = [domain.name for domain in config.domains]
    document["domains"] = {
        domain.name: domain.model_dump(mode="json", exclude={"name"}) for domain in config.domains
    }
    for domain in document["domains"].values():
        # Added later, likewise.
        if domain["system_column"] is None:
            del domain["system_column"]
    return document


def record(config: CorpusConfig, sources: Mapping[str, DomainSources]) -> None:
    """Write `prepare.json`."""
    stamps = {
        name: {"train": _stamps(domain_sources.train), "valid": _stamps(domain_sources.valid)}
        for name, domain_sources in sources.items()
    }
    document = {"format": 1, "config": identity(config), "sources": stamps}
    atomic_write_text(files.join(config.path, STATE), json.dumps(document, indent=1))


def _stamps(source_files: Iterable[SourceFile]) -> list[FileStamp]:
    return [(file.url, file.size, file.changed) for file in source_files]


def recorded(path: str) -> Recorded | None:
    """Return what `prepare.json` of the corpus at `path` says, or None where there is none."""
    try:
        document = parse_json(files.read_bytes(files.join(path, STATE)))
        return Recorded(document["config"], document["sources"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError.at(
            "corpus.path",
            path,
            f"{STATE} is damaged",
            fix="prepare the corpus again with --if-exists new",
        ) from error


def manifest_of(path: str) -> Manifest | None:
    """Return the manifest of the corpus at `path`, or None while it is not finished."""
    return read_manifest(path) if files.exists(files.join(path, MANIFEST)) else None


def differences(config: CorpusConfig) -> list[str]:
    """Return the differences between the corpus at `config.path` and the recipe's.

    One message per field; none when nothing has been prepared there yet. Sources under other
    names count as equal when their files have equal names and sizes, so a corpus may be moved.
    """
    before = recorded(config.path)
    manifest = manifest_of(config.path)
    if not config.domains or not (manifest or _has_results(config.path)):
        return []
    if before is None:
        return _names_differ(config, manifest) if manifest else []
    then, now = _flat(before.identity), _flat(identity(config))
    changed = [
        path
        for path in [*now, *(key for key in then if key not in now)]
        if then.get(path) != now.get(path)
    ]
    # Globs and paths may differ while the content is equal; this costs a listing, so it comes last.
    changed = [path for path in changed if not _is_equivalent(path, config, before, manifest)]
    problems = [
        format_problem(
            f"corpus.{path}",
            now.get(path),
            f"the corpus at {config.path} was prepared with {then.get(path)!r}",
        )
        for path in changed
    ]
    # A prepared corpus has the tokenizer of its commit; what a branch means now is another matter.
    same = then.get("tokenizer.path") == now.get("tokenizer.path")
    if _hub_tokenizer(config) is not None and same:
        return problems
    return problems + _tokenizer_changed(config, manifest)


def _has_results(path: str) -> bool:
    work = files.join(path, WORK)
    domains = [files.join(work, name) for name in files.list_directory(work) if name != "lock"]
    return any(
        name.endswith(".json")
        for domain in domains
        if not domain.endswith(".json")
        for name in files.list_directory(domain)
    )


def _names_differ(config: CorpusConfig, manifest: Manifest) -> list[str]:
    expected, actual = [domain.name for domain in config.domains], list(manifest.domains)
    if expected == actual:
        return []
    return [
        format_problem("corpus.domains", expected, f"the corpus at {config.path} holds {actual}")
    ]


def _flat(node: object, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{path}.{key}" if path else str(key))
    return flat


def _is_equivalent(
    path: str, config: CorpusConfig, before: Recorded, manifest: Manifest | None
) -> bool:
    # Where no revision is asked for, the commit that the corpus was prepared with will do.
    if path == "tokenizer.revision" and getattr(config.tokenizer, "revision", None) is None:
        return True
    # Another path to the same tokenizer makes the same tokens.
    if path in ("tokenizer.path", "tokenizer.revision"):
        return manifest is not None and not _tokenizer_changed(config, manifest)
    first, *names = path.split(".")
    if first != "domains" or names[-1] not in ("train", "valid"):
        return False
    *names, last = names
    domain = ".".join(names)
    with contextlib.suppress(CorpusError, StorageError):
        sources = find_sources(config)
        if domain in sources and domain in before.sources:
            now = _stamps(sources[domain].train if last == "train" else sources[domain].valid)
            # Not by time of change: copying a corpus with its sources gives new ones.
            return _sizes(now) == _sizes(before.sources[domain][last])
    return False


def _sizes(stamps: Iterable[FileStamp]) -> list[tuple[str, int]]:
    return [(posixpath.basename(url), size) for url, size, _ in stamps]


def _tokenizer_changed(config: CorpusConfig, manifest: Manifest | None) -> list[str]:
    chosen = config.tokenizer
    if manifest is None or not isinstance(chosen, PretrainedTokenizer):
        return []
    if _hub_tokenizer(config) is None and not files.exists(chosen.path):
        return []
    if load_pretrained(chosen).info.fingerprint == manifest.tokenizer.fingerprint:
        return []
    return [
        format_problem(
            "corpus.tokenizer.path",
            chosen.path,
            f"the corpus at {config.path} was prepared with another tokenizer",
            fix="its content has changed",
        )
    ]


def _hub_tokenizer(config: CorpusConfig) -> HubRepo | None:
    """Return the repository of the Hub that the tokenizer comes from, if it does."""
    chosen = config.tokenizer
    if not isinstance(chosen, PretrainedTokenizer):
        return None
    return model_repo(chosen.path, chosen.revision, "corpus.tokenizer")


def pin_tokenizer(config: CorpusConfig, *, afresh: bool) -> CorpusConfig:
    """Return the configuration with the commit of a tokenizer of the Hub in place of its branch.

    Args:
        config: The corpus section of a recipe.
        afresh: Whether to pass over the commit of a corpus that has been begun.

    Raises:
        RaymixError: If it cannot be downloaded.
    """
    repo = _hub_tokenizer(config)
    if repo is None:
        return config
    before = None if afresh else recorded(config.path)
    then = (before.identity if before else {}).get("tokenizer", {})
    if repo.revision is None and then.get("path") == HUB + repo.name:
        revision = then.get("revision")
    else:
        revision = download_tokenizer(repo).name
    tokenizer = config.tokenizer.model_copy(update={"revision": revision})
    return config.model_copy(update={"tokenizer": tokenizer})


def refuse_differences(config: CorpusConfig) -> None:
    """Check that what lies at `config.path` is of the same recipe.

    Raises:
        CorpusError: If not; it says what differs.
    """
    problems = differences(config)
    if problems:
        fix = "prepare into another corpus.path, or replace what is there: --if-exists new"
        if manifest_of(config.path) is not None:
            # Sources may be out of reach where a finished corpus has been moved to.
            fix = f"leave corpus.domains out to use it as it is, {fix}"
        raise CorpusError(*problems[:-1], f"{problems[-1]} To go on, {fix}.")


def refuse_missing_shards(path: str, manifest: Manifest) -> None:
    """Check that every shard of a finished corpus is there.

    Raises:
        CorpusError: If not; it names the first that is missing.
    """
    missing: list[str] = []
    for name, info in manifest.domains.items():
        for split, split_info in (("train", info.train), ("valid", info.valid)):
            present = (
                files.list_directory(files.join(path, name, split)) if split_info.shards else []
            )
            names = {f"{name}/{split}/{file}" for file in present}
            # A listing per directory, not a request per shard: there may be thousands on an object
            # store.
            missing += [shard.file for shard in split_info.shards if shard.file not in names]
    if missing:
        raise CorpusError.at(
            "corpus.path",
            path,
            f"{len(missing)} of its shards are missing, the first is {missing[0]}",
            fix="restore them, or prepare again with --if-exists new",
        )


def changed_sources(config: CorpusConfig) -> list[str]:
    """Return a line per source that is not what it was when the corpus was prepared."""
    before = recorded(config.path)
    if before is None:
        return []
    try:
        sources = find_sources(config)
    except (CorpusError, StorageError) as error:
        return [f"sources are gone: {line}" for line in error.problems]
    now = {file.url: (file.size, file.changed) for each in sources.values()
           for file in (*each.train, *each.valid)}  # fmt: skip
    then = {url: (size, changed) for splits in before.sources.values()
            for stamps in splits.values() for url, size, changed in stamps}  # fmt: skip
    lines = [f"changed: {url}" for url in now if url in then and now[url] != then[url]]
    # A corpus that moved with its sources knows them under other names.
    if {posixpath.basename(url) for url in now} != {posixpath.basename(url) for url in then}:
        lines += [f"new: {url}" for url in now if url not in then]
        lines += [f"gone: {url}" for url in then if url not in now]
    return lines


def clear(config: CorpusConfig) -> None:
    """Delete the corpus at `config.path`: what raymix wrote there and nothing else."""
    names = {domain.name for domain in config.domains}
    with contextlib.suppress(CorpusError):
        before, manifest = recorded(config.path), manifest_of(config.path)
        names |= set(before.sources if before else ())
        names |= set(manifest.domains if manifest else ())
    for name in (MANIFEST, STATE, WORK, "tokenizer"):
        files.remove(files.join(config.path, name))
    for name in sorted(names):
        # By name, and the directory only when empty: a user may keep other files beside these.
        for content in ("train", "valid", "index", "rejects.jsonl"):
            files.remove(files.join(config.path, name, content))
        directory = files.join(config.path, name)
        if not files.list_directory(directory):
            files.remove(directory)


def remove_temporary(path: str) -> None:
    """Delete the temporary files that interrupted work left in the corpus at `path`."""
    filesystem, base = files.locate(path)
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    for info in filesystem.get_file_info(selector):
        # The names that AtomicFile writes under; anything else in the directory is the user's.
        if info.base_name.startswith(".") and info.base_name.endswith(".tmp"):
            files.remove_quietly(filesystem, info.path)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the corpus directory, where it is local, so that only one process prepares it.

    Raises:
        CorpusError: If another process holds it.
    """
    filesystem, base = files.locate(path)
    # The lock needs its directory, before anything is written there.
    files.make_directory(files.join(path, WORK))
    # Object stores have no locks. Two writers of one recipe write the same bytes.
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield
        return
    import fcntl

    with open(posixpath.join(base, WORK, "lock"), "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CorpusError.at(
                "corpus.path", path, "another process is preparing this corpus", fix="wait for it"
            ) from error
        yield
