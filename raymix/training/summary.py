"""The summary of a run: the document of `raymix train --json`, and the table printed at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from raymix._utils.formatting import short
from raymix.errors import RecipeError
from raymix.sampling import MixtureLog
from raymix.store import Corpus
from raymix.training.plan.domain_sizes import DomainSizes, prepared_sizes
from raymix.training.run.remote_run import newest_checkpoint_of
from raymix.training.run.rundir import RunDirectory, read_metrics

_MAX_TABLE_ROWS = 40


def summary(run: RunDirectory) -> dict[str, Any]:
    """Return the summary of a run from its files alone; the keys are stable.

    Raises:
        RecipeError: If the run has no checkpoint yet.
    """
    newest = newest_checkpoint_of(run)
    if newest is None:
        raise RecipeError.at(
            "run", run.where, "the run has no whole checkpoint", fix="Train it first"
        )
    _, state = newest
    recipe = run.recipe()
    corpus = Corpus.open(recipe.corpus.path)
    loss, seconds, skipped = None, 0.0, 0
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for line in read_metrics(run.metrics):
        # Steps after the checkpoint are done again when the run resumes.
        if line["step"] > state.step:
            continue
        if "loss" in line:
            loss, seconds = line["loss"], seconds + (line.get("seconds") or 0.0)
        skipped += "skipped" in line
        if "eval" in line:
            # By domain: one that was added is scored when it comes.
            first, last = {**line["eval"], **first}, line["eval"]
    requested = requested_shares(run, state.step)
    total = sum(state.tokens.values()) + sum(state.left.values())
    domains = {
        sizes.name: _domain(
            sizes,
            entropy=corpus.split(sizes.name, "valid").unigram_entropy,
            requested=requested.get(sizes.name, 0.0),
            tokens=state.tokens.get(sizes.name, 0),
            total=total,
            first=first,
            last=last,
        )
        for sizes in prepared_sizes(corpus, recipe.data)
    }
    return {
        "run": run.where,
        "steps": state.step,
        "skipped_steps": skipped,
        "tokens": total,
        "tokens_per_s": total / seconds if seconds else None,
        "loss": loss,
        "seconds": seconds,
        "domains": domains,
    }


def requested_shares(run: RunDirectory, steps: int) -> dict[str, float]:
    """Return the mean share requested of each domain over the first `steps` steps."""
    if not run.mixture_log.exists() or not steps:
        return {}
    text = run.mixture_log.read_text("utf-8", errors="replace")
    log = MixtureLog.from_lines(text.split("\n")[:-1], path=str(run.mixture_log))
    log = log.joined()
    if not log.entries:
        return {}
    starts = [min(entry.first_step, steps) for entry in log.entries]
    ends = [*starts[1:], steps]
    mean = dict.fromkeys(log.domains, 0.0)
    for entry, start, end in zip(log.entries, starts, ends, strict=True):
        for name, weight in zip(log.domains, entry.weights, strict=True):
            mean[name] += weight * (end - start) / steps
    return mean


def _domain(
    sizes: DomainSizes,
    *,
    entropy: float | None,
    requested: float,
    tokens: int,
    total: int,
    first: Mapping[str, Any],
    last: Mapping[str, Any],
) -> dict[str, Any]:
    before, after = first.get(sizes.name, {}), last.get(sizes.name, {})
    return {
        "tokens": tokens,
        "share_asked": requested,
        "share_realised": tokens / total if total else 0.0,
        "epochs": tokens / sizes.usable if sizes.usable else 0.0,
        "loss_first": before.get("loss"),
        "loss_last": after.get("loss"),
        "bits_per_byte": after.get("bits_per_byte"),
        # Of the held-out text, like the losses beside it; 0 where there is none.
        "unigram_entropy": entropy or None,
    }


def print_summary(document: Mapping[str, Any], console: Console) -> None:
    """Print the table of a run's domains, largest share first."""
    fancy = console.is_terminal
    table = Table(box=None, pad_edge=False, header_style="bold" if fancy else "")
    table.add_column("domain", no_wrap=True)
    heads = ("tokens", "asked", "realized", "epochs", "loss before", "after", "unigram H", "bits/B")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    ranked = sorted(document["domains"].items(), key=lambda item: -item[1]["tokens"])
    for name, row in ranked[:_MAX_TABLE_ROWS]:
        table.add_row(
            name,
            f"{row['tokens']:,}",
            f"{100 * row['share_asked']:.2f}%",
            f"{100 * row['share_realised']:.2f}%",
            f"{row['epochs']:.2f}",
            *(_number(row[key]) for key in ("loss_first", "loss_last", "unigram_entropy")),
            _number(row["bits_per_byte"]),
        )
    console.print(table)
    if len(ranked) > _MAX_TABLE_ROWS:
        console.print(f"... and {len(ranked) - _MAX_TABLE_ROWS} more domains; --json lists all.")
    pace = document["tokens_per_s"]
    throughput = f", {short(pace)} tokens/s" if pace else ""
    console.print(f"{document['steps']:,} steps, {document['tokens']:,} tokens{throughput}")
    if skipped := document["skipped_steps"]:
        console.print(f"{skipped:,} steps were left out (see metrics.jsonl).")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
