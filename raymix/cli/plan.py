"""`raymix plan`: a dry run with shares, epochs, steps and memory, and all preflight checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raymix.cli._run import (
    Json,
    Overrides,
    RecipeSource,
    SetOverrides,
    load,
    plain_table,
    run_command,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from raymix.training.plan.runplan import DomainPlan, RunPlan

_MAX_DOMAINS_SHOWN = 40
# Segments are columns, so fewer of them fit than of domains.
_MAX_PIECES_SHOWN = 12
_GB = 1e9


def command(
    recipe: RecipeSource,
    overrides: Overrides = None,
    set_overrides: SetOverrides = None,
    json: Json = False,
) -> None:
    """Show what a run would do: shares, epochs, steps, memory. Refuse what cannot work.

    Trains nothing and needs no GPU. A corpus that is not prepared yet is estimated from the
    sizes of its sources; such figures are marked with ~.
    """

    def work() -> dict[str, Any]:
        from rich.console import Console

        from raymix.training.plan.preflight import plan_run

        plan = plan_run(load(recipe, overrides, set_overrides))
        draw(plan, Console(highlight=False))
        return plan.document()

    run_command(work, json=json)


def draw(plan: RunPlan, console: Console) -> None:
    """Print the plan for people: mixture, schedule, run, memory, notes."""
    # rich assumes 80 columns without a terminal and would cut the table.
    if not console.is_terminal:
        console.width = 120
    about = "estimated, not prepared yet" if plan.estimated else "prepared"
    console.print(f"[bold]{plan.name}[/]  corpus {plan.corpus_path} ({about})", soft_wrap=True)
    console.print()
    fancy = console.is_terminal
    console.print(_mixture(plan, fancy=fancy))
    if len(plan.segments) > 1:
        console.print()
        console.print(_pieces(plan, fancy=fancy))
    console.print()
    for name, text in _facts(plan):
        console.print(f"{name:12}{text}", soft_wrap=True)
    for note in plan.notes:
        console.print(f"[yellow]note[/]        {note}", soft_wrap=True)


def _mixture(plan: RunPlan, *, fancy: bool) -> Table:
    """Return the domains, largest share first."""
    # No column of dashes where no source tells its bytes.
    bytes_known = any(d.sizes.bytes_per_token for d in plan.domains)
    head = ["mixture", "share", "tokens", "read", "epochs", "documents"]
    table = plain_table(*head, *(["bytes/token"] if bytes_known else []), "entropy", fancy=fancy)
    rows = sorted(plan.domains, key=lambda domain: -domain.share)
    about = "~" if plan.estimated else ""
    for domain in rows[:_MAX_DOMAINS_SHOWN]:
        sizes = domain.sizes
        cells = [
            sizes.name,
            percent(domain.share),
            about + amount(sizes.tokens),
            amount(domain.read),
            about + epochs(domain),
            "-" if sizes.documents is None else f"{sizes.documents:,}",
        ]
        if bytes_known:
            known = sizes.bytes_per_token
            cells.append(f"{known:.2f}" if known else "-")
        entropy = sizes.unigram_entropy
        table.add_row(*cells, "-" if entropy is None else f"{entropy:.2f}")
    _add_rest(table, rows[_MAX_DOMAINS_SHOWN:])
    total = sum(domain.sizes.tokens for domain in plan.domains)
    read = sum(domain.read for domain in plan.domains)
    table.add_section()
    table.add_row(f"{len(rows)} domains", "100 %", about + amount(total), amount(read))
    return table


def _add_rest(table: Table, rest: Sequence[DomainPlan]) -> None:
    if rest:
        share = sum(domain.share for domain in rest)
        tokens = sum(domain.sizes.tokens for domain in rest)
        read = sum(domain.read for domain in rest)
        table.add_row(f"... {len(rest)} more", percent(share), amount(tokens), amount(read))


def _pieces(plan: RunPlan, *, fancy: bool) -> Table:
    """Return the shares of each domain at the steps where they change."""
    pieces = plan.segments
    if len(pieces) > _MAX_PIECES_SHOWN:
        # Evenly spaced from the first to the last: how the schedule ends must show.
        stride = (len(pieces) - 1) / (_MAX_PIECES_SHOWN - 1)
        pieces = tuple(pieces[round(at * stride)] for at in range(_MAX_PIECES_SHOWN))
    table = plain_table("share from step", *(f"{piece.start:,}" for piece in pieces), fancy=fancy)
    # In the order of `share_D`, not by size: shares change from column to column.
    for at, domain in enumerate(plan.domains[:_MAX_DOMAINS_SHOWN]):
        table.add_row(domain.sizes.name, *(percent(float(piece.share_D[at])) for piece in pieces))
    return table


def _load(plan: RunPlan) -> str:
    """Return in words what a worker does in a step."""
    if not plan.packed:
        shared = f"; {plan.context_parallel} may share one" if plan.context_parallel > 1 else ""
        return f"documents of up to {plan.micro_batch_tokens:,} tokens at once on each{shared}"
    fewest, most = plan.rows_per_worker
    # The rows of a step need not divide evenly among the workers.
    rows = f"{most}" if fewest == most else f"{fewest} or {most}"
    passes = f"{plan.accumulation} forward passes" if plan.accumulation > 1 else "1 forward pass"
    return f"{rows} rows each per step in {passes} of up to {plan.micro_batch_rows}"


def _parameters(plan: RunPlan) -> str:
    """Return the parameters in words, and how many of them are trained where not all are."""
    if plan.trainable == plan.parameters:
        return f"{amount(plan.parameters)} parameters"
    return f"{amount(plan.parameters)} parameters, {amount(plan.trainable)} of them trained"


def _facts(plan: RunPlan) -> list[tuple[str, str]]:
    """Return the lines below the tables: a name and what there is to say."""
    batch = f"{plan.rows_per_step:,} rows of {plan.sequence_length:,}"
    if not plan.packed:
        batch = f"whole documents of up to {plan.sequence_length:,}"
    workers = "in this process" if plan.workers == 0 else f"{plan.workers} workers"
    device = "GPU" if plan.on_gpu else "CPU"
    parts = [part for part in plan.worker_memory if part.bytes]
    memory = ", ".join(f"{part.name} {size(part.bytes)}" for part in parts)
    cache = f" + block cache up to {size(plan.cache_bytes)}" if plan.cache_bytes else ""
    disk = "" if plan.disk_free is None else f", {size(plan.disk_free)} free on disk"
    return [
        ("mixer", plan.mixer),
        (
            "run",
            f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens "
            f"({batch}) = "
            f"{amount(plan.tokens)} tokens",
        ),
        (
            "workers",
            f"{workers} on {device}, {_load(plan)}",
        ),
        (
            "model",
            f"{_parameters(plan)}, {plan.flops_per_token * plan.tokens:.2g} "
            "floating-point operations in all",
        ),
        # No workers means this process, which needs the memory of one.
        ("memory", f"{size(plan.memory_bytes)} = {max(1, plan.workers)} x ({memory}){cache}"),
        (
            "checkpoints",
            f"{size(plan.checkpoint_bytes)} each, {plan.keep_checkpoints} kept{disk}",
        ),
        ("results", plan.run_dir),
    ]


def epochs(domain: DomainPlan) -> str:
    """Return the epochs of a domain, with its cap where there is one."""
    cap = "" if domain.max_epochs is None else f" of {domain.max_epochs:g}"
    return f"{domain.epochs:.2f}{cap}"


def percent(share: float) -> str:
    """Return a share as a percentage that does not round a small one to nothing."""
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else f"{100 * share:.2g} %"


def amount(value: float) -> str:
    """Return a count in three digits: 950, 12.3 k, 4.56 M, 7.89 G."""
    return _scaled(value, ("", " k", " M", " G", " T", " P"))


def size(value: float) -> str:
    """Return bytes in three digits: 12.3 MB."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB", " PB"))


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        # From 999.5 on three digits would round to 1e+03.
        if value < 999.5:
            return (f"{value:.0f}" if value == int(value) else f"{value:.3g}") + unit
        value /= 1000
    return f"{value:.3g}{units[-1]}"
