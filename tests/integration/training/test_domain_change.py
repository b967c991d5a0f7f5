"""A run whose domains change from a step on: before it as it was, from it on as stated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from raymix.errors import CorpusError, RecipeError
from raymix.recipe import Recipe
from raymix.report.data.read import read_run
from raymix.report.data.summary import summarize
from raymix.sampling import MixtureLog
from raymix.store import Corpus
from raymix.streaming.batches.step_batch import StepBatch
from raymix.streaming.batches.stream import MixtureStream, row_tokens
from raymix.streaming.blocks.sources import LocalSource
from raymix.streaming.controller.build import build_mixture_state
from raymix.streaming.controller.local import LocalController
from raymix.training.api import train
from raymix.training.job import Job
from raymix.training.launch.local import run_in_process
from raymix.training.plan.mixer_context import mixer_context
from raymix.training.run.domain_change import checkpoint_to_resume
from raymix.training.run.rundir import RunDirectory
from tests.integration.training.test_run import at, job, numbers, recipe
from tests.integration.training.test_run import train as train_in_process
from tests.support.loops import train_corpus

CHANGE, STEPS = 4, 9
BEFORE = {"a": 0.5, "b": 0.5}
INHERIT = {"kind": "inherit", "added": {"c": 0.25}}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("before"), {"a": 9000, "b": 6000})


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Return the corpus without b and with c."""
    return train_corpus(tmp_path_factory.mktemp("after"), {"a": 9000, "c": 3000})


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("more"), {"a": 9000, "b": 6000, "c": 3000})


def of(corpus: Corpus, directory: Path, mixer: dict[str, Any], **changes: Any) -> Recipe:
    options = {"mixer": mixer, "train__steps": STEPS, "train__checkpoint_every": 100}
    return recipe(corpus, directory, **options | changes)


def stop_at(run: RunDirectory, step: int) -> Callable[[], bool]:
    return lambda: run.metrics.exists() and run.metrics.read_text().count('"batch_hash"') >= step


def started(corpus: Corpus, directory: Path, mixer: dict[str, Any], **changes: Any) -> RunDirectory:
    """Return a run that was stopped at step `CHANGE`."""
    used = of(corpus, directory, mixer, **changes)
    run = at(directory, used)
    end = train_in_process(used, stop_requested=stop_at(run, CHANGE - 1))
    assert end.step == CHANGE
    return run


def steps_of(run: RunDirectory) -> list[dict[str, Any]]:
    return [line for line in numbers(run) if "batch_hash" in line]


def rows_by_rule(phases: list[tuple[int, dict[str, Fraction]]], rows: int) -> list[dict[str, int]]:
    """Return the rows of each step by the rule of the documentation, in exact arithmetic."""
    carry: dict[str, Fraction] = {}
    steps = []
    for n_steps, shares in phases:
        for _ in range(n_steps):
            for name, share in shares.items():
                carry[name] = carry.get(name, Fraction(0)) + rows * share
            taken = dict.fromkeys(shares, 0)
            for _ in range(rows):
                name = max(shares, key=lambda each: carry[each])
                carry[name] -= 1
                taken[name] += 1
            steps.append(taken)
    return steps


