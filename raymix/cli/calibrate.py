"""`raymix schedule calibrate`: measures a model on this hardware and writes a cost model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymix.cli._run import load

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from raymix.schedule import CostModel
    from raymix.training.calibrate.calibrate import CalibrationSetup

_LONGEST = 32_768
# One rank has nothing to gather from; more than two would only share this machine's cores.
_CPU_RANKS = 2


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """The options of the command line."""

    source: str
    """A recipe, or one of the models of `raymix.schedule.MODELS`."""
    changes: list[str]
    out: str | None
    ranks: int | None
    device: str
    seconds: float
    longest: int | None
    network: str
    """Assumed where there is one device only, and nothing to gather from."""


def work(options: CalibrateOptions) -> dict[str, Any]:
    """Measure, write the file, and return it as a document.

    Raises:
        RaymixError: If the source, the device or the file cannot be used.
    """
    from rich.console import Console

    from raymix.schedule import save_cost_model
    from raymix.training.calibrate.calibrate import CalibrationBudget, calibrate, with_links
    from raymix.training.host.device import quiet_libraries

    path = _path(options.out)
    quiet_libraries()
    setup = _setup(options)
    # Progress goes to stderr, so that stdout holds the result alone, also without --json.
    console = Console(stderr=True, highlight=False)
    budget = CalibrationBudget(seconds=options.seconds, longest=options.longest or _LONGEST)
    cost, taken = calibrate(setup, budget, lambda line: console.print(line, markup=False))
    if setup.ranks == 1:
        cost = with_links(cost, _assumed_links(setup, options.network), options.network)
    # Saved before it is drawn: a closed pipe must not cost the measurements.
    save_cost_model(cost, path)
    _draw(cost, path, Console(highlight=False))
    return {
        "file": str(path),
        "cost": cost.document(),
        "measurements": [
            {"kind": item.kind, "tokens": item.tokens, "width": item.width, "value": item.value}
            for item in taken
        ],
    }


def _path(out: str | None) -> Path:
    """Return where the cost model goes, if it can: before any work is done."""
    from raymix.errors import ScheduleError

    if out is None or Path(out).suffix != ".json":
        raise ScheduleError.at(
            "out", out, "no file for the cost model", fix="Give a name that ends in .json"
        )
    if not Path(out).parent.is_dir():
        raise ScheduleError.at("out", out, "its directory does not exist")
    return Path(out)


def _setup(options: CalibrateOptions) -> CalibrationSetup:
    from raymix.errors import ScheduleError
    from raymix.schedule import MODELS
    from raymix.training.calibrate.calibrate import CalibrationSetup, preset_config, recipe_config

    device = _device(options.device)
    if options.source in MODELS:
        if options.changes:
            raise ScheduleError.at(
                "overrides", options.changes, "only a recipe has fields to change"
            )
        config = preset_config(options.source)
    elif options.source.endswith((".yaml", ".yml")) or ":" in options.source:
        config = recipe_config(load(options.source, options.changes))
    else:
        raise ScheduleError.at(
            "source",
            options.source,
            "neither a recipe nor a known model",
            allowed=f"Known: {', '.join(MODELS)}",
        )
    ranks = options.ranks or _ranks(device)
    if device.type == "cuda" and ranks > _gpus():
        raise ScheduleError.at(
            "ranks", ranks, f"there are {_gpus()} GPUs here, and each rank needs one"
        )
    return CalibrationSetup(config=config, device=device, ranks=ranks, bf16=device.type == "cuda")


def _device(name: str) -> torch.device:
    import torch

    from raymix.errors import ScheduleError

    if name not in {"auto", "cpu", "cuda"}:
        raise ScheduleError.at("device", name, "not a device", allowed="Known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ScheduleError.at("device", name, "torch finds no GPU here", fix="Take cpu or auto")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(default if name == "auto" else name)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _ranks(device: torch.device) -> int:
    return _gpus() if device.type == "cuda" else _CPU_RANKS


def _assumed_links(setup: CalibrationSetup, network: str) -> Any:
    from raymix.schedule.cost.presets import assumed_links
    from raymix.training.calibrate.calibrate import Heads

    heads = Heads.of(setup.config)
    return assumed_links(network, setup.config.num_hidden_layers, heads.keys * heads.width)


def _draw(cost: CostModel, path: Path, console: Console) -> None:
    """Print the cost model for people."""
    # Significant digits, as the coefficients differ by many orders of magnitude.
    lines = [
        f"\n{cost.hardware}, {cost.date}",
        f"attention: {cost.quadratic_s:.3g} s/token^2 + {cost.edge_s:.3g} s/token + "
        f"{1e6 * cost.piece_s:.3g} us",
        f"linear layers: {1e6 * cost.linear_s:.3g} us/token + {1e3 * cost.base_s:.3g} ms, "
        f"at least {1e3 * cost.floor_s:.3g} ms",
        *(
            f"gather over {link.width}: {1e6 * link.latency_s:.3g} us + "
            f"{1e6 * link.token_s:.3g} us/token"
            for link in cost.links
        ),
        f"memory: {cost.memory_tokens:,} tokens per rank",
        "mean relative errors of the fit: "
        + ", ".join(f"{kind} {error:.1%}" for kind, error in (cost.errors or {}).items()),
        f"file: {path}",
    ]
    for line in lines:
        # rich would break a long path at the console's width, and it could not be copied.
        console.print(line, markup=False, soft_wrap=True)
