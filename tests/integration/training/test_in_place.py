"""Training on token files in place: the same numbers as on a prepared copy, packed and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raymix
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.streaming.blocks.block_batch import from_table
from raymix.streaming.blocks.datasource import BundleDatasource
from raymix.streaming.blocks.geometry import BlockNumbers
from raymix.training.run.rundir import read_metrics

EOS = 256


def write_files(folder: Path, *, loss: bool) -> list[dict[str, Any]]:
    """Write train and valid files of two domains, one of them in two files."""
    random = np.random.default_rng(0)
    domains = []
    for number, name in enumerate("ab"):
        for part in (f"{name}-train-0", f"{name}-train-1", f"{name}-valid"):
            lengths = random.integers(2, 90, 60)
            ids = random.integers(0, 256, lengths.sum()) // (number + 1)
            ids[np.cumsum(lengths) - 1] = EOS
            ids.astype(np.uint16).tofile(folder / f"{part}.ds")
            np.cumsum(lengths).astype("<u8").tofile(folder / f"{part}.ds.index")
            if loss:
                in_loss = random.random(len(ids)) < 0.5
                in_loss[np.cumsum(lengths) - 1] = True
                in_loss.tofile(folder / f"{part}.ds.loss")
        train, valid = (str(folder / f"{name}-{split}*.ds") for split in ("train", "valid"))
        domains.append({"name": name, "train": train, "valid": valid})
    return domains


def losses(folder: Path, domains: list[dict[str, Any]], data: Any, *, in_place: bool) -> list[Any]:
    """Train three steps, and return what the metrics say of the losses."""
    name = "in-place" if in_place else "copied"
    recipe = {
        "name": name,
        "corpus": {
            "path": str(folder / f"corpus-{name}"),
            "domains": domains,
            "in_place": in_place,
            "deduplicate": False,
            "max_rejected": 1,
            "block_tokens": 512,
        },
        "data": data,
        "mixer": {"kind": "uniform"},
        "model": {
            "type": "llama",
            "config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "num_key_value_heads": 1},
        },
        "train": {"steps": 3, "lr": 0.01},
        "eval": {"every": 3, "rows_per_domain": 2},
        "cluster": {"workers": 0},
        "run": {"dir": str(folder / "{name}"), "tensorboard": False},
    }  # fmt: skip
    raymix.train(Recipe.model_validate(recipe), report=False)
    return [
        (line["step"], line.get("loss"), line.get("eval"), line.get("counts"))
        for line in read_metrics(folder / name / "metrics.jsonl")
    ]


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_a_run_in_place_has_the_numbers_of_a_run_on_a_copy(mode: str, tmp_path: Path) -> None:
    domains = write_files(tmp_path, loss=mode == "documents")
    data: Any = {"mode": mode, "sequence_length": 64}
    data |= {"rows_per_step": 4} if mode == "packed" else {"tokens_per_step": 512}
    in_place = losses(tmp_path, domains, data, in_place=True)
    assert in_place == losses(tmp_path, domains, data, in_place=False)
    assert len(in_place) >= 4


def test_ray_datas_read_tasks_read_in_place(tmp_path: Path) -> None:
    """The tasks of the block plane, called as a worker calls them, without a cluster."""
    domains = write_files(tmp_path, loss=False)
    path = str(tmp_path / "corpus")
    config = {"path": path, "domains": domains, "in_place": True, "block_tokens": 512}
    raymix.prepare(raymix.recipe.CorpusConfig.model_validate(config), parallelism=0)
    corpus = Corpus.open(path)
    numbers = BlockNumbers(corpus)
    last = numbers.total - 1
    source = BundleDatasource(corpus, "train", 64, [[0, 3], [last]])
    first, second = (
        from_table(next(iter(task.read_fn())), 64) for task in source.get_read_tasks(2)
    )
    assert first[1] == second[1] == {}
    for batch, wanted in ((first[0], [0, 3]), (second[0], [last])):
        blocks = [corpus.read_block(*_place(numbers, number)) for number in wanted]
        rows = [block.tokens[: len(block.tokens) // 64 * 64] for block in blocks]
        np.testing.assert_array_equal(batch.tokens, np.concatenate(rows))


def _place(numbers: BlockNumbers, number: int) -> tuple[str, str, int]:
    domain, index = numbers.locate(number)
    return domain, "train", index
