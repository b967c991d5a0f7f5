"""Repositories of the Hugging Face Hub: the commit that a name means, and its files.

The Hub's own client does the work, so its variables hold: HF_HOME, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE. The local cache comes first: a branch that has been downloaded means the commit that
was downloaded, until `hf download NAME` brings a newer one. What the cache lacks is downloaded, of
that commit. Raised are StorageErrors that say what to do; the client's own errors never come out.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from raymix._utils.hub import HUB, is_hub_name
from raymix._utils.json import parse_json
from raymix.errors import StorageError, UnreachableError

_COMMIT = re.compile(r"[0-9a-f]{40}")
# A file of a repository: hf://datasets/OWNER/NAME@REVISION/PATH; models have no kind before them.
_FILE = re.compile(
    r"hf://(?:(?P<kind>datasets)/)?(?!spaces/|buckets/)"
    r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?",
    re.ASCII | re.DOTALL,
)
# Names have no double hyphen, so it can stand for their slash.
_SNAPSHOT = re.compile(r"(?:.*/)?models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?")
_MAIN = "main"
# All of a model but copies of its weights in other formats, which lie in directories of their own.
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_OTHER_FILES = ["*/*", "consolidated*"]


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository at a revision, and the field of the recipe that names it."""

    name: str
    """`OWNER/NAME`, or `NAME` alone."""
    revision: str | None = None
    """A branch, a tag or a commit; None for `main`."""
    field: str = "path"
    kind: Literal["model", "dataset"] = "model"
    url: str | None = None
    """URL that names it, for messages; None where its name alone does."""

    @property
    def cache(self) -> Path:
        """Return its directory in the local cache."""
        from huggingface_hub import constants

        # The layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
        return Path(constants.HF_HUB_CACHE) / f"{self.kind}s--{self.name.replace('/', '--')}"

    @property
    def download(self) -> str:
        """Return the command that downloads it."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.name}{kind}{revision}"

    def cached_commit(self) -> str | None:
        """Return the commit that the revision means in the local cache, if it is there."""
        revision = self.revision or _MAIN
        if _COMMIT.fullmatch(revision):
            return revision if (self.cache / "snapshots" / revision).is_dir() else None
        with contextlib.suppress(OSError, ValueError):
            commit = (self.cache / "refs" / revision).read_text("ascii").strip()
            return commit if _COMMIT.fullmatch(commit) else None
        return None


def model_repo(path: str, revision: str | None, field: str) -> HubRepo | None:
    """Return the repository that a path such as `hf://Qwen/Qwen3-0.6B` names; None for others."""
    name = path.removeprefix(HUB)
    return HubRepo(name, revision, field) if path.startswith(HUB) and is_hub_name(name) else None


def _commit(repo: HubRepo) -> str:
    """Return the commit hash that a repository's revision means.

    Raises:
        StorageError: If the cache does not tell, and the Hub does not either.
    """
    if repo.revision and _COMMIT.fullmatch(repo.revision):
        return repo.revision
    if cached := repo.cached_commit():
        return cached
    from huggingface_hub import HfApi

    with _hub_errors(repo):
        sha = HfApi().repo_info(repo.name, repo_type=repo.kind, revision=repo.revision).sha
    assert sha is not None, "the Hub names the commit of every revision"
    return sha


def fetch_file(repo: HubRepo, name: str, *, optional: bool = False) -> Path | None:
    """Return the local path of one file of a repository, downloaded if need be; None if absent.

    Args:
        repo: The repository.
        name: The file.
        optional: Whether the file counts as absent if others are in the cache and it cannot be
            downloaded.

    Raises:
        StorageError: If the repository cannot be read.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    at = replace(repo, revision=repo.cached_commit() or repo.revision)
    cached = try_to_load_from_cache(at.name, name, revision=at.revision, repo_type=at.kind)
    if cached is not None:
        # Else an object that says that the commit has no such file.
        return Path(cached) if isinstance(cached, str) else None
    with _hub_errors(repo):
        try:
            return Path(hf_hub_download(at.name, name, repo_type=at.kind, revision=at.revision))
        except LocalEntryNotFoundError:
            if optional and at.cached_commit():
                return None
            raise
        except EntryNotFoundError:
            return None


def fetch_config(repo: HubRepo) -> Path:
    """Return the local path of a model's `config.json`, for which no weights are downloaded.

    Its directory has the name of the commit.

    Raises:
        StorageError: If it cannot be read.
    """
    path = fetch_file(repo, "config.json")
    if path is None:
        raise _no_model(repo)
    return path


def fetch_model(repo: HubRepo, stems: Sequence[str] = ("model",)) -> Path:
    """Return a local directory with a model's configuration, weights and tokenizer.

    Args:
        repo: The repository.
        stems: Names of the weights without `.safetensors`: one of them has to be there.

    Raises:
        StorageError: If it cannot be downloaded, or has no weights in safetensors.
    """
    # By a file and not by asking: the cache then knows what the branch means.
    first = fetch_file(repo, "config.json", optional=True) or fetch_file(
        repo, "adapter_config.json", optional=True
    )
    if first is None:
        raise _no_model(repo)
    directory = first.parent
    if not any(_has_weights(directory, stem) for stem in stems):
        from huggingface_hub import snapshot_download

        with _hub_errors(repo):
            directory = Path(
                snapshot_download(
                    repo.name,
                    revision=directory.name,
                    allow_patterns=_MODEL_FILES,
                    ignore_patterns=_OTHER_FILES,
                )
            )
    if not any(_has_weights(directory, stem) for stem in stems):
        raise StorageError.at(
            repo.field,
            repo.url or repo.name,
            f"{directory} has no weights in safetensors, or not all of them",
            fix=f"Download them by `{repo.download}`, or name another model",
        )
    return directory


