"""Promises to users, frozen: names, commands, options, exit codes, and what an import costs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

import raymix
from raymix import errors
from raymix.cli.main import COMMANDS
from raymix.errors import RaymixError

NAMES = {
    "ClusterError",
    "Corpus",
    "CorpusError",
    "DomainStats",
    "LawError",
    "MixtureTable",
    "fit_law",
    "MergeError",
    "Mixer",
    "MixerContext",
    "MixtureLoader",
    "MixtureLog",
    "RaymixError",
    "Recipe",
    "RecipeError",
    "ScheduleError",
    "TrainingError",
    "build_mixer",
    "connect",
    "load_recipe",
    "merge",
    "merge_method",
    "mixer",
    "plan",
    "plan_batch",
    "prepare",
    "recipe_schema",
    "recipe_to_yaml",
    "token_losses",
    "train",
    "tune",
}

OPTIONS = {
    "prepare": {"--set", "--json", "--parallelism", "--if-exists"},
    "train": {
        "--set",
        "--json",
        "--if-exists",
        "--extend",
        "--domains-from",
        "--from-step",
        "--report",
    },
    "eval": {"--recipe", "--rows", "--json"},
    "compare": {"--set", "--json", "--mixers", "--seeds", "--out", "--parallel", "--baseline"},
    "tune": {"--set", "--json", "--out", "--parallel", "--smoke", "--if-exists"},
    "fit": {"--law", "--target", "--holdout", "--where", "--out", "--json"},
    "schedule": {
        "--set",
        "--json",
        "--groups",
        "--context",
        "--widths",
        "--barrier",
        "--ranks",
        "--device",
        "--seconds",
        "--batch",
        "--steps",
        "--seed",
        "--planners",
        "--cost",
        "--model",
        "--network",
        "--memory-tokens",
        "--longest",
        "--out",
    },
    "export": {"--json"},
    "optimize": {
        "--horizon",
        "--weight",
        "--minimax",
        "--floor",
        "--cap",
        "--max-epochs",
        "--total-tokens",
        "--available",
        "--prior",
        "--kl",
        "--out",
        "--json",
    },
    "merge": {
        "--out",
        "--set",
        "--on",
        "--workers",
        "--device",
        "--memory",
        "--search",
        "--eval",
        "--trials",
        "--plot",
        "--json",
    },
    "specialists": {"--set", "--json", "--seeds", "--out", "--parallel", "--smoke"},
    "report": {"--out", "--json"},
    "watch": {"--every", "--once", "--json"},
    "weights": {"--from-step", "--hold", "--release", "--timeout", "--json"},
    "submit": {
        *("--address", "--follow", "--project", "--storage", "--token-in-clear", "--dry-run"),
        "--json",
    },
    "status": {"--address", "--token-in-clear", "--json"},
    "logs": {"--address", "--follow", "--token-in-clear", "--json"},
    "stop": {"--address", "--token-in-clear", "--json"},
    "init": {"--force", "--json"},
    "validate": {"--set", "--json"},
    "plan": {"--set", "--json"},
    "schema": {"--out", "--json"},
    "doctor": {"--address", "--json"},
}


def loaded_modules(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after `code`."""
    report = "; import sys; print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


HEAVY = {"torch", "ray", "transformers", "scipy", "pandas", "matplotlib"}


def test_public_names() -> None:
    assert set(raymix.__all__) == NAMES
    assert set(raymix.__all__) <= set(dir(raymix))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_is_there_and_documented(name: str) -> None:
    value = getattr(raymix, name)
    assert value.__doc__
    assert value is getattr(raymix, name)


def test_the_room_of_training_can_be_called() -> None:
    import raymix.training.run.rundir

    assert callable(raymix.train)
    with pytest.raises(errors.RecipeError, match="no such file"):
        raymix.train("nowhere.yaml")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = raymix.nope  # type: ignore[attr-defined] # is what is shown


def test_importing_raymix_is_cheap() -> None:
    assert not loaded_modules("import raymix") & (HEAVY | {"pydantic", "numpy", "yaml"})


def test_loading_a_recipe_needs_neither_torch_nor_ray() -> None:
    assert not loaded_modules("import raymix; raymix.load_recipe; raymix.build_mixer") & HEAVY


def test_help_loads_next_to_nothing() -> None:
    """A stand-in for the cost of `raymix --help` that a busy machine cannot upset."""
    code = (
        "import sys; sys.argv = ['raymix', '--help']\n"
        "from raymix.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "1"
    )
    assert not loaded_modules(code) & (HEAVY | {"pydantic", "numpy", "yaml", "rich", "pyarrow"})


def test_commands() -> None:
    assert [list(commands) for commands in COMMANDS.values()] == [
        ["init", "validate", "plan", "schema", "doctor"],
        ["prepare", "train", "eval", "compare", "fit", "tune", "schedule"],
        ["submit", "status", "logs", "stop"],
        ["watch", "weights", "export", "optimize", "merge", "specialists", "report"],
    ]


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command: str) -> None:
    from typer.main import get_command

    from raymix.cli.main import app

    group: Any = get_command(app)
    click_command = group.get_command(None, command)
    options = {
        name for parameter in click_command.params for name in parameter.opts if name[:2] == "--"
    }
    assert options == OPTIONS[command]


def error_classes() -> list[type[RaymixError]]:
    return [
        item
        for item in vars(errors).values()
        if isinstance(item, type) and issubclass(item, RaymixError)
    ]


@pytest.mark.parametrize("kind", error_classes())
def test_errors_pickle(kind: type[RaymixError]) -> None:
    error = kind("a.b = 1: wrong.", "c = 2: wrong too.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.problems == error.problems
    assert str(again) == "a.b = 1: wrong.\nc = 2: wrong too."


def test_errors_are_standard_types_too() -> None:
    kinds = {kind.__name__: kind for kind in error_classes()}
    assert issubclass(kinds["RecipeError"], ValueError)
    assert issubclass(kinds["CorpusError"], ValueError)
    assert issubclass(kinds["MergeError"], ValueError)
    assert issubclass(kinds["ScheduleError"], ValueError)
    assert issubclass(kinds["ClusterError"], RuntimeError)
    assert issubclass(kinds["StorageError"], RuntimeError)
    assert {name: kind.exit_code for name, kind in kinds.items()} == {
        "RaymixError": 2,
        "RecipeError": 2,
        "CorpusError": 2,
        "MergeError": 2,
        "ScheduleError": 2,
        "ClusterError": 2,
        "LawError": 2,
        "TrainingError": 1,
        "StorageError": 2,
        "UnreachableError": 3,
        "ClusterLostError": 3,
    }
