"""What makes merged weights a model: configuration, tokenizer, card and report."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from raymix._utils.json import parse_json
from raymix._utils.yaml import dump_yaml
from raymix.errors import MergeError, format_problem
from raymix.merging.checkpoints.adapter import CONFIG, merged_config
from raymix.merging.checkpoints.models import SourceModel
from raymix.merging.run.plan import Plan

REPORT = "merge_report.json"
"""The report's file name."""

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
# Of a tokenizer without tokenizer.json, these say what its ids mean.
_VOCABULARY = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
# What changes the meaning of weights although all shapes agree.
_STRUCTURE = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
)
_NOTED = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "sliding_window")


def check_tokenizers(plan: Plan) -> list[str]:
    """Return notes for the report on what the models' configurations say differently.

    Raises:
        MergeError: If tokenizers differ, or configurations do in what weights mean.
    """
    if plan.models is None:
        return []
    first = plan.models.first
    notes: list[str] = []
    problems: list[str] = []
    expected = _vocabulary(first.checkpoint.path) if plan.file.check_tokenizer else None
    for model in plan.models.every()[1:]:
        if model.checkpoint is first.checkpoint:
            continue
        problems += _config_problems(model, first)
        ours, theirs = model.checkpoint.config, first.checkpoint.config
        differing = [key for key in _NOTED if ours.get(key) != theirs.get(key)]
        if differing:
            notes.append(f"{model.label}: other {', '.join(differing)} than {first.label}, kept")
        found = _vocabulary(model.checkpoint.path) if expected is not None else None
        if found is not None and expected is not None and found != expected:
            problems.append(
                format_problem(
                    model.field,
                    model.label,
                    f"its tokenizer differs from that of {first.label}: {_first(found, expected)}",
                    fix=(
                        "Merge models of one tokenizer, or set check_tokenizer: false to keep "
                        "the first"
                    ),
                )
            )
    if problems:
        raise MergeError(*problems)
    _tokenizer_source(plan)
    return notes


def finish_files(
    plan: Plan,
    folder: Path,
    done: Mapping[str, Mapping[str, Any]] | None,
    notes: Sequence[str],
) -> None:
    """Write everything besides the weights into `folder`; no report or card without `done`."""
    index = plan.layout.index()
    if index is not None:
        (folder / f"{plan.layout.stem}.safetensors.index.json").write_text(index, "utf-8")
    if plan.models is None:
        ranks = {
            module: plan.layout.places[plan.tensors(module)[0]].shape[0] for module in plan.choices
        }
        (folder / CONFIG).write_text(merged_config(list(plan.adapters), ranks), "utf-8")
    else:
        _copy(plan, plan.models.first, folder)
    if done is not None:
        _write_report(plan, folder, done, notes)


def _write_report(
    plan: Plan, folder: Path, done: Mapping[str, Mapping[str, Any]], notes: Sequence[str]
) -> None:
    parents = [
        {
            "path": label,
            "files": {os.path.basename(f): done[f"sha256:{f}"]["sha256"] for f in files},
        }
        for label, files in plan.sources()
    ]
    report = {
        "raymix": _version(),
        "merge": plan.file.model_dump(mode="json", exclude_unset=True),
        "parents": parents,
        "notes": list(notes),
        "tensors": {job: done[job]["report"] for job in plan.choices},
    }
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    (folder / "README.md").write_text(_card(plan, parents), "utf-8")


def _tokenizer_source(plan: Plan) -> str:
    """Return the directory whose tokenizer is copied."""
    source = plan.file.tokenizer_source
    first = plan.models.first.checkpoint.path if plan.models else ""
    if source in (None, "base", first):
        return first
    known = [model.checkpoint.path for model in plan.models.every()] if plan.models else []
    if source not in known:
        raise MergeError.at(
            "tokenizer_source",
            source,
            "neither `base` nor one of the models",
            fix="Vocabularies are not united: the models must share one",
        )
    return str(source)


def _copy(plan: Plan, first: SourceModel, folder: Path) -> None:
    config = dict(first.checkpoint.config)
    out = plan.file.out_dtype or plan.file.dtype
    if out is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = out
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    generation = Path(first.checkpoint.path, "generation_config.json")
    if generation.exists():
        shutil.copyfile(generation, folder / generation.name)
    source = Path(_tokenizer_source(plan))
    for name in _TOKENIZER:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _config_problems(model: SourceModel, first: SourceModel) -> list[str]:
    ours, theirs = model.checkpoint.config, first.checkpoint.config
    return [
        format_problem(
            model.field,
            model.label,
            f"its config says {key} {ours.get(key)!r}, that of {first.label} {theirs.get(key)!r}",
            fix="Weights of unlike models cannot be merged",
        )
        for key in _STRUCTURE
        if key in ours and key in theirs and ours[key] != theirs[key]
    ]


def _vocabulary(path: str) -> dict[str, Any] | None:
    """Return what a tokenizer's ids mean, or None where a directory has no tokenizer."""
    file = Path(path, "tokenizer.json")
    if file.exists():
        try:
            data = parse_json(file.read_text("utf-8"))
            return _token_ids(data)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise MergeError.at(
                "models", str(file), f"not a tokenizer: {error}", fix="Download it again"
            ) from None
    held = {name: Path(path, name) for name in _VOCABULARY}
    found = {name: file.read_bytes() for name, file in held.items() if file.exists()}
    return found or None


def _token_ids(document: Any) -> dict[str, Any]:
    """Return the ids by token of a `tokenizer.json`; any exception says that it is none."""
    vocabulary = document.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: pairs of token and score, the id is the place
        vocabulary = {pair[0]: at for at, pair in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in document.get("added_tokens") or ()}
    return {**vocabulary, **added}


def _first(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    for token, number in expected.items():
        if found.get(token) != number:
            if isinstance(number, bytes):
                return f"the file {token}"
            return f"token {token!r} has id {found.get(token, 'none')} here and {number} there"
    more = [token for token in found if token not in expected]
    return f"{len(more)} more tokens, such as {more[0]!r}"


def _card(plan: Plan, parents: Sequence[Mapping[str, Any]]) -> str:
    adapter = plan.models is None
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if not adapter:
        head["pipeline_tag"] = "text-generation"
    head |= {"tags": ["merge", "raymix"], "license": "other"}
    rows = [
        f"| {_name(parent['path'])} | {file} | `{digest}` |"
        for parent in parents
        for file, digest in parent["files"].items()
    ]
    recipe = plan.file.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    for entry in [recipe, *recipe["models"]]:
        for key in ("base_model", "model", "tokenizer_source"):
            if entry.get(key):
                entry[key] = _name(entry[key])
    what = "A LoRA adapter" if adapter else "A model"
    return "\n".join(
        [
            f"---\n{dump_yaml(head)}---\n",
            f"# {plan.file.name or 'Merged model'}\n",
            f"{what} merged with raymix {_version()} by `{plan.file.merge_method}`; "
            f"`{REPORT}` says per tensor what became of the parents.\n",
            "## Parents\n",
            "| model | file | SHA-256 |\n|---|---|---|\n" + "\n".join(rows) + "\n",
            "## Merge\n",
            f"```yaml\n{dump_yaml(recipe)}```\n",
            "## Licence\n",
            "The licence of these weights is for whoever publishes them to state: replace `other` "
            "above, and see to it that it fits the licences of all parents.\n",
        ]
    )


def _version() -> str:
    return metadata.version("raymix")


def _name(path: str) -> str:
    """Return a model's name without the directories of this machine."""
    return "+".join(os.path.basename(part) for part in path.split("+"))