def test_a_domain_added_takes_its_share_and_the_others_keep_their_proportions(
    before: Corpus, more: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = started(before, tmp_path, {"kind": "static", "weights": {"a": 0.75, "b": 0.25}})
    first = steps_of(run)
    used = of(more, tmp_path, INHERIT)
    with pytest.raises(CorpusError, match=r"Add --domains-from 4 to the command"):
        train(of(more, tmp_path, {"kind": "static", "weights": {"a": 0.75, "b": 0.25}}))
    assert train(used, domains_from=CHANGE, report=False)["steps"] == STEPS
    assert "domains from step 4 on: added c" in capsys.readouterr().out
    lines = steps_of(run)
    assert lines[:CHANGE] == first
    shares = {"a": Fraction(9, 16), "b": Fraction(3, 16), "c": Fraction(1, 4)}
    assert lines[CHANGE]["shares"] == {name: float(share) for name, share in shares.items()}
    expected = rows_by_rule(
        [
            (CHANGE, {"a": Fraction(3, 4), "b": Fraction(1, 4)}),
            (STEPS - CHANGE, shares),
        ],
        rows=6,
    )
    assert [line["counts"] for line in lines] == [
        {name: 32 * rows for name, rows in step.items() if rows} for step in expected
    ]
    # The same command again: finished, with the numbers that `inherit` stood for.
    assert train(used, domains_from=CHANGE, report=False)["steps"] == STEPS
    other = of(more, tmp_path, INHERIT | {"added": {"c": 0.5}})
    with pytest.raises(RecipeError, match=r"differs in mixer\.weights\.a"):
        train(other, domains_from=CHANGE, report=False)


def test_a_domain_removed_leaves_its_share_and_its_tokens_stay_counted(
    before: Corpus, after: Corpus, tmp_path: Path
) -> None:
    run = started(before, tmp_path, {"kind": "static", "weights": BEFORE})
    used = of(after, tmp_path, {"kind": "inherit", "split": {"b": "c"}})
    document = train(used, domains_from=CHANGE, report=False)
    lines = steps_of(run)
    assert lines[CHANGE]["shares"] == {"a": 0.5, "c": 0.5}
    assert [line["tokens"] for line in lines] == [192 * step for step in range(1, STEPS + 1)]
    assert document["tokens"] == 192 * STEPS
    record = read_run(str(run.path))
    assert record.domains == ("a", "c", "b")
    report = summarize(record)
    assert report["domains"]["b"]["tokens"] == sum(line["counts"].get("b", 0) for line in lines)
    assert report["weights"]["shares"]["b"] == [0.5, 0.0]
    assert "From step 4 on other domains: added c; removed b." in report["notes"]
    exact = report["exactness"]
    assert exact["bound_behind"] <= exact["most_behind"] <= exact["most_ahead"]
    assert exact["most_ahead"] <= exact["bound_ahead"]
    # New text is scored when it comes.
    assert report["domains"]["c"]["loss_first"] is not None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixer": {"kind": "odm"}, "train__probe_interval": 3},
        {"data": {"mode": "documents", "sequence_length": 32, "tokens_per_step": 200}},
    ],
    ids=["static", "odm", "documents"],
)
def test_it_goes_on_bit_for_bit_wherever_it_stops(
    before: Corpus, after: Corpus, tmp_path: Path, changes: dict[str, Any]
) -> None:
    mixer = {"kind": "static", "weights": BEFORE}
    changed = {"mixer": {"kind": "uniform"}} | changes
    runs = []
    for name in ("whole", "stopped"):
        run = started(before, tmp_path / name, **{"mixer": mixer} | changes)
        used = of(after, tmp_path / name, **changed)
        if name == "stopped":
            train_in_process_changed(used, run, CHANGE + 2)
        train(used, domains_from=CHANGE, report=False)
        runs.append(run)
    whole, stopped = (
        [{k: v for k, v in line.items() if k != "run"} for line in steps_of(run)] for run in runs
    )
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))
    assert whole == stopped
    assert runs[0].mixture_log.read_text() == runs[1].mixture_log.read_text()


def train_in_process_changed(used: Recipe, run: RunDirectory, step: int) -> None:
    """Go on with other domains, to a step."""
    run.write_recipe(used)
    # A start of its own: within one session the controller goes on from its files.
    again = replace(job(used), session="another", threads=None, domains_from=CHANGE)
    assert run_in_process(again, stop_requested=stop_at(run, step - 1)).step == step


def test_the_batches_are_the_same_for_any_number_of_ranks(
    before: Corpus, after: Corpus, tmp_path: Path
) -> None:
    run = started(before, tmp_path, {"kind": "static", "weights": BEFORE})
    used = of(after, tmp_path, {"kind": "uniform"})
    train(used, domains_from=CHANGE, report=False)
    expected = [line["batch_hash"] for line in steps_of(run)[CHANGE:]]
    (tmp_path / "ranks").mkdir()
    again = started(before, tmp_path / "ranks", {"kind": "static", "weights": BEFORE})
    newest = checkpoint_to_resume(again, used, STEPS, domains_from=CHANGE)
    assert newest is not None
    state = newest[1]
    for world_size in (1, 2, 3):
        tokens = 0
        for rank in range(world_size):
            mixture = build_mixture_state(
                used.mixer, mixer_context(used, after, steps=STEPS), snapshot=state.controller
            )
            stream = MixtureStream(
                after,
                used.data,
                seed=used.seed,
                rank=rank,
                world_size=world_size,
                controller=LocalController(mixture),
                source=LocalSource(after, row_tokens=row_tokens(used.data)),
                state=state.sampler,
                limit=STEPS,
            )
            batches = [stream.next() for _ in range(STEPS - CHANGE)]
            assert [batch.batch_hash for batch in batches] == expected
            tokens += sum(batch.tokens.size for batch in batches if isinstance(batch, StepBatch))
        assert tokens == 192 * (STEPS - CHANGE)


