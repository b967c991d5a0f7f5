"""Recipe models of the batch, the model, the optimiser loop, evaluation and the cluster."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raymix.recipe._base import Model


class PackedData(Model):
    """Rows of exactly `sequence_length` tokens; documents in a row do not see each other."""

    mode: Literal["packed"] = "packed"
    """Selects packing."""
    sequence_length: int = Field(default=1024, ge=8)
    """Tokens per row."""
    rows_per_step: int = Field(default=64, ge=1, le=1_048_576)
    """Rows in a global batch, over all workers."""
    shuffle_blocks: int = Field(default=16, ge=1, le=65_536)
    """Blocks of a domain whose rows are shuffled among each other."""
    max_epochs: float | dict[str, float] | None = None
    """Most passes over a domain (one number, or one per domain); at the cap others take over."""
    accept_changed_corpus: bool = False
    """Resume although the corpus' fingerprint is not that of the checkpoint."""
    cache_bytes: int | Literal["auto"] = "auto"
    """Bytes of the object store that block prefetching may fill; `auto` is 40 % of it."""


class DocumentData(Model):
    """Whole documents, as in fine-tuning; a step is a budget of tokens."""

    mode: Literal["documents"]
    """Selects whole documents."""
    sequence_length: int = Field(default=1024, ge=8)
    """Longest document in tokens; what is longer is cut off here."""
    tokens_per_step: int = Field(default=65_536, ge=8)
    """Tokens of documents in a global batch, over all workers: the last may go beyond."""
    shuffle_blocks: int = Field(default=16, ge=1, le=65_536)
    """Groups of 1,024 documents of a domain that are shuffled among each other."""
    max_epochs: float | dict[str, float] | None = None
    """Most passes over a domain (one number, or one per domain); at the cap others take over."""
    accept_changed_corpus: bool = False
    """Resume although the corpus' fingerprint is not that of the checkpoint."""
    cache_bytes: int | Literal["auto"] = "auto"
    """Bytes of the object store that block prefetching may fill; `auto` is 40 % of it."""


DataConfig = Annotated[PackedData | DocumentData, Field(discriminator="mode")]


class ConfigModel(Model):
    """A new model from a Hugging Face configuration."""

    kind: Literal["config"] = "config"
    """Selects a new model."""
    type: str = "llama"
    """Hugging Face `model_type` of a causal LM: llama, qwen3, gpt2, ..."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of that type's configuration; vocabulary and end token come from the corpus."""


class PretrainedModel(Model):
    """A checkpoint directory in Hugging Face format."""

    kind: Literal["pretrained"]
    """Selects a checkpoint."""
    path: str
    """The directory."""


ModelConfig = Annotated[ConfigModel | PretrainedModel, Field(discriminator="kind")]


class TrainConfig(Model):
    """The optimiser loop."""

    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; give this or `tokens`."""
    tokens: int | None = Field(default=None, ge=1)
    """Training tokens; rounded up to whole steps."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate of AdamW."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; `wsd` holds, then decays linearly over `decay_ratio`."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly."""
    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps that `wsd` decays over."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decoupled weight decay; biases and norms are left out."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    micro_batch_rows: int | Literal["auto"] = "auto"
    """Rows per forward pass and worker; smaller ones accumulate gradients."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast on a GPU, fp32 on a CPU."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """How parameters are kept over workers."""
    compile: bool = False
    """Compile the model with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; one is always written at the end."""
    checkpoint_minutes: float | None = Field(default=10.0, gt=0)
    """Minutes between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints to keep."""
    probe_interval: int = Field(default=50, ge=1)
    """Steps per window: how often an adaptive mixer may change the weights."""


class EvalConfig(Model):
    """Held-out evaluation, per domain."""

    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; at start and end it always runs."""
    rows_per_domain: int = Field(default=32, ge=1)
    """Rows of the valid split to score per domain, from its beginning."""


class ClusterConfig(Model):
    """Where the work runs."""

    workers: int = Field(default=1, ge=0)
    """Training workers; 0 trains in this process without Ray."""
    gpus_per_worker: int | Literal["auto"] = Field(default="auto")
    """0, 1, or `auto`: 1 where the cluster has a GPU for every worker."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """Logical CPUs that Ray reserves per worker."""
    address: str | None = None
    """Ray address; left out, RAY_ADDRESS or else a private cluster on this machine."""
    object_store_bytes: int | None = Field(default=None, ge=80_000_000)
    """Object store of a private cluster."""
    max_failures: int = Field(default=3, ge=0)
    """Worker-group failures from which the run restarts by itself."""


class RunConfig(Model):
    """Where results go."""

    dir: str = "runs/{name}"
    """Run directory; `{name}` and `{seed}` are filled in; relative to the working directory."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
