"""The frame of the command line: `raymix COMMAND ...`.

Each command is one file, `raymix/cli/NAME.py`, that holds one function called `command`. The
file is imported only when that command (or its `--help`) is asked for, and imports anything
heavy (torch, ray, pydantic models) inside functions. A command file looks like this:

    '''`raymix prepare`: turn text into a corpus of token blocks.'''

    from __future__ import annotations

    from typing import Any

    from raymix.cli._run import Json, Overrides, RecipeSource, SetOverrides, load, run_command


    def command(
        recipe: RecipeSource,
        overrides: Overrides = None,
        set_overrides: SetOverrides = None,
        json: Json = False,
    ) -> None:
        '''Tokenize, clean and shard the corpus of a recipe.

        Running it again resumes.
        '''

        def work() -> dict[str, Any]:
            from raymix.corpus import prepare

            return prepare(load(recipe, overrides, set_overrides)).document()

        run_command(work, json=json)

`work` prints what a person reads on stdout and returns the document of `--json`; with `--json`
`run_command` sends every such print to stderr and the document alone to stdout. It also turns
errors into messages and exit codes: 0 done, 1 failure in the work, 2 bad input, 3 the cluster
or a store is away, 130 interrupted.
"""

from __future__ import annotations

import importlib
import re
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command as build_command

from raymix._utils.compat.cpython import end_process
from raymix._utils.terminal import hangup_is_ctrl_c
from raymix.cli import _run
from raymix.errors import did_you_mean

# Section, then command and its line in `raymix --help`: kept here so that help imports nothing.
COMMANDS = {
    "Write and check a recipe": {
        "init": "Write a commented recipe to start from.",
        "validate": "Check a recipe and report every problem at once.",
        "plan": "Show shares, epochs, steps and memory; refuse what cannot work.",
        "schema": "Print the JSON schema of recipes, for editors.",
        "doctor": "Check this machine and its Ray cluster.",
    },
    "Run it": {
        "prepare": "Turn text into a corpus of token blocks.",
        "train": "Prepare if needed, then train, checkpoint and report.",
        "eval": "Score a run's checkpoint on the held-out text of every domain.",
        "compare": "Train under several mixers and seeds, and compare.",
        "fit": "Fit a law that predicts losses from shares to a table of runs.",
        "tune": "Find the best shares by small runs and a mixing law.",
        "schedule": "Compare planners of long and short sequences on a corpus.",
    },
    "On a cluster": {
        "submit": "Run a command as a job of a Ray cluster.",
        "status": "Say how a cluster's jobs stand.",
        "logs": "Print what a job has printed.",
        "stop": "Stop a job; a run writes a checkpoint first.",
    },
    "Use the result": {
        "watch": "Show a run live, from its files.",
        "weights": "Show the mixture of a run, or change it while the run trains.",
        "export": "Write a checkpoint as a Hugging Face model directory.",
        "optimize": "Find the shares of least predicted loss under a fitted law.",
        "merge": "Merge models of one architecture by DRM and its peers.",
        "specialists": "Fine-tune a model per domain, merge them, and compare.",
        "report": "Draw a run's weights, losses and throughput as one HTML page.",
    },
}

# Click aligns every section by itself; names padded to one width align them all.
_NAME = max(len(name) for section in COMMANDS.values() for name in section)
_HELP = """Decide what a language model reads next: data mixing on Ray, exact and restartable.

A recipe (one YAML file) describes the corpus, the mixture, the model and the run. Any field can
be changed on the command line: FIELD=VALUE after the recipe.

\b
Examples:
  raymix init my.yaml                       a commented recipe to start from
  raymix plan my.yaml                       what would happen, without doing it
  raymix train my.yaml                      prepare, train, report
  raymix train my.yaml train.steps=200      the same with a field changed
  raymix report runs/my                     draw the run again
"""
_EPILOG = """Exit codes: 0 done, 1 the work failed, 2 bad input, 3 the cluster or a store died or
does not answer (try again), 130 interrupted. With --json every command prints exactly one JSON
document on stdout."""


class PlainCommand(TyperCommand):
    """A command whose help names plain text values without their Python types."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line: `RECIPE`, not `{RECIPE}`."""
        pieces = super().collect_usage_pieces(ctx)
        return [re.sub(r"^\{(.+)\}", r"\1", piece) for piece in pieces]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                name = record[0].partition(" <")[0] if is_argument else record[0]
                # The usage line shows it already: what is not in brackets is required.
                text = record[1].replace("  [required]", "")
                sections["Arguments" if is_argument else "Options"].append((name, text))
        for section, rows in sections.items():
            if rows:
                with formatter.section(section):
                    formatter.write_dl(rows)


class LazyCommands(TyperGroup):
    """The group of all commands; a command's file is imported when the command is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, in the order of the help text."""
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command built from its file, or None when there is none of that name."""
        # Also keeps `raymix _run` and the like from importing a module that is no command.
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"raymix.cli.{cmd_name}")
        # From an app of one command Typer builds that command itself, not a group around it.
        single = typer.Typer(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
        )
        single.command(cmd_name, cls=PlainCommand)(module.command)
        return build_command(single)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that `args` name; a usage error says which one may be meant."""
        name = args[0]
        # An unknown option is no command: Click has a better message for it.
        if not name.startswith("-") and name not in self.list_commands(ctx):
            near = did_you_mean(name, self.list_commands(ctx))
            # A usage error, which ends with 2 like all bad input.
            ctx.fail(f"No such command {name!r}. {near}".strip())
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands section by section, importing none of them."""
        for section, commands in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(_NAME), line) for name, line in commands.items()])


def _print_version(requested: bool) -> None:
    if requested:
        from raymix import __version__

        typer.echo(f"raymix {__version__}")
        raise typer.Exit


# No rich markup: it would take brackets in help texts for styles. No pretty exceptions:
# `run_command` explains all errors itself.
app = typer.Typer(
    cls=LazyCommands,
    add_completion=False,
    # True would end `raymix` alone with 2, as a usage error; the
    # callback shows help and ends with 0.
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(help=_HELP, epilog=_EPILOG, invoke_without_command=True)
def frame(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Print the help text when no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> NoReturn:
    """Run the command line of this process, and end the process."""
    # Here and not in `frame`: tests call `app` and read stdout after it.
    _run.own_process()
    hangup_is_ctrl_c()
    try:
        app(prog_name="raymix")
    except SystemExit as ended:
        # Not by the interpreter: it would end a command by SIGABRT where an abandoned thread is
        # inside torch, and by SIGINT once a KeyboardInterrupt has passed through an exec of text.
        end_process(ended.code if isinstance(ended.code, int) else bool(ended.code))
    end_process(0)
