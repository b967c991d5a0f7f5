"""Export of a checkpoint as a Hugging Face model directory with a model card (`raymix export`)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from raymix._utils.json import parse_json
from raymix._utils.tokenizer_files import limit_tokenizer
from raymix._utils.yaml import dump_yaml
from raymix.errors import RecipeError
from raymix.recipe import PretrainedModel, Recipe, load_recipe
from raymix.recipe.paths import PathField, is_url, map_paths
from raymix.training.evaluate.checkpoint_ref import CheckpointRef, find_checkpoint
from raymix.training.host.environment import raymix_version
from raymix.training.model.lora import is_adapter, merge_lora
from raymix.training.model.run_model import checkpoint_facts, run_model
from raymix.training.run.checkpoint import disk_full
from raymix.training.summary import summary

# Twice the size of the weights, and of use only to resume a run.
_TRAINING_FILES = ("optimizer.safetensors", "state.json")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_USE_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH)
tokenizer = AutoTokenizer.from_pretrained(PATH)
"""
_USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained(BASE)  # the model that the recipe names
model = PeftModel.from_pretrained(base, PATH)
tokenizer = AutoTokenizer.from_pretrained(PATH)
"""


def export(path: str | Path, out: str | Path) -> dict[str, Any]:
    """Write model, tokenizer and model card to the directory `out`, and return a summary.

    Args:
        path: A run directory (its newest checkpoint) or a checkpoint.
        out: Directory to write; it must not exist, or be empty.

    Raises:
        RecipeError: If `out` is not empty, the checkpoint cannot be used, or the disk is full.
    """
    reference = find_checkpoint(path)
    directory = Path(os.path.abspath(out))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RecipeError.at(
            "out", str(out), "it exists, and nothing is overwritten", fix="Name a new directory"
        )
    # Renamed when complete: an interrupted export leaves no directory that loads.
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        adapter = _adapter_export(reference)
        left_out = {*_TRAINING_FILES, *(_ADAPTER_FILES if adapter == "merged" else ())}
        # peft's directories have none: the model's configuration is that of the base.
        left_out |= {"config.json"} if adapter == "adapter" else set()
        for file in sorted(reference.checkpoint.iterdir()):
            if file.is_file() and file.name not in left_out:
                shutil.copyfile(file, temporary / file.name)
        if adapter == "merged":
            _save_merged(reference, temporary)
        limit_tokenizer(temporary / "tokenizer_config.json", _longest(reference))
        (temporary / "README.md").write_text(_card(reference), encoding="utf-8")
        # `rmdir` and not `rmtree`: it refuses a directory that has been filled meanwhile.
        if directory.exists():
            directory.rmdir()
        os.replace(temporary, directory)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_full(error, directory) from error
    return {
        "out": str(directory),
        "checkpoint": reference.where,
        "step": reference.state.step if reference.state else None,
        "files": sorted(file.name for file in directory.iterdir()),
    }


def _longest(reference: CheckpointRef) -> int | None:
    """Return the tokens that the model takes: the rows it was trained on, or as many as before."""
    recipe = reference.run.recipe() if reference.run else None
    if recipe is not None and not isinstance(recipe.model, PretrainedModel):
        return recipe.data.sequence_length
    # Trained on from a checkpoint: short rows do not make it forget the longer ones.
    longest = parse_json((reference.checkpoint / "config.json").read_text("utf-8")).get(
        "max_position_embeddings"
    )
    return longest if isinstance(longest, int) else None


def _shown_recipe(recipe: Recipe) -> str:
    """Return the recipe for a model card: file names in place of the paths of this machine."""
    shown = map_paths(recipe, lambda path, field, _: _file_name(path, field))
    # Where it ran, and where its results went, are nobody else's.
    left_out = {"run": True, "cluster": {"address"}}
    return dump_yaml(shown.model_dump(mode="json", exclude_unset=True, exclude=left_out))


def _file_name(path: str, field: PathField) -> str:
    local = path not in field.words and (path.startswith("file:") or not is_url(path))
    return path.rstrip("/").rpartition("/")[2] if local else path


def _adapter_export(reference: CheckpointRef) -> str | None:
    """Return `model.lora.export` of a checkpoint that is an adapter; None for a whole model."""
    if not is_adapter(reference.checkpoint):
        return None
    lora = reference.run.recipe().model.lora if reference.run is not None else None
    return lora.export if lora is not None else "adapter"


def _save_merged(reference: CheckpointRef, directory: Path) -> None:
    """Write the model of a run, with the updates of its adapters added, to `directory`."""
    assert reference.run is not None
    recipe = reference.run.recipe()
    facts = checkpoint_facts(recipe, reference.checkpoint)
    model = run_model(recipe, facts, reference.checkpoint)
    merge_lora(model)
    model.save_pretrained(directory)


def _card(reference: CheckpointRef) -> str:
    """Return the model card: training data, held-out losses, recipe and use."""
    adapter = _adapter_export(reference) == "adapter"
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["raymix"],
        "license": "other",
    }
    name = reference.run.path.name if reference.run else reference.checkpoint.name
    parts = [f"---\n{dump_yaml(head)}---\n", f"# {name}\n"]
    if reference.run is None or reference.state is None:
        parts.append("A causal language model in Hugging Face format.\n")
        return "\n".join(parts)
    document = summary(reference.run)
    recipe = reference.run.recipe()
    # As it was given: fields that keep their defaults are left out.
    given = load_recipe(reference.run.path / "recipe.yaml")
    parts += [
        f"A causal language model trained with raymix {raymix_version()}: "
        f"{document['steps']:,} steps, {document['tokens']:,} tokens.\n",
        "## What it read\n",
        f"Corpus fingerprint `{reference.state.corpus_fingerprint}`. Shares are of tokens; losses "
        "are of held-out text, in nats per token.\n",
        _table(document["domains"]),
        "## Licence\n",
        "The licence of these weights is for whoever publishes them to state: replace `other` "
        "above, and see to it that it fits the licences of the texts.\n",
        "## Recipe\n",
        f"```yaml\n{_shown_recipe(given)}```\n",
        "## Use\n",
        f"```python\n{_USE_ADAPTER if adapter else _USE_MODEL}```\n",
        # Users who pack rows without that mask, or add a start token, get other losses than these.
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