def test_whoever_does_not_ask_for_other_domains_does_not_get_them(
    stopped_run: Path, after: Corpus
) -> None:
    """Trials and other callers below the command do not check what they resume."""
    used = of(after, stopped_run, {"kind": "uniform"})
    with pytest.raises(CorpusError, match=r"its domains are \['a', 'b'\]"):
        run_in_process(
            Job(
                recipe=used,
                run=at(stopped_run, used),
                steps=STEPS,
                micro_batch_rows=4,
                on_gpu=False,
                threads=1,
                session="other",
            ),
            stop_requested=lambda: False,
        )


@pytest.mark.parametrize(
    ("step", "mixer", "changes", "wrong"),
    [
        (3, INHERIT, {}, r"domains-from = 3: not the step of .* Allowed: 4"),
        (4, {"kind": "inherit"}, {}, r"mixer\.added = \{\}: c: new in the run, without a share"),
        (
            4, {"kind": "inherit", "added": {"a": 0.1, "c": 0.1}}, {},
            r"mixer\.added = 'a': the run reads it already\. New ones are: c",
        ),
        (
            4, {"kind": "inherit", "split": {"a": ["c"]}}, {},
            r"mixer\.split\.a = \['c'\]: not a domain that the run has read and reads no longer",
        ),
        (4, INHERIT, {"train__lr": 0.5}, r"differs in train\.lr"),
        (4, INHERIT, {"train__steps": 4}, r"differs in train\.steps"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(
    before: Corpus,
    after: Corpus,
    tmp_path: Path,
    stopped_run: Path,
    *,
    step: int,
    mixer: dict[str, Any],
    changes: dict[str, Any],
    wrong: str,
) -> None:
    files = {path: path.read_bytes() for path in stopped_run.rglob("*") if path.is_file()}
    used = of(after, stopped_run, mixer, **changes)
    with pytest.raises((RecipeError, CorpusError), match=wrong):
        train(used, domains_from=step, report=False)
    assert files == {path: path.read_bytes() for path in stopped_run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped_run(before: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stopped")
    started(before, directory, {"kind": "static", "weights": BEFORE})
    return directory


def test_other_content_of_a_domain_that_stays_is_refused(stopped_run: Path, tmp_path: Path) -> None:
    other = train_corpus(tmp_path, {"a": 9000, "c": 3000}, seed=1)
    used = of(other, stopped_run, INHERIT)
    with pytest.raises(CorpusError, match=r"corpus\.domains = 'a': their content is not what"):
        train(used, domains_from=CHANGE, report=False)


def test_without_a_run_there_is_nothing_to_change(before: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no run with a checkpoint is in"):
        train(of(before, tmp_path, {"kind": "uniform"}), domains_from=4, report=False)
    with pytest.raises(RecipeError, match="Use it with raymix train RECIPE --domains-from STEP"):
        train(of(before, tmp_path, {"kind": "inherit"}), report=False)


def test_a_finished_run_is_made_longer_with_other_domains(
    before: Corpus, after: Corpus, tmp_path: Path
) -> None:
    first = of(before, tmp_path, {"kind": "uniform"}, train__steps=CHANGE)
    train(first, report=False)
    used = of(after, tmp_path, {"kind": "uniform"}, train__steps=CHANGE)
    with pytest.raises(RecipeError, match="is finished: no step is left for other domains"):
        train(used, domains_from=CHANGE, report=False)
    used = of(after, tmp_path, {"kind": "uniform"})
    train(used, domains_from=CHANGE, extend=True, report=False)
    run = at(tmp_path, used)
    assert len(steps_of(run)) == STEPS
    log = MixtureLog.from_lines(run.mixture_log.read_text().splitlines())
    assert log.domains == ("a", "c")
    assert log.earlier is not None
    assert log.earlier.domains == ("a", "b")
