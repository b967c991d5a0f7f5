"""Recipe models of the batch, the model, the optimizer loop, evaluation and the cluster."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raymix.errors import did_you_mean
from raymix.recipe.base import Fault, Faults, Integer, Number, RecipeModel, default_tag, raise_if
from raymix.recipe.sections.lora import LoraConfig
from raymix.recipe.sections.trackers import tracker_faults

Epochs = Annotated[Number, Field(gt=0)]
Beta = Annotated[Number, Field(ge=0, lt=1)]

OPTIMIZERS = ("adamw", "muon")
"""Names that `train.optimizer` may have; anything else is the path of a class."""
_CLASS = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
# Arguments of an optimizer that fields of `train` give, by optimizer; "" is any class.
_OWN_FIELDS = {
    "adamw": ("lr", "weight_decay", "betas", "eps"),
    "muon": ("lr", "weight_decay", "betas"),
    "": ("lr", "weight_decay"),
}


class PackedData(RecipeModel):
    """Rows of exactly `sequence_length` tokens; documents in a row do not see each other."""

    mode: Literal["packed"] = "packed"
    """Selects packing."""
    sequence_length: Integer = Field(default=1024, ge=8, le=2**24)
    """Tokens per row."""
    rows_per_step: Integer = Field(default=64, ge=1, le=1_048_576)
    """Rows in a global batch, over all workers."""
    shuffle_blocks: Integer = Field(default=16, ge=1, le=65_536)
    """Blocks of a domain whose rows are shuffled among each other."""
    max_epochs: Epochs | dict[str, Epochs] | None = None
    """Most passes over a domain (one number, or one per domain); at the cap others take over."""
    skip_empty: bool = False
    """Leave out domains whose text does not fill a row, whatever their share; others take over."""
    accept_changed_corpus: bool = False
    """Resume although the corpus' fingerprint is not that of the checkpoint."""
    cache_bytes: Annotated[Integer, Field(ge=1_000_000)] | Literal["auto"] = "auto"
    """Bytes of the object store that block prefetching may fill; `auto` is 40 % of it."""

    @property
    def step_tokens(self) -> int:
        """Return the tokens of a step, over all workers."""
        return self.rows_per_step * self.sequence_length

    @property
    def step_rows(self) -> int:
        """Return the rows of a step, over all workers."""
        return self.rows_per_step


PlannerName = Literal["refine", "default", "flexsp", "hdp", "milp", "packed", "skrull", "sorted"]


class AssignmentConfig(RecipeModel):
    """Which worker takes which document of a step."""

    planner: PlannerName = "refine"
    """How it is decided; see `raymix schedule simulate`."""
    context: Integer = Field(default=1, ge=1, le=100_000)
    """Workers that may share one document; they take it as a group. Divides `cluster.workers`."""
    widths: tuple[Annotated[Integer, Field(ge=1)], ...] = ()
    """Smaller groups that may share a document too; each divides `context`."""
    exchange: Literal["gather", "ulysses"] = "gather"
    """`gather`: keys and values to every worker of a group; `ulysses`: heads dealt out."""
    cost: str | None = Field(default=None, min_length=1)
    """File of a cost model fitted on the hardware; left out, assumed from the model's shape."""

    @model_validator(mode="after")
    def _widths_divide(self) -> AssignmentConfig:
        # Ranks of a group are split evenly, so that every rank is in one sub-group of each width.
        odd = [width for width in self.widths if self.context % width]
        wrong = f"{odd[0] if odd else 0} does not divide context = {self.context}"
        raise_if(Fault("widths", self.widths, wrong) if odd else None)
        return self


class DocumentData(RecipeModel):
    """Whole documents, as in fine-tuning; a step is a budget of tokens."""

    mode: Literal["documents"]
    """Selects whole documents."""
    sequence_length: Integer = Field(default=1024, ge=8, le=2**24)
    """Longest document in tokens; what is longer is cut off here."""
    tokens_per_step: Integer = Field(default=65_536, ge=8, le=2**40)
    """Tokens of documents in a global batch, over all workers: the last may go beyond."""
    assign: AssignmentConfig = AssignmentConfig()
    """Which worker takes which document; the gradient is the same whatever it says."""
    shuffle_blocks: Integer = Field(default=16, ge=1, le=65_536)
    """Groups of 1,024 documents of a domain that are shuffled among each other."""
    max_epochs: Epochs | dict[str, Epochs] | None = None
    """Most passes over a domain (one number, or one per domain); at the cap others take over."""
    accept_changed_corpus: bool = False
    """Resume although the corpus' fingerprint is not that of the checkpoint."""
    cache_bytes: Annotated[Integer, Field(ge=1_000_000)] | Literal["auto"] = "auto"
    """Bytes of the object store that block prefetching may fill; `auto` is 40 % of it."""

    @property
    def step_tokens(self) -> int:
        """Return the tokens of a step, over all workers."""
        return self.tokens_per_step

    @property
    def step_rows(self) -> int:
        """Return about how many rows of `sequence_length` a step has, over all workers."""
        # Rounded up: a step of fewer tokens than one row still has a row.
        return -(-self.tokens_per_step // self.sequence_length)


AUTO_CACHE_SHARE = 0.4
"""Share of a node's object store that `data.cache_bytes: auto` stands for."""

DataConfig = Annotated[
    PackedData | DocumentData, Field(discriminator="mode"), default_tag("mode", "packed")
]


# 10.6 million parameters and 384 for each entry of the vocabulary: 30 million with GPT-2's 50,257.
# A CPU trains it; the default of transformers has 7 billion.
SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "tie_word_embeddings": True,
}
"""Configuration of a model of which the recipe says nothing."""


