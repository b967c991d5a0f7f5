"""Files of a merged model beside its weights: configuration, tokenizer, model card, report.

Also the check that models agree in what shapes do not show: token ids, heads, activations.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from raymix._utils.json import parse_json
from raymix._utils.tokenizer_files import limit_tokenizer
from raymix._utils.yaml import dump_yaml
from raymix.errors import MergeError, format_problem
from raymix.merging.checkpoints.adapter import ADAPTER_CONFIG, merged_config
from raymix.merging.checkpoints.models import SourceModel
from raymix.merging.run.plan import MergePlan
from raymix.store.remote.hub import hub_name

REPORT_FILE = "merge_report.json"
"""File name of the report."""

_TOKENIZER_FILES = (
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
# Files that define the token ids where there is no tokenizer.json; compared byte by byte.
_VOCABULARY_FILES = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
# Settings that change the meaning of weights although all shapes agree: errors if they differ.
_STRUCTURE_KEYS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
)
# Settings that models of one family may differ in, e.g. after context extension: notes only.
_NOTED_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "sliding_window")


def check_tokenizers(plan: MergePlan) -> list[str]:
    """Return notes for the report on settings in which the models' configurations differ.

    Raises:
        MergeError: If tokenizers differ, or settings that change the meaning of weights.
    """
    if plan.models is None:
        return []
    first = plan.models.first
    notes: list[str] = []
    problems: list[str] = []
    expected = _vocabulary(first.checkpoint.path) if plan.file.check_tokenizer else None
    for model in plan.models.unique()[1:]:
        if model.checkpoint is first.checkpoint:  # an adapter on the base: the same files
            continue
        problems += _config_problems(model, first)
        ours, theirs = model.checkpoint.config, first.checkpoint.config
        differing = [key for key in _NOTED_KEYS if ours.get(key) != theirs.get(key)]
        if differing:
            notes.append(f"{model.label}: other {', '.join(differing)} than {first.label}, kept")
        # A model without a tokenizer is accepted: training code often saves weights alone.
        vocabulary = _vocabulary(model.checkpoint.path) if expected is not None else None
        if vocabulary is not None and expected is not None and vocabulary != expected:
            difference = _first_difference(vocabulary, expected)
            problems.append(
                format_problem(
                    model.field,
                    model.label,
                    f"its tokenizer differs from that of {first.label}: {difference}",
                    fix=(
                        "Merge models of one tokenizer, or set check_tokenizer: false to keep "
                        "the first one"
                    ),
                )
            )
    if problems:
        raise MergeError(*problems)
    _tokenizer_source(plan)  # for its error, before anything is written
    return notes


def finish_files(
    plan: MergePlan,
    folder: Path,
    done: Mapping[str, Mapping[str, Any]] | None,
    notes: Sequence[str],
) -> None:
    """Write all files beside the weights into `folder`; `done` None: without report and card.

    Args:
        plan: The plan of the merge.
        folder: The workspace.
        done: Journal lines by job.
        notes: Notes of `check_tokenizers`, for the report.
    """
    index = plan.layout.index()
    if index is not None:
        (folder / f"{plan.layout.stem}.safetensors.index.json").write_text(index, "utf-8")
    if plan.models is None:
        ranks = {
            module: plan.layout.locations[plan.tensors(module)[0]].shape[0]
            for module in plan.choices
        }
        (folder / ADAPTER_CONFIG).write_text(merged_config(list(plan.adapters), ranks), "utf-8")
    else:
        _write_config_and_tokenizer(plan, plan.models.first, folder)
    if done is not None:
        _write_report(plan, folder, done, notes)


def _write_report(
    plan: MergePlan, folder: Path, done: Mapping[str, Mapping[str, Any]], notes: Sequence[str]
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
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    (folder / "README.md").write_text(_card(plan, parents), "utf-8")


def _tokenizer_source(plan: MergePlan) -> str:
    """Return the directory that the tokenizer is copied from.

    Raises:
        MergeError: If `tokenizer_source` is not one of the models.
    """
    source = plan.file.tokenizer_source
    first = plan.models.first.checkpoint.path if plan.models else ""
    if source in (None, "base", first):
        return first
    known = [model.checkpoint.path for model in plan.models.unique()] if plan.models else []
    if source not in known:
        raise MergeError.at(
            "tokenizer_source",
            source,
            "neither `base` nor one of the models",
            fix="Vocabularies are not united: the models must share one tokenizer",
        )
    return str(source)


def _write_config_and_tokenizer(plan: MergePlan, first: SourceModel, folder: Path) -> None:
    config = dict(first.checkpoint.config)
    out = plan.file.out_dtype or plan.file.dtype
    if out is not None:
        # transformers renamed `torch_dtype` to `dtype`; older versions read the old key only.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = out
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    generation = Path(first.checkpoint.path, "generation_config.json")
    if generation.exists():
        shutil.copyfile(generation, folder / generation.name)
    source = Path(_tokenizer_source(plan))
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int):
        limit_tokenizer(folder / "tokenizer_config.json", longest, keep=True)


def _config_problems(model: SourceModel, first: SourceModel) -> list[str]:
    """Return one message per structural setting that differs from the first model's."""
    ours, theirs = model.checkpoint.config, first.checkpoint.config
    return [
        format_problem(
            model.field,
            model.label,
            f"its config says {key} {ours.get(key)!r}, that of {first.label} {theirs.get(key)!r}",
            fix="Weights of different architectures cannot be merged",
        )
        for key in _STRUCTURE_KEYS
        if key in ours and key in theirs and ours[key] != theirs[key]
    ]


