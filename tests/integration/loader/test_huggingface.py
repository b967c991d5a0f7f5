"""Adaptive mixers in a Hugging Face Trainer: the mixture log of `raymix train`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from raymix.errors import TrainingError
from raymix.integrations.huggingface import MixtureTrainer
from raymix.loader import MixtureLoader, token_losses
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from tests.integration.loader.test_loader import LENGTH, log_of
from tests.integration.training.test_run import recipe
from tests.support.loops import train_corpus

STEPS = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


def trainer(made: Recipe, loader: MixtureLoader, out: Path, **changes: object) -> MixtureTrainer:
    info = Corpus.open(made.corpus.path).manifest.tokenizer
    model = build_model(
        made.model, CorpusFacts(info.vocab_size, info.eos_id, LENGTH), seed=made.seed
    )
    if made.mixer.kind == "pike":
        loader.gradient_probe(model)
    options = {
        "learning_rate": made.train.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": made.train.betas[0],
        "adam_beta2": made.train.betas[1],
        "weight_decay": 0.0,
        "max_grad_norm": made.train.clip_norm,
        "gradient_accumulation_steps": loader.micro_batches,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(out), **{**options, **changes})
    return MixtureTrainer(mixture=loader, model=model, args=args)


@pytest.mark.parametrize("kind", ["ado", "pike"])
def test_an_adaptive_mixer_decides_as_in_raymix_train(
    corpus: Corpus, tmp_path: Path, kind: str
) -> None:
    made = recipe(
        corpus,
        tmp_path,
        mixer={"kind": kind},
        train={
            "steps": STEPS,
            "lr": 0.01,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "probe_interval": 2,
            "probe": {"rows": 4},
        },
    )
    # Without dropout, whose random numbers differ.
    config = {**made.model.config, "attention_dropout": 0.0}
    made = made.model_copy(update={"model": made.model.model_copy(update={"config": config})})
    train(made, report=False)
    loader = MixtureLoader(made, micro_batches=2, run_dir=tmp_path / "own")
    trainer(made, loader, tmp_path / "out").train()
    ours, theirs = log_of(tmp_path / "own"), log_of(Path(made.run_dir))
    assert len(ours) > 3
    assert [entry.first_step for entry in ours] == [entry.first_step for entry in theirs]
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own.weights, other.weights, rtol=1e-3)


def test_the_loss_is_transformers_own(corpus: Corpus, tmp_path: Path) -> None:
    made = recipe(corpus, tmp_path, train={"steps": STEPS})
    loader = MixtureLoader(made, run_dir=tmp_path / "own")
    info = corpus.manifest.tokenizer
    plain = build_model(made.model, CorpusFacts(info.vocab_size, info.eos_id, LENGTH), seed=1)
    plain.eval()  # without dropout
    model = copy.deepcopy(plain)
    own = MixtureTrainer(
        mixture=loader,
        model=model,
        args=TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True),
    )
    batch = dict(next(iter(loader)))
    batch["labels"][0, :5] = -100
    domain_ids, names = batch["domain_ids"], ("input_ids", "labels", "position_ids")
    given = {name: batch[name] for name in names}
    for items in (None, 37):
        expected = plain(
            **given, use_cache=False, **({} if items is None else {"num_items_in_batch": items})
        )
        loss = own.compute_loss(model, {**given, "domain_ids": domain_ids}, False, items)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)
        for each in (loss, expected.loss):
            each.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    losses = token_losses(expected.logits, batch["labels"])
    loader.step()
    of_domains = loader.domain_losses()
    for index, name in enumerate(corpus.domain_names):
        learned = (domain_ids == index) & (batch["labels"] != -100)
        learned[:, 0] = False
        if learned.any():
            assert of_domains[name] == pytest.approx(losses[learned].mean().item(), rel=1e-6)
    loader.close()


def test_a_loss_function_that_is_called_twice_is_not_taken_for_the_tokens(
    corpus: Corpus, tmp_path: Path
) -> None:
    made = recipe(corpus, tmp_path, train={"steps": STEPS})
    loader = MixtureLoader(made, run_dir=tmp_path / "own")
    own = trainer(made, loader, tmp_path / "out")
    own.model.eval()  # without dropout
    own_loss = own.model.loss_function

    def with_second_head(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
        first = own_loss(logits, labels, **options)
        return first + own_loss(2 * logits, labels, **options)

    own.model.loss_function = with_second_head
    batch = dict(next(iter(loader)))
    names = ("input_ids", "labels", "position_ids")
    logits = own.model(**{name: batch[name] for name in names}, use_cache=False).logits
    labels, domain_ids = batch["labels"], batch["domain_ids"]
    expected = token_losses(logits, labels)
    own.compute_loss(own.model, batch)
    loader.step()
    for name, loss in loader.domain_losses().items():
        learned = (domain_ids == corpus.domain_names.index(name)) & (labels != -100)
        learned[:, 0] = False
        assert loss == pytest.approx(expected[learned].mean().item(), rel=1e-6)
    loader.close()


def test_other_numbers_of_parts_and_steps_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    made = recipe(corpus, tmp_path)
    loader = MixtureLoader(made)
    with pytest.raises(TrainingError, match=r"gradient_accumulation_steps = 2.*1 parts"):
        trainer(made, loader, tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(TrainingError, match=r"max_steps = 99: the mixture ends after 8"):
        trainer(made, loader, tmp_path, max_steps=99)
