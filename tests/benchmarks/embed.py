"""Overhead of a `MixtureLoader` in a training loop (`make bench-embed`).

Time that a loop waits for a batch, against the same batches from memory: median over the steps of a
loop whose step takes `--step-ms` (a sleep in torch's place: the loader's thread then has the core
that a GPU's host would give it; and a real forward and backward pass of a small Llama, which
competes with it). And a Hugging Face Trainer with our loader against the same Trainer with its own
on the same rows, in turns, after a run of each that does not count; for a model that is next to
nothing, so that all that is not the model shows, and for one whose step takes some tenths of a
second on one core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from raymix.corpus import prepare
from raymix.integrations.huggingface import MixtureTrainer
from raymix.loader import MixtureLoader
from raymix.recipe import load_recipe
from tests.benchmarks._report import print_table, ratio_spread, row, write_results
from tests.support.shell import recipe_document

LENGTH, ROWS = 256, 8
REPEATS = 3
TRAINER_REPEATS = 5
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}


Work = Callable[[dict[str, Any]], object]


def waits(batches: Iterable[dict[str, Any]], work: Work) -> list[float]:
    """Return the seconds that a loop waited for each batch but the first two."""
    waited, iterator = [], iter(batches)
    while True:
        begin = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return waited[2:]
        waited.append(time.perf_counter() - begin)
        work(batch)


def model(shape: dict[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=2, **shape))


def train_once(
    rows: list[dict[str, Any]], loader: MixtureLoader | None, steps: int, shape: dict[str, int]
) -> float:
    """Return the seconds of a Trainer's run, with our loader or on rows in memory."""
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        if loader is not None:
            trainer: Trainer = MixtureTrainer(mixture=loader, model=model(shape), args=arguments)
        else:
            trainer = Trainer(model=model(shape), args=arguments, train_dataset=Rows(rows))
        begin = time.perf_counter()
        trainer.train()
        return time.perf_counter() - begin


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Single rows in memory, which the Trainer's own loader collates to batches."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        names = ("input_ids", "labels", "position_ids")
        self._rows = [
            {name: batch[name][index] for name in names}
            for batch in batches
            for index in range(len(batch["input_ids"]))
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def loaders(directory: Path, steps: int) -> Iterator[MixtureLoader]:
    recipe = load_recipe(
        recipe_document(
            corpus__path=str(directory / "corpus"),
            data={"sequence_length": LENGTH, "rows_per_step": ROWS},
            train={"steps": steps},
        )
    )
    prepare(recipe.corpus)
    while True:
        yield MixtureLoader(recipe)


def trainers(
    batches: list[dict[str, Any]],
    make: Iterator[MixtureLoader],
    steps: int,
    shape: dict[str, int],
) -> list[dict[str, Any]]:
    """Return the rows of a Trainer with our loader and with its own, for one model."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(TRAINER_REPEATS + 1):
        # Each is first in every other repeat.
        for ours in (True, False) if repeat % 2 else (False, True):
            took = train_once(batches, next(make) if ours else None, steps, shape)
            if repeat:
                seconds[ours].append(took)
    ratio, spread = ratio_spread(seconds[True], seconds[False])
    count = sum(parameter.numel() for parameter in model(shape).parameters()) / 1e6
    each = f"{count:.2g} M parameters"
    names = [f"step of a Trainer, {whose} loader, {each}" for whose in ("its own", "our")]
    value = [1000 * statistics.median(seconds[ours]) / steps for ours in (False, True)]
    return [
        row(names[0], value[0], "ms"),
        row(names[1], value[1], "ms", ratio=ratio, spread=spread, baseline=names[0]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-ms", type=float, default=50.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        make = loaders(Path(directory), given.steps)
        batches = list(next(make))
        net = model(TINY)
        works: dict[str, Work] = {
            "asleep": lambda batch: time.sleep(given.step_ms / 1000),
            "training": lambda batch: net(
                input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False
            ).loss.backward(),
        }
        for name, work in works.items():
            ours, memory = [], []
            for _ in range(REPEATS):
                ours.append(statistics.median(waits(next(make), work)))
                memory.append(statistics.median(waits(batches, work)))
            extra = [own - other for own, other in zip(ours, memory, strict=True)]
            share = 100 * statistics.median(extra) / (given.step_ms / 1000)
            spread = 1000 * min(ours), 1000 * max(ours)
            waited = 1000 * statistics.median(ours)
            rows.append(row(f"wait for a batch, loop {name}", waited, "ms", spread=spread))
            rows.append(row(f"of a step of {given.step_ms:g} ms, loop {name}", share, "%"))
        for shape in (TINY, SMALL):
            rows += trainers(batches, make, given.steps, shape)
    print_table(rows)
    write_results("embed", rows)


if __name__ == "__main__":
    main()