class ConfigModel(RecipeModel):
    """A new model from a Hugging Face configuration."""

    kind: Literal["config"] = "config"
    """Selects a new model."""
    type: str = Field(default="llama", min_length=1)
    """Hugging Face `model_type` of a causal LM: llama, qwen3, gpt2, ..."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of that type's configuration; vocabulary and end token come from the corpus. Left out,
    a llama is a small one; of other types and in what is left out, transformers' defaults hold."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights, which stay as they were drawn."""

    @model_validator(mode="before")
    @classmethod
    def _small(cls, data: Any) -> Any:
        # Written out here, so that a resolved recipe says what is trained.
        if isinstance(data, dict) and data.get("type", "llama") == "llama":
            return {**data, "config": data.get("config") or dict(SMALL_LLAMA)}
        return data

    @property
    def is_default(self) -> bool:
        """Return whether this is the small model of a recipe that gives none."""
        return self.type == "llama" and self.config == SMALL_LLAMA

    @field_validator("config")
    @classmethod
    def _finite(cls, config: dict[str, Any]) -> dict[str, Any]:
        # allow_inf_nan reaches declared fields only, and this mapping is free-form.
        raise_if(*_infinities(config))
        return config

    @model_validator(mode="after")
    def _base_is_kept(self) -> ConfigModel:
        if self.lora is not None and self.lora.export == "adapter":
            wrong = "the weights below the adapter are random ones that no file holds"
            raise_if(Fault("lora.export", self.lora.export, wrong, ("Set it to merged",)))
        return self


def _infinities(value: Any, path: str = "") -> list[Fault]:
    """Return a fault per number below `value`, free-form data, that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return [Fault(path, value, "not a finite number")]
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [
        fault
        for key, item in items
        for fault in _infinities(item, f"{path}.{key}" if path else str(key))
    ]


class PretrainedModel(RecipeModel):
    """A checkpoint in Hugging Face format: a directory, or a model of the Hub."""

    kind: Literal["pretrained"]
    """Selects a checkpoint."""
    path: str = Field(min_length=1)
    """The directory; else a name of the Hub, such as Qwen/Qwen3-0.6B."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a name of the Hub; left out, main: as it is in the local cache, else
    as it is now."""
    commit: str | None = Field(default=None, pattern="^[0-9a-f]{40}$")
    """The commit that the revision means; a run fills it in when it starts, and keeps to it."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the checkpoint's own weights; needs peft."""


ModelConfig = Annotated[
    ConfigModel | PretrainedModel, Field(discriminator="kind"), default_tag("kind", "config")
]


class ProbeConfig(RecipeModel):
    """How gradient statistics are measured, for mixers that need them."""

    mode: Literal["exact", "backward", "last_layer"] = "exact"
    """`exact`: out of one backward; `backward`: one per group; `last_layer`: of the head alone."""
    rows: Integer = Field(default=4, ge=2, multiple_of=2)
    """Rows of each domain (and target) per window, over all workers, two to a pass."""
    precondition: Literal["none", "adam"] = "none"
    """`adam`: in the metric of AdamW's second moment, as its updates are."""


