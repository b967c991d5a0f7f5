"""Planning a run: what it says about one that works, and how it refuses one that cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from raymix.cli import plan as plan_command
from raymix.errors import ClusterError, CorpusError, RecipeError
from raymix.recipe import ConfigModel, Recipe, TrainConfig, load_recipe
from raymix.store import Corpus
from raymix.streaming.blocks.geometry import epoch_rows, row_geometry
from raymix.training.host import machine
from raymix.training.host.machine import Resources
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.memory import Batch, auto_micro_batch_rows, worker_memory
from raymix.training.model.optimizer_class import try_optimizer
from raymix.training.plan import preflight
from raymix.training.plan.runplan import RunPlan
from tests.support.corpora import labeled_domain, write_corpus
from tests.support.paths import QUICKSTART
from tests.support.recipes import write

TOKENS = {"books": 40_000, "code": 8_000, "math": 2_050}
HERE = Resources(where="this machine", cpus=2, gpus=0, memory_bytes=8 * 10**9,
                 object_store_bytes=10**9)  # fmt: skip
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    domains = {name: labeled_domain(at, size) for at, (name, size) in enumerate(TOKENS.items())}
    path = tmp_path_factory.mktemp("corpus")
    return write_corpus(path, domains, block_tokens=1024, vocab_size=16_384)


@pytest.fixture
def recipe(corpus: Corpus, tmp_path: Path) -> Recipe:
    document = {
        "name": "planned",
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 128, "rows_per_step": 8},
        "mixer": {"kind": "static", "weights": {"books": 0.5, "code": 0.3, "math": 0.2}},
        "model": {"config": TINY},
        "train": {"steps": 20, "micro_batch_rows": 8},
        "run": {"dir": str(tmp_path / "runs" / "{name}")},
    }
    return load_recipe(write(tmp_path / "r.yaml", document))


def plan(recipe: Recipe, corpus: Corpus | None, *overrides: str, has: Resources = HERE) -> RunPlan:
    return preflight.preflight(load_recipe(recipe, overrides), corpus, has)


def preflight_problems(
    recipe: Recipe, corpus: Corpus | None, *overrides: str, **more: Any
) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        plan(recipe, corpus, *overrides, **more)
    return list(caught.value.problems)


def test_a_plan_in_numbers(recipe: Recipe, corpus: Corpus) -> None:
    run_plan = plan(recipe, corpus)
    assert (run_plan.steps, run_plan.tokens, run_plan.tokens_per_step) == (
        20,
        20 * 8 * 128,
        8 * 128,
    )
    assert not run_plan.estimated
    assert [d.share for d in run_plan.domains] == pytest.approx([0.5, 0.3, 0.2])
    assert [d.read for d in run_plan.domains] == [10_240, 6_144, 4_096]
    assert [d.sizes.tokens for d in run_plan.domains] == list(TOKENS.values())
    assert [d.epochs for d in run_plan.domains] == pytest.approx(
        [10_240 / 39_936, 6_144 / 7_936, 4_096 / 2_048]
    )
    assert [d.sizes.dropped for d in run_plan.domains] == [64, 64, 2]


def test_the_document_has_the_promised_keys(recipe: Recipe, corpus: Corpus) -> None:
    document = json.loads(json.dumps(plan(recipe, corpus).document()))
    assert document["steps"] == 20
    assert document["tokens"] == 20_480
    assert document["memory_bytes"] > 0
    assert set(document["domains"]) == set(TOKENS)
    for row in document["domains"].values():
        assert {"tokens", "share", "epochs"} <= set(row)
    assert sum(row["share"] for row in document["domains"].values()) == pytest.approx(1)


def test_tokens_are_rounded_up_to_whole_steps(recipe: Recipe, corpus: Corpus) -> None:
    run_plan = plan(recipe, corpus, "train.steps=null", "train.tokens=1025")
    assert (run_plan.steps, run_plan.tokens) == (2, 2048)


def test_rows_are_dealt_out_over_workers(recipe: Recipe, corpus: Corpus) -> None:
    has = replace(HERE, cpus=8)
    run_plan = plan(recipe, corpus, "cluster.workers=3", "train.micro_batch_rows=2", has=has)
    assert run_plan.rows_per_worker == (2, 3)
    assert (run_plan.micro_batch_rows, run_plan.accumulation) == (2, 2)


@given(
    most=st.integers(1, 4096),
    length=st.sampled_from([8, 128, 1024, 100_000]),
    room=st.integers(-(10**6), 10**8),
)
def test_automatic_micro_batches_fit_and_are_even(most: int, length: int, room: int) -> None:
    row = 1000 * length
    rows = auto_micro_batch_rows(most, length, row_bytes=row, capacity_bytes=room, on_gpu=False)
    assert 1 <= rows <= most
    assert rows == 1 or (rows * length <= 8192 and rows * row <= room)
    passes = -(-most // rows)
    assert passes == 1 or (passes - 1) * rows < most


def test_little_memory_means_small_micro_batches(recipe: Recipe, corpus: Corpus) -> None:
    recipe = load_recipe(recipe, ["train.micro_batch_rows=auto"])
    whole = plan(recipe, corpus)
    assert (whole.micro_batch_rows, whole.accumulation) == (8, 1)
    needed = sum(part.bytes for part in whole.worker_memory)
    less = plan(recipe, corpus, has=replace(HERE, memory_bytes=2 * needed - 10**6))
    assert less.micro_batch_rows == 4
    gpu = replace(HERE, gpus=1, gpu_memory_bytes=int((needed + 10**6) / 0.8))
    assert plan(recipe, corpus, has=gpu).micro_batch_rows == 8


@given(tokens=st.integers(1, 10**6), block=st.integers(16, 5000), length=st.integers(8, 3000))
def test_rows_are_counted_as_the_stream_cuts_them(tokens: int, block: int, length: int) -> None:
    full, tail = divmod(tokens, block)
    assert epoch_rows(tokens, block, length) == full * (block // length) + tail // length


def test_rows_agree_with_the_stream(corpus: Corpus, recipe: Recipe) -> None:
    for length in (8, 100, 128, 1000):
        rows = [g.units for g in row_geometry(corpus, length)]
        run_plan = plan(recipe, corpus, f"data.sequence_length={length}")
        assert [d.sizes.usable // length for d in run_plan.domains] == rows


def test_documents_are_cut_to_the_sequence_length(recipe: Recipe, corpus: Corpus) -> None:
    data = "data={mode: documents, sequence_length: 16, tokens_per_step: 999}"
    run_plan = plan(recipe, corpus, data)
    for domain in run_plan.domains:
        lengths = corpus.document_lengths(domain.sizes.name, "train")
        assert domain.sizes.usable == int(np.minimum(lengths, 16).sum())
    assert run_plan.tokens == 20 * 999


def test_a_cap_is_noted_and_the_others_take_over(recipe: Recipe, corpus: Corpus) -> None:
    run_plan = plan(recipe, corpus, "data.max_epochs={math: 1}")
    math = run_plan.domains[2]
    assert (math.read, math.epochs, math.capped_at) == (2048, 1.0, 10)
    assert sum(d.read for d in run_plan.domains) == run_plan.tokens
    assert "math reaches its max_epochs at step 10; the others take over." in run_plan.notes


def test_many_epochs_are_noted(recipe: Recipe, corpus: Corpus) -> None:
    notes = plan(recipe, corpus, "train.steps=200").notes
    assert "math is read 20.0 times; data.max_epochs would cap that." in notes


def test_a_piece_after_the_end_is_noted(recipe: Recipe, corpus: Corpus) -> None:
    pieces = "[{step: 0, weights: {books: 1}}, {step: 99, weights: {code: 1}}]"
    run_plan = plan(recipe, corpus, f"mixer={{kind: schedule, pieces: {pieces}}}")
    assert "mixer.pieces.1 starts at step 99, after the last step." in run_plan.notes
    mixer = {"kind": "static", "weights": {"math": 0.333, "code": 0.333, "books": 0.333}}
    (note,) = [note for note in plan(recipe, corpus, f"mixer={mixer}").notes if "sum to" in note]
    assert note == "mixer.weights sum to 0.999: each share is divided by that."


def test_caps_that_cannot_be_met_are_refused_with_numbers(recipe: Recipe, corpus: Corpus) -> None:
    assert preflight_problems(recipe, corpus, "data.max_epochs=0.25") == [
        "data.max_epochs = 0.25: every domain with a share is exhausted after 12 of 20 steps: the "
        "caps allow 12,480 of 20,480 tokens. Raise the caps (all domains read equally often would "
        "need 0.41 epochs), train at most 12 steps, add data, or give other domains a share."
    ]


def test_unimax_that_cannot_be_met_is_refused(recipe: Recipe, corpus: Corpus) -> None:
    (message,) = preflight_problems(recipe, corpus, "mixer={kind: unimax, max_epochs: 0.1}")
    assert message.startswith("mixer.max_epochs = 0.1: ")


def test_more_workers_than_cores(recipe: Recipe, corpus: Corpus) -> None:
    assert preflight_problems(recipe, corpus, "cluster.workers=3") == [
        "cluster.workers = 3: with cpus_per_worker = 1 that takes 3 CPUs, this machine has 2. "
        "Use fewer workers, or a larger cluster."
    ]
    assert plan(recipe, corpus, "cluster.workers=0").workers == 0
    assert plan(recipe, corpus, "cluster.workers=3", "cluster.cpus_per_worker=0.5").workers == 3


def test_more_gpus_than_there_are(recipe: Recipe, corpus: Corpus) -> None:
    (message,) = preflight_problems(recipe, corpus, "cluster.gpus_per_worker=1")
    assert message == (
        "cluster.gpus_per_worker = 1: with cluster.workers = 1 that takes 1 GPUs, this machine has "
        "0. Use fewer workers, or set it to 0."
    )
    two = replace(HERE, gpus=2)
    assert plan(recipe, corpus, "cluster.gpus_per_worker=1", has=two).on_gpu
    assert plan(recipe, corpus, "cluster.workers=2", has=two).on_gpu
    assert not plan(recipe, corpus, has=replace(two, gpus=0)).on_gpu


def test_rows_longer_than_the_model_reads(recipe: Recipe, corpus: Corpus) -> None:
    (message,) = preflight_problems(recipe, corpus, "model.config.max_position_embeddings=64")
    assert "data.sequence_length = 128: longer than the model's 64 positions" in message


def test_rows_longer_than_a_block_or_a_domain(recipe: Recipe, corpus: Corpus) -> None:
    problems = preflight_problems(recipe, corpus, "data.sequence_length=4096")
    assert "data.sequence_length = 4096: longer than a block of the prepared corpus" in problems[0]
    assert [message.split(": ")[0] for message in problems[1:]] == [
        f"corpus.domains.{at}.name = {name!r}" for at, name in enumerate(TOKENS)
    ]


def test_gradients_take_two_rows_of_every_domain(tmp_path: Path, recipe: Recipe) -> None:
    domains = {"books": labeled_domain(0, 4000), "scraps": labeled_domain(1, 200)}
    corpus = write_corpus(tmp_path / "c", domains, block_tokens=1024, vocab_size=16_384)
    even = load_recipe(recipe, [f"corpus.path={corpus.path}", "mixer={kind: uniform}"])
    assert plan(even, corpus).steps == 20
    (message,) = preflight_problems(even, corpus, "mixer.kind=pike")
    assert message.startswith("corpus.domains.1.name = 'scraps': its 200 tokens are less than two")


def test_a_model_with_too_small_a_vocabulary(recipe: Recipe, corpus: Corpus) -> None:
    (message,) = preflight_problems(recipe, corpus, "model.config.vocab_size=100")
    assert "vocab_size = 100: smaller than the tokenizer's vocabulary of 16384" in message


def test_a_model_that_does_not_fit_into_memory(recipe: Recipe, corpus: Corpus) -> None:
    (message,) = preflight_problems(recipe, corpus, has=replace(HERE, memory_bytes=10**6))
    assert message.startswith("model = {'config': {'hidden_size': 32")
    assert "this machine has 0.0 GB of memory" in message


def test_checkpoints_that_do_not_fit_on_the_disk(
    recipe: Recipe, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "disk_free", lambda path: 10**6)
    (message,) = preflight_problems(recipe, corpus)
    assert "3 checkpoints take 0.0 GB, the disk has 0.0 GB free" in message


def test_everything_wrong_is_said_at_once(recipe: Recipe, corpus: Corpus) -> None:
    problems = preflight_problems(
        recipe, corpus, "cluster.workers=8", "data.max_epochs=0.1", "model.config.hiden_size=3"
    )
    assert [message.split(" = ")[0] for message in problems] == [
        "cluster.workers",
        "model.config.hiden_size",
        "data.max_epochs",
    ]


def test_weights_of_other_domains(recipe: Recipe, corpus: Corpus) -> None:
    (message,) = preflight_problems(recipe, corpus, "mixer.weights={boks: 1}")
    assert "mixer.weights.boks" in message
    assert "Did you mean 'books'?" in message


def test_an_empty_domain(tmp_path: Path, recipe: Recipe) -> None:
    nothing = (np.zeros(0, np.uint16), np.zeros(0, np.int64))
    domains = {"books": labeled_domain(0, 5000), "void": nothing}
    made = write_corpus(tmp_path / "c", domains, block_tokens=1024)
    problems = preflight_problems(recipe, made, "mixer={kind: uniform}")
    assert problems == [
        "corpus.domains.1.name = 'void': the domain has no tokens. Give it text or a share of 0, "
        "or leave it out."
    ]


def unprepared(tmp_path: Path, **corpus: Any) -> Recipe:
    """Return a recipe over real files that nothing has been prepared from."""
    names = ("books", "legal", "math")
    domains = [{"name": n, "train": str(QUICKSTART / "train" / f"{n}.parquet")} for n in names]
    document = {
        "name": "fresh",
        "corpus": {"path": str(tmp_path / "none"), "domains": domains, **corpus},
        "data": {"sequence_length": 128, "rows_per_step": 8},
        "model": {"config": TINY},
        "train": {"steps": 20},
        "run": {"dir": str(tmp_path / "run")},
    }
    return load_recipe(write(tmp_path / "fresh.yaml", document))


def test_an_unprepared_corpus_is_estimated_from_its_sources(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    run_plan = plan(unprepared(tmp_path), None)
    assert run_plan.estimated
    for domain in run_plan.domains:
        file = QUICKSTART / "train" / f"{domain.sizes.name}.parquet"
        n_bytes = sum(len(text.encode()) for text in pq.read_table(file)["text"].to_pylist())
        assert domain.sizes.tokens == pytest.approx(0.98 * n_bytes, rel=0.05)
        assert domain.sizes.documents is None
    fewer = plan(unprepared(tmp_path, tokenizer={"train": "bpe", "vocab_size": 4096}), None)
    assert fewer.domains[0].sizes.tokens < run_plan.domains[0].sizes.tokens / 2


def test_a_recipe_without_a_model_trains_a_small_one_and_says_so(tmp_path: Path) -> None:
    document = unprepared(tmp_path).model_dump(mode="json", exclude={"model"})
    recipe = load_recipe(document)
    run_plan = plan(recipe, None)
    assert run_plan.parameters == 10_621_824 + 257 * 384
    assert run_plan.notes[0].startswith(
        f"model: none given; a small llama of {run_plan.parameters:,} parameters is trained."
    )
    # A resolved recipe says what is trained, and means it still.
    assert load_recipe(recipe.model_dump(mode="json")).model == recipe.model
    assert load_recipe({**document, "model": {"type": "llama"}}).model == recipe.model
    given = load_recipe({**document, "model": {"config": TINY}})
    assert not [note for note in plan(given, None).notes if "none given" in note]


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    recipe = unprepared(tmp_path)
    (message,) = preflight_problems(recipe, None, "corpus.domains.0.train=/nowhere/*.parquet")
    assert message.startswith("corpus.domains.0.train = '/nowhere/*.parquet': no file matches.")


def test_planning_without_sources_or_corpus_says_what_is_missing(tmp_path: Path) -> None:
    recipe = load_recipe(unprepared(tmp_path), ["corpus.domains=[]"])
    with pytest.raises(CorpusError, match="no prepared corpus is here"):
        preflight.plan_run(recipe)


def test_memory_grows_with_what_it_should() -> None:
    model, facts = ConfigModel(config=TINY), CorpusFacts(512, 0, 64)

    def parts(rows: int, *, bf16: bool = False, **train: Any) -> dict[str, int]:
        config = TrainConfig(steps=1, **train)
        memory_parts = worker_memory(
            model,
            facts,
            config,
            Batch(rows, 64, bf16),
            workers=2,
            optimizer=try_optimizer(config),
        )
        return {part.name: part.bytes for part in memory_parts}

    one, four = parts(1), parts(4)
    weights = 4 * sum(p.numel() for p in build_model(model, facts, seed=0).parameters())
    assert one["weights"] == one["gradients"] == one["optimizer"] // 2 == weights
    assert four["activations"] == pytest.approx(4 * one["activations"], rel=0.1)
    assert four["logits"] == 4 * one["logits"]
    assert parts(4, parallel="fsdp2")["optimizer"] == -(-weights // 2) * 2
    assert parts(4, activation_checkpointing=True)["activations"] < four["activations"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activations_are_those_that_autograd_keeps(kind: str) -> None:
    """The count on fake tensors against a real forward pass, storage by storage."""
    import torch

    sizes = TINY if kind == "llama" else {"n_embd": 32, "n_layer": 2, "n_head": 2}
    model, facts = ConfigModel(type=kind, config=sizes), CorpusFacts(512, 0, 64)
    train = TrainConfig(steps=1)
    memory_parts = worker_memory(
        model, facts, train, Batch(3, 64, False), workers=1, optimizer=try_optimizer(train)
    )
    real = build_model(model, facts, seed=0)
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    saved_tensors: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved_tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(3, 64, dtype=torch.int64)
    positions = (torch.arange(64) % 32).expand_as(ids)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in saved_tensors.values())
    activations = next(part.bytes for part in memory_parts if part.name == "activations")
    assert activations == pytest.approx(counted, rel=0.02)


def drawn(run_plan: RunPlan) -> str:
    console = Console(width=120, record=True, highlight=False)
    with console.capture() as captured:
        plan_command.draw(run_plan, console)
    return captured.get()


def test_the_drawing_says_what_matters(recipe: Recipe, corpus: Corpus) -> None:
    shown = drawn(plan(recipe, corpus, "data.max_epochs={math: 1}"))
    lines = [line.split() for line in shown.splitlines()]
    assert ["math", "20.0", "%", "2.05", "k", "2.05", "k", "1.00", "of", "1"] in [
        line[:10] for line in lines
    ]
    assert "20 steps of 1,024 tokens (8 rows of 128) = 20.5 k tokens" in shown
    assert "note        math reaches its max_epochs" in shown
    assert "~" not in shown


def test_a_schedule_is_drawn_by_its_steps(recipe: Recipe, corpus: Corpus) -> None:
    pieces = "[{step: 0, weights: {books: 1}}, {step: 10, weights: {books: 0.25, code: 0.75}}]"
    shown = drawn(plan(recipe, corpus, f"mixer={{kind: schedule, pieces: {pieces}}}"))
    assert ["share", "from", "step", "0", "10"] in [line.split() for line in shown.splitlines()]
    assert ["code", "0.0", "%", "75.0", "%"] in [line.split() for line in shown.splitlines()]


def test_estimates_are_marked(tmp_path: Path) -> None:
    shown = drawn(plan(unprepared(tmp_path), None))
    assert "estimated, not prepared yet" in shown
    assert "~" in shown


def test_a_crowd_of_domains_is_summed_up(recipe: Recipe, corpus: Corpus) -> None:
    run_plan = plan(recipe, corpus)
    many = tuple(
        replace(run_plan.domains[0], sizes=replace(run_plan.domains[0].sizes, name=f"cluster-{n}"))
        for n in range(10_000)
    )
    shown = drawn(replace(run_plan, domains=many))
    assert "... 9960 more" in shown
    assert len(shown.splitlines()) < 60


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (999, "999"), (999.6, "1 k"), (1000, "1 k"), (12_345, "12.3 k"), (4.56e6, "4.56 M"),
     (1e9, "1 G"), (2.5e12, "2.5 T"), (9e18, "9e+03 P")],
)  # fmt: skip
def test_amounts(value: float, shown: str) -> None:
    assert plan_command.amount(value) == shown


@pytest.mark.parametrize(
    ("share", "shown"), [(0, "0.0 %"), (1, "100.0 %"), (0.123, "12.3 %"), (0.00004, "0.004 %")]
)
def test_percentages(share: float, shown: str) -> None:
    assert plan_command.percent(share) == shown


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    resources = machine.resources(None)
    total, free = machine.memory()
    assert resources.where == "this machine"
    assert resources.cpus == machine.cores() >= 1
    assert total > free > 0
    assert resources.object_store_bytes == int(0.3 * total)
    assert machine.resources("local", 10**8).object_store_bytes == 10**8
    assert (machine.disk_free(str(tmp_path / "a" / "b")) or 0) > 0
    assert machine.disk_free("s3://bucket/x") is None


def test_a_container_may_have_less_than_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in (("cpu.max", "50000 100000\n"), ("memory.max", "1000000\n"),
                       ("memory.current", "400000\n")):  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.cores() == 1
    assert machine.memory() == (1_000_000, 600_000)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_does_not_answer_is_said_at_once(address: str) -> None:
    with pytest.raises(ClusterError, match="no Ray cluster answers there"):
        machine.resources(address)


def test_an_address_that_is_none() -> None:
    with pytest.raises(ClusterError, match="not an address of a Ray cluster"):
        machine.resources("nonsense")
