"""Shared by all commands: arguments, exit codes, and the one document of `--json`."""

from __future__ import annotations

import contextlib
import enum
import errno
import json as json_module
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from raymix._utils.json import jsonable
from raymix.errors import RaymixError

# `raymix --help` imports this file, too: whatever is slow to import
# waits for the function that needs it.
if TYPE_CHECKING:
    from rich.table import Table

    from raymix.recipe import Recipe


# Typer makes an enum the list of allowed values: others end with 2 before any work.
class IfExists(enum.StrEnum):
    """Values of `--if-exists`."""

    RESUME = "resume"
    FAIL = "fail"
    NEW = "new"


# Aliases, so that an argument has the same name and help text in every command.
RecipeSource = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe: FILE.yaml, or MODULE:FUNCTION.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE",
        help="Fields to change, e.g. train.steps=200 corpus.domains.0.name=books.",
    ),
]
SetOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="The same, as an option."),
]
Parallel = Annotated[
    int | None,
    typer.Option(min=1, help="Runs at once; else one per core or GPU, as memory allows."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard, http://HOST:8265; else RAY_API_SERVER_ADDRESS, else this "
        "machine's.",
    ),
]
TokenInClear = Annotated[
    bool,
    typer.Option(
        "--token-in-clear", help="Let a token go to another machine over HTTP without TLS."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, the rest on stderr.")
]

# False in tests and notebooks, which call commands and go on to print afterwards.
_owns_process = False


def own_process() -> None:
    """Let `--json` own stdout until the process ends: Ray's threads print after `work` is done."""
    global _owns_process
    _owns_process = True


def load(
    source: str, overrides: Sequence[str] | None = None, set_overrides: Sequence[str] | None = None
) -> Recipe:
    """Return the recipe at `source` with both kinds of overrides applied in order.

    Prints a line per local file or directory that is used although the Hub may have its name.
    """
    from raymix.recipe import read_recipe, resolve_paths
    from raymix.recipe.load import shadowed_names

    recipe, base = read_recipe(source, [*(overrides or ()), *(set_overrides or ())])
    for line in shadowed_names(recipe, base):
        print(line, flush=True)
    return resolve_paths(recipe, base)


def run_command(
    work: Callable[[], Mapping[str, Any]],
    *,
    json: bool,
    failed: Callable[[Mapping[str, Any]], int] = lambda document: False,
) -> None:
    """Run `work`, print its document if `json`, and exit with the right code.

    Args:
        work: Does the work, prints for people on stdout, returns the document.
        json: Print that document, and nothing else, on stdout; a failure is a document too:
            `{"error": class, "problems": [message, ...]}`.
        failed: Returns the exit code of a document: 0 or False for success, True for 1.

    Raises:
        typer.Exit: With 1 for a failure in the work, 2 for bad input, 3 where the cluster or a
            store died or does not answer, 130 when interrupted.
    """
    with _stdout_for_document(json) as write:
        try:
            document = work()
            # Before `failed` is asked: work that failed in part still has its document.
            write(document)
            code = int(failed(document))
            if code:
                raise typer.Exit(code)
        except typer.Exit:
            # A RuntimeError in Typer: the last clause would report it as a fault.
            raise
        except KeyboardInterrupt:
            _fail(write, "Interrupted", ["interrupted"], 130)
        except BrokenPipeError:
            # As in `raymix logs JOB | head`: nobody is left to read a document.
            _close_stdout()
            raise typer.Exit(1) from None
        except Exception as error:  # noqa: BLE001 - the last line of defence of the process
            name, problems, code = explain(error)
            _fail(write, name, problems, code)


def explain(error: BaseException) -> tuple[str, list[str], int]:
    """Return the class name, the messages and the exit code of `error`."""
    from raymix.store.remote.errors import of_network

    known = _raymix_error(error)
    if known is not None:
        return type(known).__name__, list(known.problems), known.exit_code
    # Only what the user can mend is bad input; any other OSError may be a fault of raymix.
    if isinstance(error, OSError) and error.errno in _INPUT_ERRNOS:
        where = f"{error.filename}: " if error.filename else ""
        advice = _INPUT_ERRNOS[error.errno]
        return type(error).__name__, [f"{where}{error.strerror}. {advice}".strip()], 2
    # Whatever a library for URLs raises where nobody knows the URL any more.
    if of_network(error):
        text = " ".join(str(error).split())[:300]
        problem = f"{type(error).__name__}: {text}. Check the network and the address, or try again"
        return type(error).__name__, [problem], 2
    # The last line only: Python formats a SyntaxError with its source over several lines.
    short = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    path = _write_traceback(error)
    return (
        type(error).__name__,
        [f"{short}\nThis is not an error that raymix expects; the traceback is in {path}"],
        1,
    )


_INPUT_ERRNOS = {
    errno.ENOSPC: "Free space there, or choose another directory.",
    errno.EDQUOT: "Free space there, or choose another directory.",
    errno.EROFS: "Choose a directory that can be written.",
    errno.EACCES: "Change its permissions, or choose another path.",
}


def _raymix_error(error: BaseException) -> RaymixError | None:
    """Return the RaymixError in a chain of causes: Ray wraps the errors of its tasks."""
    # Python lets a chain of causes run in a circle.
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # Ray's task errors have the original in `cause`; Python's own chain is in `__cause__`.
        inner = getattr(current, "cause", None)
        for candidate in (inner, current):
            # Ray's wrapper inherits from the error's class but has lost its `problems`.
            if isinstance(candidate, RaymixError) and "problems" in vars(candidate):
                return candidate
        current = inner if isinstance(inner, BaseException) else current.__cause__
    return None


def _write_traceback(error: BaseException) -> str:
    # Not deleted: the message names the file, to be read after this process has ended.
    with tempfile.NamedTemporaryFile(
        "w", prefix="raymix-", suffix=".traceback.txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("".join(traceback.format_exception(error)))
    return file.name


def _fail(
    write: Callable[[Mapping[str, Any]], None], name: str, problems: Sequence[str], code: int
) -> NoReturn:
    # The terminal of stderr decides: stdout may go to a pipe while a person reads the errors.
    label = typer.style("error:", fg="red", bold=True) if sys.stderr.isatty() else "error:"
    for problem in problems:
        print(label, problem, file=sys.stderr)
    if len(problems) > 1:
        print(f"{len(problems)} problems.", file=sys.stderr)
    write({"error": name, "problems": list(problems)})
    raise typer.Exit(code)


@contextlib.contextmanager
def _stdout_for_document(json: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a writer of the document; with `json` all other output goes to stderr meanwhile.

    The redirection is of file descriptor 1, since Ray's processes and threads write there
    without asking `sys.stdout`.
    """
    if not json:
        yield lambda document: None
        return
    original = sys.stdout
    original.flush()  # what was printed before would otherwise follow the document
    saved = os.dup(1)
    os.dup2(2, 1)
    # In a test or a notebook sys.stdout is not descriptor 1, so both are redirected.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield lambda document: _write_document(document, original, saved)
        finally:
            if not _owns_process:
                os.dup2(saved, 1)
                os.close(saved)


def _write_document(document: Mapping[str, Any], original: TextIO, saved: int) -> None:
    # Complete before the first byte is written: a value that is no JSON leaves no half document.
    text = json_module.dumps(jsonable(document), indent=2, ensure_ascii=False) + "\n"
    if _owns_process:
        # `original` writes to descriptor 1, which is stderr by now;
        # UTF-8 is JSON's encoding in any locale.
        with os.fdopen(saved, "w", encoding="utf-8") as stream:
            stream.write(text)
    else:
        original.write(text)
        original.flush()


def _close_stdout() -> None:
    """Point stdout at the null device, so that the exit does not fail on the broken pipe again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def plain_table(*columns: str, fancy: bool) -> Table:
    """Return an empty table, its first column to the left; `fancy` has a line below the head."""
    from rich import box
    from rich.table import Table

    # In a pipe no line but rows and heads, so that grep and awk need not skip any.
    table = Table(box=box.SIMPLE_HEAD if fancy else None, pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        # A number broken over two lines reads as two numbers.
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


@contextlib.contextmanager
def trial_processes(recipe: Recipe) -> Iterator[None]:
    """Prepare this process to start Ray's trials, before it loads torch."""
    from raymix.training.launch.cluster import worker_environment

    # glibc reads its MALLOC_ variables only when a process starts: inside a trial it is too late.
    os.environ |= worker_environment(on_gpu=False)
    from raymix.training.launch.preload import forked_trials

    with forked_trials(recipe):
        yield
