"""Recipe model of `raymix specialists`: domains, fine-tuning, merges."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from raymix.recipe.base import Fault, Integer, RecipeModel, raise_if

# A specialist is a run of the same model on one domain: these fields would change that.
_NOT_IN_FINETUNING = (
    "name",
    "seed",
    "corpus",
    "mixer",
    "model",
    "run",
    "cluster",
    "tune",
    "specialists",
)
_MIN_DOMAINS = 2


class SpecialistsConfig(RecipeModel):
    """What `raymix specialists` fine-tunes from one base, and how it merges the outcome."""

    domains: tuple[str, ...] = ()
    """Domains that get a specialist each; left out, all but mixer.targets."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Fields of the recipe that differ in fine-tuning, e.g. {train.steps: 60, train.lr: 1e-3}."""
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Merges by name, each `merge_method` and its options; left out, all that raymix has."""
    trials: Annotated[Integer, Field(ge=1, le=10_000)] = 11
    """Merges per method to choose the scale from, that of scale 1 among them."""
    search_rows: Annotated[Integer, Field(ge=1)] | None = None
    """Held-out rows per domain to choose it on, from the end of the valid split; left out,
    eval.rows_per_domain. Losses that are reported are of the first rows, as anywhere else."""

    @model_validator(mode="after")
    def _rules(self) -> SpecialistsConfig:
        raise_if(self._few_fault(), *self._method_faults(), *self._finetune_faults())
        return self

    def _few_fault(self) -> Fault | None:
        # Left out means all domains, whose number is known only with the corpus.
        if not self.domains or len(set(self.domains)) >= _MIN_DOMAINS:
            return None
        return Fault("domains", self.domains, "nothing to merge", ("Name two domains or more",))

    def _method_faults(self) -> list[Fault]:
        advice = "Write e.g. {merge_method: drm, drop: 0.5}"
        return [
            Fault(f"methods.{name}", options, "does not say `merge_method`", (advice,))
            for name, options in self.methods.items()
            if not isinstance(options.get("merge_method"), str)
        ]

    def _finetune_faults(self) -> list[Fault]:
        advice = "A specialist is the base, trained on its domain; allowed are data, train, eval"
        return [
            Fault(f"finetune.{key}", value, "cannot differ in fine-tuning", (advice,))
            for key, value in self.finetune.items()
            # Keys are dotted paths, so the first part is the section.
            if key.split(".")[0] in _NOT_IN_FINETUNING
        ]
