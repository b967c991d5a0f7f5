"""Hugging Face models: from a configuration or a checkpoint directory, checked before training.

Whether documents of one row see each other is tested in `traits`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raymix._utils.formatting import one_line
from raymix.errors import RecipeError, did_you_mean, format_problem
from raymix.recipe.training import ConfigModel, ModelConfig, PretrainedModel
from raymix.store.remote.hub import fetch_config, fetch_model
from raymix.training.model.facts import CorpusFacts, ModelSize
from raymix.training.model.lora import add_lora
from raymix.training.model.optimizer_class import parameter_elements
from raymix.training.run.pinned_model import pretrained_repo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Accepted by transformers for older configurations; it moves them to `rope_parameters`.
_LEGACY_FIELDS = frozenset({"rope_theta", "rope_scaling"})
# Of fields that do not fit each other; a missing one is None.
_CONSTRUCTION_ERRORS = (
    ValueError, TypeError, KeyError, ArithmeticError, RuntimeError, AttributeError,
)  # fmt: skip
# How the source of an architecture reads a field of its configuration.
_READ_FIELD = re.compile(
    r"""\bconfig\.([a-z]\w*)"""
    r"""|\bgetattr\((?:self\.)?(?:config|self), *["'](\w+)["']"""
    r"""|\bkwargs\.(?:pop|get|setdefault)\(["'](\w+)["']"""
)


def resolve_config(model: ModelConfig, facts: CorpusFacts) -> PreTrainedConfig:
    """Return the model's configuration, completed from the corpus.

    Raises:
        RecipeError: If the type or a field is unknown, or the model does not fit the corpus.
    """
    if isinstance(model, PretrainedModel):
        config = _checkpoint_config(model)
        path = "model.path"
    else:
        config = _new_config(model, facts)
        path = "model.config"
    _check_fit(config, facts, path)
    return config


def _new_config(model: ConfigModel, facts: CorpusFacts) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model.type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model.type not in CONFIG_MAPPING:
        raise RecipeError.at(
            "model.type",
            model.type,
            "not a causal language model of transformers",
            allowed=did_you_mean(model.type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            fix="Common ones are llama, qwen3, gpt2, mistral and gemma2",
        )
    config_class = CONFIG_MAPPING[model.type]
    known = {field.name for field in dataclasses.fields(config_class)}
    known |= set(config_class.attribute_map) | _LEGACY_FIELDS
    if not model.config.keys() <= known:
        known |= _fields_in_source(config_class)
    unknown = [
        format_problem(
            f"model.config.{name}",
            value,
            f"not a field of {model.type}'s configuration",
            fix=did_you_mean(name, known),
        )
        for name, value in model.config.items()
        if name not in known
    ]  # fmt: skip
    if unknown:
        raise RecipeError(*unknown)
    return _instantiate(config_class, model, facts)


def _fields_in_source(config_class: type[PreTrainedConfig]) -> set[str]:
    """Return the fields that an architecture reads without declaring them."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    # Qwen 3 MoE, for one, reads `head_dim` by getattr, and published checkpoints set it.
    modules = (
        MODEL_FOR_CAUSAL_LM_MAPPING[config_class].__module__,
        config_class.__module__,
    )
    source = "\n".join(inspect.getsource(import_module(name)) for name in modules)
    names = {next(filter(None, groups)) for groups in _READ_FIELD.findall(source)}
    # Methods and class attributes are no fields.
    return {name for name in names if not hasattr(config_class, name)}


def _instantiate(config_class: Any, model: ConfigModel, facts: CorpusFacts) -> PreTrainedConfig:
    defaults: dict[str, Any] = {
        "vocab_size": facts.vocab_size,
        "eos_token_id": facts.eos_id,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    # A deep copy: transformers writes into nested values such as rope parameters.
    fields = {**defaults, **copy.deepcopy(model.config)}
    with _recipe_errors("model.config", model.config):
        config = config_class(**fields)
    # A default of the architecture is raised to the row length; a value of the user is checked.
    given = {"max_position_embeddings", "n_positions"} & set(model.config)
    if not given and getattr(config, "max_position_embeddings", None) is not None:
        longest = max(config.max_position_embeddings, facts.sequence_length)
        config.max_position_embeddings = longest
    return config


def _checkpoint_config(model: PretrainedModel) -> PreTrainedConfig:
    from transformers import AutoConfig

    repo = pretrained_repo(model)
    directory = Path(model.path) if repo is None else fetch_config(repo).parent
    if repo is None and model.revision is not None:
        raise RecipeError.at(
            "model.revision",
            model.revision,
            f"model.path is a directory, {model.path}, which has no revisions",
            fix="Leave it out",
        )
    if not (directory / "config.json").is_file():
        raise RecipeError.at(
            "model.path",
            model.path,
            "not a directory with a config.json",
            fix="Give a checkpoint directory in Hugging Face format, or a name of the Hub",
        )
    with _recipe_errors("model.path", model.path):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


@contextmanager
def _recipe_errors(path: str, value: object) -> Iterator[None]:
    """Raise any error of transformers as a RecipeError about its input."""
    try:
        yield
    # It divides by, looks up and calls the given values, so an error may be of any type.
    except Exception as error:
        raise RecipeError.at(path, value, one_line(error)) from error


def _check_fit(config: PreTrainedConfig, facts: CorpusFacts, path: str) -> None:
    problems = []
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is not None and vocab_size < facts.vocab_size:
        problems.append(
            format_problem(
                f"{path}.vocab_size",
                vocab_size,
                f"smaller than the tokenizer's vocabulary of {facts.vocab_size}",
                fix="Leave it out to take the tokenizer's",
            )
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < facts.sequence_length:
        problems.append(
            format_problem(
                "data.sequence_length",
                facts.sequence_length,
                f"longer than the model's {longest} positions",
                fix=f"Lower it, or raise {path}.max_position_embeddings",
            )
        )
    if problems:
        raise RecipeError(*problems)


def build_model(model: ModelConfig, facts: CorpusFacts, *, seed: int) -> PreTrainedModel:
    """Return the model in float32 on the CPU, in training mode; new weights depend only on `seed`.

    Raises:
        RecipeError: If the configuration or the checkpoint cannot be used.
        StorageError: If the checkpoint is on the Hub and cannot be downloaded.
    """
    config = resolve_config(model, facts)
    if isinstance(model, PretrainedModel):
        repo = pretrained_repo(model)
        return load_model(model.path if repo is None else fetch_model(repo))
    # Forked, so that the caller's generator is unchanged; on the CPU, so that weights are the same
    # on any device.
    with torch.random.fork_rng(devices=[]), _construction_errors(model):
        torch.manual_seed(seed)
        built = model_from_config(config)
    return built.train()


@contextmanager
def _construction_errors(model: ModelConfig) -> Iterator[None]:
    """Raise errors of a model's construction as those of the fields that it is made from."""
    try:
        yield
    except _CONSTRUCTION_ERRORS as error:
        if isinstance(model, PretrainedModel):
            raise RecipeError.at("model.path", model.path, one_line(error)) from error
        raise RecipeError.at("model.config", model.config, one_line(error)) from error


def model_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a new model of a configuration, on the device of the caller's device context."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    # A few types have no fused attention and raise if it is requested; only a private attribute
    # tells.
    fused = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", False)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa" if fused else "eager", dtype=torch.float32
    )


def load_model(path: str | Path) -> PreTrainedModel:
    """Return the checkpoint at `path` in float32 on the CPU, in training mode.

    Raises:
        RecipeError: If the directory holds no loadable causal language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    try:
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    # Any of a dozen libraries may object to the files.
    except Exception as error:
        raise RecipeError.at(
            "model.path", str(path), f"cannot be loaded: {one_line(error)}"
        ) from error
    # transformers draws them at random, and says so in a log.
    missing = sorted(loading["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RecipeError.at(
            "model.path",
            str(path),
            f"its files lack {missing[0]!r}{more}",
            fix="Download it again, or name a whole causal language model",
        )
    return loaded.train()


def model_size(model: ModelConfig, facts: CorpusFacts) -> ModelSize:
    """Return the size of a recipe's model without allocating its weights."""
    config = resolve_config(model, facts)
    # Tensors on the meta device have shapes and no memory.
    with torch.device("meta"):
        with _construction_errors(model):
            built = model_from_config(config)
        built = add_lora(built, model.lora, seed=0)
    return measure_model(built, facts.sequence_length)


def measure_model(model: PreTrainedModel, sequence_length: int) -> ModelSize:
    """Return parameters and arithmetic of a model on rows of `sequence_length` tokens.

    Six operations per parameter that multiplies a token (Kaplan et al. 2020, table 1: forward 2,
    backward 4), and 6 * layers * width * length for causal attention scores and values. Two less
    per parameter that is not trained: its gradient is not computed.
    """
    every = list(model.parameters())
    trained = [parameter for parameter in every if parameter.requires_grad]
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    attention = 6.0 * layers * width * sequence_length
    products = 4.0 * _in_products(model, every) + 2.0 * _in_products(model, trained)
    return ModelSize(
        sum(parameter.numel() for parameter in every),
        parameter_elements(model),
        products + attention,
    )


def matmul_parameters(model: PreTrainedModel) -> int:
    """Return the parameters in matrix products with a token: all but lookup tables."""
    return _in_products(model, list(model.parameters()))


def _in_products(model: PreTrainedModel, parameters: Sequence[torch.nn.Parameter]) -> int:
    head = getattr(model.get_output_embeddings(), "weight", None)
    # An embedding that is tied to the head is multiplied there.
    looked_up = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module.weight is not head
    }
    return sum(each.numel() for each in parameters if id(each) not in looked_up)
