"""Exporting a checkpoint as a Hugging Face model directory with a card: `raymix export`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from raymix._utils.yaml import dump_yaml
from raymix.errors import RecipeError
from raymix.training.evaluate.checkpoint_ref import CheckpointRef, find_checkpoint
from raymix.training.host.environment import raymix_version
from raymix.training.run.checkpoint import disk_full
from raymix.training.summary import summary

_NOT_FOR_EXPORT = ("optimizer.safetensors", "state.json")


def export(path: str | Path, out: str | Path) -> dict[str, Any]:
    """Return what was written to the new directory `out`: model, tokenizer and a card.

    Args:
        path: A run directory (its newest checkpoint) or a checkpoint.
        out: Where to write; it must not exist, or be empty.

    Raises:
        RecipeError: If `out` is taken, the checkpoint cannot be used, or the disk is full.
    """
    target = find_checkpoint(path)
    place = Path(os.path.abspath(out))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RecipeError.at(
            "out", str(out), "it exists, and nothing is overwritten", fix="Name a new directory"
        )
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for file in sorted(target.checkpoint.iterdir()):
            if file.is_file() and file.name not in _NOT_FOR_EXPORT:
                shutil.copyfile(file, temporary / file.name)
        (temporary / "README.md").write_text(_card(target), encoding="utf-8")
        if place.exists():
            place.rmdir()
        os.replace(temporary, place)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_full(error, place) from error
    return {
        "out": str(place),
        "checkpoint": target.where,
        "step": target.state.step if target.state else None,
        "files": sorted(file.name for file in place.iterdir()),
    }


def _card(target: CheckpointRef) -> str:
    """Return the model card: what the model is, what it read, how well it does."""
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["raymix"],
        "license": "other",
    }
    name = target.run.path.name if target.run else target.checkpoint.name
    parts = [f"---\n{dump_yaml(head)}---\n", f"# {name}\n"]
    if target.run is None or target.state is None:
        parts.append("A causal language model in Hugging Face format.\n")
        return "\n".join(parts)
    document = summary(target.run)
    recipe = target.run.recipe()
    parts += [
        f"A causal language model trained with raymix {raymix_version()}: "
        f"{document['steps']:,} steps, {document['tokens']:,} tokens.\n",
        "## What it read\n",
        f"Corpus fingerprint `{target.state.corpus_fingerprint}`. Shares are of tokens; losses "
        "are of held-out text, in nats per token.\n",
        _table(document["domains"]),
        "## Licence\n",
        "The licence of these weights is for whoever publishes them to state: replace `other` "
        "above, and see to it that it fits the licences of the texts.\n",
        "## Recipe\n",
        "```yaml\n" + (target.run.path / "recipe.yaml").read_text("utf-8").rstrip() + "\n```\n",
        "## Use\n",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(PATH)\n"
        "tokenizer = AutoTokenizer.from_pretrained(PATH)\n"
        "```\n",
        f"Rows of {recipe.data.sequence_length:,} tokens; documents did not see each other, and "
        "each began at position 0 without a token before its first.\n",
    ]
    return "\n".join(parts)


def _table(domains: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| domain | tokens | share asked | share realized | epochs | loss before | loss after "
        "| bits per byte |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in domains.items():
        lines.append(
            f"| {name} | {row['tokens']:,} | {100 * row['share_asked']:.2f} % "
            f"| {100 * row['share_realised']:.2f} % | {row['epochs']:.2f} "
            f"| {_number(row['loss_first'])} | {_number(row['loss_last'])} "
            f"| {_number(row['bits_per_byte'])} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