def _vocabulary(path: str) -> dict[str, Any] | None:
    """Return ids by token, or file contents by name; None: the directory has no tokenizer."""
    file = Path(path, "tokenizer.json")
    if file.exists():
        try:
            data = parse_json(file.read_text("utf-8"))
            return _token_ids(data)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise MergeError.at(
                "models", str(file), f"not a tokenizer: {error}", fix="Download it again"
            ) from None
    files = {name: Path(path, name) for name in _VOCABULARY_FILES}
    contents = {name: file.read_bytes() for name, file in files.items() if file.exists()}
    return contents or None


def _token_ids(document: Any) -> dict[str, Any]:
    """Return the ids by token of a `tokenizer.json`; raises various errors if it is malformed."""
    vocabulary = document.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: pairs of token and score, the id is the index
        vocabulary = {pair[0]: index for index, pair in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in document.get("added_tokens") or ()}
    return {**vocabulary, **added}


def _first_difference(vocabulary: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the first difference of two vocabularies, for a message."""
    for token, token_id in expected.items():
        if vocabulary.get(token) != token_id:
            if isinstance(token_id, bytes):  # file contents by name, see `_vocabulary`
                return f"the file {token}"
            own_id = vocabulary.get(token, "none")
            return f"token {token!r} has id {own_id} here and {token_id} there"
    extra = [token for token in vocabulary if token not in expected]
    return f"{len(extra)} more tokens, such as {extra[0]!r}"


def _card(plan: MergePlan, parents: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of the model card, in the Hub's format."""
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
    # Absolute paths would publish user and directory names of this machine.
    recipe = plan.file.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    for entry in [recipe, *recipe["models"]]:
        for key in ("base_model", "model", "tokenizer_source"):
            if entry.get(key):
                entry[key] = _name(entry[key])
    noun = "A LoRA adapter" if adapter else "A model"
    return "\n".join(
        [
            f"---\n{dump_yaml(head)}---\n",
            f"# {plan.file.name or 'Merged model'}\n",
            f"{noun} merged with raymix {_version()} by `{plan.file.merge_method}`; "
            f"`{REPORT_FILE}` says per tensor what became of the parents.\n",
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
    """Return a model's name without directories of this machine; on the Hub, with its commit."""
    return "+".join(hub_name(part) or os.path.basename(part) for part in path.split("+"))