class TrainConfig(RecipeModel):
    """The optimizer loop."""

    steps: Integer | None = Field(default=None, ge=1, le=10**12)
    """Optimizer steps; give this or `tokens`."""
    tokens: Integer | None = Field(default=None, ge=1, le=10**18)
    """Training tokens; rounded up to whole steps."""
    optimizer: str = "adamw"
    """`adamw`; `muon`: Muon for the matrices of hidden layers, AdamW for the rest; or
    `module:Class`, a subclass of torch.optim.Optimizer whose step needs no closure."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the optimizer beyond the fields of this section, by name; for `muon` those of
    torch.optim.Muon."""
    lr: Number = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    min_lr_ratio: Number = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; `wsd` holds, then decays linearly over `decay_ratio`."""
    warmup_ratio: Number = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly."""
    decay_ratio: Number = Field(default=0.2, gt=0, le=1)
    """Share of the steps that `wsd` decays over."""
    weight_decay: Number = Field(default=0.1, ge=0)
    """Weight decay, decoupled in AdamW and Muon; biases and norms are left out."""
    # 0.95 rather than torch's 0.999, as in the published recipes of large language models.
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    # torch's default.
    eps: Number = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    clip_norm: Number | None = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    max_skipped_steps: Integer = Field(default=10, ge=0)
    """Steps in a row that may be left out as their gradient is not finite; one more is an error."""
    micro_batch_rows: Annotated[Integer, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows per forward pass and worker; smaller ones accumulate gradients. In document mode a row
    is what a worker must hold of the longest document: its tokens over `data.assign.context`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast on a GPU, fp32 on a CPU."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """How parameters are kept over workers."""
    compile: bool = False
    """Compile the model with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_every: Integer | None = Field(default=None, ge=1)
    """Steps between checkpoints; one is always written at the end."""
    checkpoint_minutes: Number | None = Field(default=10.0, gt=0)
    """Minutes between checkpoints."""
    keep_checkpoints: Integer = Field(default=2, ge=1)
    """Newest checkpoints to keep."""
    probe_interval: Integer = Field(default=100, ge=1)
    """Steps per window: how often an adaptive mixer may change the weights."""
    probe: ProbeConfig = ProbeConfig()
    """Gradient statistics; measured only for mixers that need them."""

    @field_validator("optimizer_options")
    @classmethod
    def _finite(cls, options: dict[str, Any]) -> dict[str, Any]:
        raise_if(*_infinities(options))
        return options

    @model_validator(mode="after")
    def _rules(self) -> TrainConfig:
        raise_if(_length_fault(self), _ratio_fault(self), *_optimizer_faults(self))
        return self

    def uses_bf16(self, *, on_gpu: bool) -> bool:
        """Return whether workers on such a device run under bf16 autocast."""
        # fp32 on CPUs: bf16 matrix products there are emulated on most processors.
        return self.precision == "bf16" or (self.precision == "auto" and on_gpu)


def _length_fault(train: TrainConfig) -> Fault | None:
    # Exactly one: with both, a change of the batch size would make them contradict each other.
    if (train.steps is None) != (train.tokens is None):
        return None
    if train.steps is None:
        wrong, advice = "the length of the run is missing", "Give steps or tokens"
    else:
        wrong = f"tokens = {train.tokens:,} gives the length of the run as well"
        advice = "Give one of the two"
    return Fault("steps", train.steps, wrong, (advice,))


def _ratio_fault(train: TrainConfig) -> Fault | None:
    # The other schedules use no decay_ratio, so its value does not matter to them.
    if train.schedule != "wsd" or train.warmup_ratio + train.decay_ratio <= 1:
        return None
    wrong = f"with warmup_ratio = {train.warmup_ratio:g} more than the whole run"
    return Fault("decay_ratio", train.decay_ratio, wrong, ("Their sum may be at most 1",))


def _optimizer_faults(train: TrainConfig) -> list[Fault]:
    name, faults = train.optimizer, list[Fault]()
    if name not in OPTIMIZERS and not _CLASS.fullmatch(name):
        allowed = "Allowed: adamw, muon, or module:Class, such as torch.optim:NAdam"
        wrong = "not the name of an optimizer"
        faults.append(Fault("optimizer", name, wrong, (did_you_mean(name, OPTIMIZERS), allowed)))
    for option in _OWN_FIELDS.get(name, _OWN_FIELDS[""]):
        if option in train.optimizer_options:
            value = train.optimizer_options[option]
            advice = f"Set train.{option}"
            wrong = "train has a field for it"
            faults.append(Fault(f"optimizer_options.{option}", value, wrong, (advice,)))
    # Muon has no second moment, so most parameters would be in another metric than the rest.
    if name == "muon" and train.probe.precondition == "adam":
        wrong = "muon has no second moment to take the metric from"
        faults.append(Fault("probe.precondition", "adam", wrong, ("Set it to none",)))
    return faults


class EvalConfig(RecipeModel):
    """Held-out evaluation, per domain."""

    every: Integer | None = Field(default=None, ge=1)
    """Steps between evaluations; at start and end it always runs."""
    rows_per_domain: Integer = Field(default=32, ge=1)
    """Rows of the valid split to score per domain, from its beginning."""


class RunConfig(RecipeModel):
    """Where results go."""

    dir: str = Field(default="runs/{name}", min_length=1)
    """Run directory or URL, `{name}` and `{seed}` filled in."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    trackers: tuple[str, ...] = ()
    """Trackers that get the metrics too: wandb, mlflow, trackio, or `module:Class`."""
    tracker_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options by tracker, such as `{wandb: {project: mixing}}`: arguments of `wandb.init` and
    `trackio.init`; for mlflow `tracking_uri` and `experiment`."""
    stall_seconds: Number = Field(default=60.0, ge=0)
    """A step that takes longer than this, and than 20 usual ones, is told, with what each rank does
    meanwhile; 0 tells nothing."""

    @model_validator(mode="after")
    def _known_trackers(self) -> RunConfig:
        raise_if(*tracker_faults(self.trackers, self.tracker_options))
        return self

    @field_validator("dir")
    @classmethod
    def _template(cls, value: str) -> str:
        try:
            # Tried now: a bad template would otherwise fail after the corpus has been prepared.
            value.format(name="", seed=0)
        except (LookupError, ValueError, AttributeError):
            advice = "Only {name} and {seed} are filled in; a brace itself is written twice"
            raise Faults(Fault("", value, "not a usable template", (advice,))) from None
        return value
