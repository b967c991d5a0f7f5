"""Errors that a user can act on: one message form, one exit code each, and they pickle.

Every message reads `path.to.field = value: what is wrong. what is allowed. what to do.` The
command line prints it without a traceback and leaves with the class' `exit_code`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Self

# A name and a password in front of a URL's host.
_USER = re.compile(r"(?<=://)[^/@\s'\"]+@")


def format_problem(
    path: str, value: object, problem: str, *, allowed: str = "", fix: str = ""
) -> str:
    """Return one message of the form `path = value: problem. allowed. fix`.

    User names and passwords in URLs are removed.

    Args:
        path: Dotted path of the field, as the user wrote it.
        value: The value at that path.
        problem: What is wrong with it.
        allowed: What is allowed instead; may be several sentences.
        fix: What to do; may be several sentences.
    """
    return _USER.sub("", f"{path} = {value!r}: {join_sentences(problem, allowed, fix)}")


def join_sentences(*parts: str) -> str:
    """Return the parts that are not empty as sentences, each with its final stop."""
    return " ".join(
        part if part.endswith((".", "?", "!")) else part + "." for part in parts if part
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `Did you mean 'x'?` for the known word nearest to `word`, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else ""


class RaymixError(Exception):
    """Base of all errors raymix raises on purpose; `problems` holds one message per fault."""

    exit_code = 2
    transient = False
    """Whether the same work may succeed later, although nobody changed anything."""

    def __init__(self, *problems: str) -> None:
        """Keep the messages in order; an error stands for all faults found in one go."""
        super().__init__(*problems)
        self.problems = problems

    @classmethod
    def at(
        cls, path: str, value: object, problem: str, *, allowed: str = "", fix: str = ""
    ) -> Self:
        """Return the error of one fault; the arguments are those of `format_problem`."""
        return cls(format_problem(path, value, problem, allowed=allowed, fix=fix))

    def __str__(self) -> str:
        """Return the messages, one a line."""
        return "\n".join(self.problems)


class RecipeError(RaymixError, ValueError):
    """A recipe, an override or a command-line value that cannot work."""


class CorpusError(RaymixError, ValueError):
    """Input data or a prepared corpus that cannot be used as it is."""


class StorageError(RaymixError, RuntimeError):
    """A store behind a URL that will not do what it is asked: no such bucket, no permission."""


class UnreachableError(StorageError):
    """A disk, or a store behind a URL, that does not answer, which may pass."""

    exit_code = 3
    transient = True


class LawError(RaymixError, ValueError):
    """A mixture table, a law or an objective that cannot be used as it is."""


class MergeError(RaymixError, ValueError):
    """Models, adapters or a merge file that cannot be merged as they are."""


class ScheduleError(RaymixError, ValueError):
    """Lengths, ranks or a cost model that no schedule fits, or a schedule that breaks its laws."""


class ClusterError(RaymixError, RuntimeError):
    """The Ray cluster at hand lacks what the recipe asks for."""


class ClusterLostError(ClusterError):
    """A part of the cluster died in the middle of the work, or does not answer."""

    exit_code = 3
    transient = True


class TrainingError(RaymixError, RuntimeError):
    """The work itself failed: the input was fine, the run was not."""

    exit_code = 1