def hub_name(directory: str) -> str | None:
    """Return NAME@COMMIT of a model's directory in the local cache; None for other directories."""
    match = _SNAPSHOT.fullmatch(directory)
    return f"{match['name'].replace('--', '/')}@{match['commit']}" if match else None


def pinned(url: str, field: str) -> str:
    """Return the URL of a file or glob on the Hub with the commit that it means; others unchanged.

    Raises:
        StorageError: If the Hub does not tell.
    """
    repo, path = _split(url, field)
    if repo is None:
        return url
    kind = "datasets/" if repo.kind == "dataset" else ""
    return f"{HUB}{kind}{repo.name}@{_commit(repo)}/{path}"


def cached_path(url: str, field: str) -> str | None:
    """Return the path in the local cache of a file or directory on the Hub; None to read it there.

    Offline it is a path in the cache in any case.

    Raises:
        StorageError: If nothing may be downloaded and nothing of the repository is in the cache.
    """
    repo, path = _split(url, field)
    if repo is None:
        return None
    at = replace(repo, revision=repo.cached_commit())
    if at.revision is not None:
        local = _snapshot_file(at, path)
        # A directory may lack files that have not been downloaded.
        if local.is_file() or _is_offline():
            return str(local)
    elif _is_offline():
        raise _not_cached(repo)
    return None


def _split(url: str, field: str) -> tuple[HubRepo | None, str]:
    """Return the repository of a file's URL and the path in it."""
    match = _FILE.fullmatch(url)
    if match is None:
        return None, ""
    revision = unquote(match["revision"]) if match["revision"] else None
    kind: Literal["model", "dataset"] = "dataset" if match["kind"] else "model"
    return HubRepo(match["name"], revision, field, kind, url), match["path"] or ""


def _snapshot_file(repo: HubRepo, name: str) -> Path:
    return repo.cache / "snapshots" / (repo.revision or _MAIN) / name


def _has_weights(directory: Path, stem: str) -> bool:
    """Return whether a directory has all files of a model's weights."""
    # As transformers looks for them: beside a whole file, an index counts for nothing.
    if (directory / f"{stem}.safetensors").is_file():
        return True
    index = directory / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return False
    try:
        shards = set(parse_json(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        # Damaged: whoever loads the weights says how.
        return True
    return all((directory / str(shard)).is_file() for shard in shards)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _hub_errors(repo: HubRepo) -> Iterator[None]:
    """Raise whatever the Hub's client raises as a StorageError that says what to do."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    # Standard error may be a log, where a bar is a line per file and step.
    quiet = not are_progress_bars_disabled() and not os.isatty(2)
    if quiet:
        disable_progress_bars()
    # It tries again five times, and says so at length; the error below is said once.
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise _translated(repo, error) from error
    finally:
        set_verbosity(verbosity)
        if quiet:
            enable_progress_bars()


def _translated(repo: HubRepo, error: Exception) -> StorageError:
    from huggingface_hub import constants, errors

    # A file that is not in the cache hides why it could not be had.
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    error = cause if isinstance(cause, Exception) else error
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _not_cached(repo)
    page = f"{constants.ENDPOINT}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}"
    login = "set HF_TOKEN or run `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        problem = "gated: its owner grants access on request, and this token has none"
        return _error(repo, problem, f"Ask for it at {page}, then {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        problem = f"{page} has no revision {repo.revision or _MAIN!r}"
        return _error(repo, problem, "Name a branch, a tag or a commit of it")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        problem = f"{_absent(repo)}{constants.ENDPOINT} knows none that this token may see"
        return _error(repo, problem, f"Correct the name; for a private one {login}")
    if status in (401, 403):
        return _error(repo, f"{page} denies access", login[0].upper() + login[1:])
    if status is not None and status < 500 and status != 429:
        return _error(repo, f"{page} answers: {_one_line(error)}", f"Try `{repo.download}`")
    if isinstance(error, OSError) and status is None and error.errno is not None:
        where = f"{error.strerror}: {error.filename or repo.cache}"
        return _error(repo, f"cannot be downloaded: {where}", "Make room, or set HF_HOME")
    return UnreachableError.at(
        repo.field,
        repo.url or repo.name,
        f"{_absent(repo)}it is not in the cache {constants.HF_HUB_CACHE} and "
        f"{constants.ENDPOINT} does not answer: {_one_line(error)}",
        fix=f"Check the network and HF_ENDPOINT, or download it elsewhere by `{repo.download}`",
    )


def _no_model(repo: HubRepo) -> StorageError:
    problem = "this repository of the Hub has no config.json: it is no model of transformers"
    return _error(repo, problem, "Name another")


def _not_cached(repo: HubRepo) -> StorageError:
    from huggingface_hub import constants

    return _error(
        repo,
        f"{_absent(repo)}the Hub's {repo.kind} of that name is not, or not wholly, in the cache "
        f"{constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE allows no download",
        f"Run `{repo.download}` where there is a network, with the same HF_HOME",
    )


def _absent(repo: HubRepo) -> str:
    # A name may be meant as a path; a URL is none.
    return "" if repo.url else "no such directory here, and "


def _error(repo: HubRepo, problem: str, fix: str) -> StorageError:
    return StorageError.at(repo.field, repo.url or repo.name, problem, fix=fix)


def _one_line(error: Any) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
