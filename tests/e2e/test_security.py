"""What others wrote is data: nothing in it runs, leads elsewhere, or shows what is secret."""

from __future__ import annotations

import ast
import http.server
import json
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version as ray_version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from raymix.errors import CorpusError, RaymixError
from raymix.laws import load_law, read_table
from raymix.merging.run.engine import merge
from raymix.recipe import Recipe, load_recipe
from raymix.report.data.live import LiveRun
from raymix.report.data.read import read_run
from raymix.report.data.summary import summarize
from raymix.schedule import load_cost_model
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.evaluate.export import export
from raymix.training.evaluate.score import score
from tests.support.fuzzing import outcome
from tests.support.loops import smallest_run
from tests.support.merging import weights, write_family
from tests.support.paths import ROOT
from tests.support.shell import QUICKSTART, Shell, typed, write_recipe

SECRET = "hunter2-0123456789-abcdef"
SECRETS = (
    "RAY_AUTH_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "GOOGLE_API_KEY",
    "AZURE_STORAGE_KEY",
)

# Calls that run what they read, and the place that may: on what its own tasks have just sent.
RUNS_CODE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads",
    "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "eval", "exec",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "os.system", "os.popen",
    "tarfile.open", "shutil.unpack_archive", "pandas.read_pickle",
}  # fmt: skip
MAY = {("raymix/corpus/runner.py", "pickle.loads")}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield the calls in raymix: file, dotted name, and the call."""
    for path in sorted((ROOT / "raymix").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def test_nothing_runs_what_it_reads() -> None:
    uses = {(file, name) for file, name, _ in calls() if name in RUNS_CODE}
    assert uses == MAY


def test_loaders_that_could_are_told_not_to() -> None:
    wanted = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    seen = set()
    for file, name, call in calls():
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in wanted:
            option, value = wanted[name]
            assert keywords.get(option) == str(value), f"{file}: {name}"
        if name.startswith("Auto") and name.endswith(".from_pretrained"):
            assert keywords.get("trust_remote_code") == "False", f"{file}: {name}"
            seen.add(name)
        assert keywords.get("shell") != "True", f"{file}: {name}"
        assert "extractall" not in name, f"{file}: {name}"
    assert seen == {"AutoConfig.from_pretrained", "AutoModelForCausalLM.from_pretrained"}


# Pickles that make a directory, wherever a file is read.


class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.place,)


@pytest.fixture
def sprung(tmp_path: Path) -> Iterator[Path]:
    """The directory that a planted pickle would make, which must not be there at the end."""
    place = tmp_path / "sprung"
    yield place
    assert not place.exists(), "a planted pickle was run"


def planted(place: Path) -> dict[str, bytes]:
    """Return files that make `place` when they are loaded by what trusts them."""
    yaml_tag = f"!!python/object/apply:os.mkdir [{str(place)!r}]"
    extension = b"arrow.py_extension_type"
    schema = pa.schema(
        [
            pa.field(
                "text",
                pa.binary(),
                metadata={
                    b"ARROW:extension:name": extension,
                    b"ARROW:extension:metadata": pickle.dumps(Bomb(place)),
                },
            )
        ]
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([b"a"])], schema=schema))
    return {
        "pickle": pickle.dumps(Bomb(place)),
        "old pickle": pickle.dumps(Bomb(place), protocol=0),
        "yaml": f"name: {yaml_tag}\n".encode(),
        "bare yaml": yaml_tag.encode(),
        "arrow": sink.getvalue().to_pybytes(),
    }


KINDS = ("pickle", "old pickle", "yaml", "bare yaml", "arrow")


def test_the_pickles_would_run(tmp_path: Path) -> None:
    for kind, load in {
        "pickle": pickle.loads,
        "old pickle": pickle.loads,
        "bare yaml": lambda raw: yaml.load(raw, Loader=yaml.UnsafeLoader),
    }.items():
        load(planted(tmp_path / kind)[kind])
        assert (tmp_path / kind).is_dir()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return smallest_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A copy of the run and of its corpus, and the recipe of it."""
    shutil.copytree(recipe.run_dir, tmp_path / "run")
    shutil.copytree(recipe.corpus.path, tmp_path / "corpus")
    moved = recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update={"dir": str(tmp_path / "run")}),
            "corpus": recipe.corpus.model_copy(update={"path": str(tmp_path / "corpus")}),
        }
    )
    resolved = tmp_path / "run" / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(moved.model_dump(mode="json")))
    return moved


def watch_once(path: Path) -> dict[str, Any]:
    watched = LiveRun(path)
    watched.poll()
    return watched.document()


def use(run: Recipe, out: Path) -> None:
    """Do all that reads a run directory and its corpus; each works or refuses."""
    path = Path(run.run_dir)
    uses: dict[str, Callable[[], object]] = {
        "report": lambda: summarize(read_run(path)),
        "watch": lambda: watch_once(path),
        "eval": lambda: score(path),
        "export": lambda: export(path, out),
        "open": lambda: Corpus.open(run.corpus.path).read_block("a", "train", 0),
        "train": lambda: train(run, report=False),
    }
    for name, work in uses.items():
        outcome(work, name)
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("kind", KINDS)
def test_run_directories_and_corpora_run_nothing(
    kind: str, run: Recipe, sprung: Path, tmp_path: Path
) -> None:
    raw = planted(sprung)[kind]
    for folder in (Path(run.run_dir), Path(run.corpus.path)):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            # What else somebody's tools would load from there.
            before = file.read_bytes()
            file.write_bytes(raw)
            if file.name in {"metrics.jsonl", "mixture_log.jsonl", "state.json", "manifest.json",
                             "resolved.yaml", "model.safetensors", "documents.arrow"}:  # fmt: skip
                use(run, tmp_path / "out")
            else:
                outcome(lambda: summarize(read_run(run.run_dir)), str(file))
            assert not sprung.exists(), file
            put_damaged_back(Path(run.run_dir) / "checkpoints")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(before)


def put_damaged_back(checkpoints: Path) -> None:
    """Undo that a start of training has set damaged checkpoints aside."""
    for path in (checkpoints / "damaged").glob("step-*"):
        shutil.rmtree(checkpoints / path.name, ignore_errors=True)
        path.rename(checkpoints / path.name)


def test_a_checkpoint_of_pickles_is_none(run: Recipe, sprung: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "training_args.bin",
                 "checkpoint_manager_snapshot.json", "tuner.pkl", "trainer.pkl"):  # fmt: skip
        for folder in sorted((Path(run.run_dir) / "checkpoints").iterdir()):
            (folder / name).write_bytes(pickle.dumps(Bomb(sprung)))
            (folder / "model.safetensors").unlink(missing_ok=True)
        (Path(run.run_dir) / name).write_bytes(pickle.dumps(Bomb(sprung)))
    use(run, tmp_path / "out")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_model_of_pickles_is_refused(
    legacy: bool, run: Recipe, sprung: Path, tmp_path: Path
) -> None:
    """Beside it lies Python that the configuration names, which Transformers would offer to run."""
    model = tmp_path / "model"
    shutil.copytree(max((Path(run.run_dir) / "checkpoints").iterdir()), model)
    (model / "model.safetensors").unlink()
    torch.save({"a": Bomb(sprung)}, model / "pytorch_model.bin",
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"from pathlib import Path\nPath({str(sprung)!r}).mkdir()\n")
    for kind in ("llama", "evil"):
        (model / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        document = run.model_dump(mode="json")
        document["model"] = {"kind": "pretrained", "path": str(model)}
        document["run"]["dir"] = str(tmp_path / f"other-{kind}")
        changed = Recipe.model_validate(document)
        with pytest.raises(RaymixError, match=r"model\.path"):
            train(changed, report=False)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_commands_take_run_nothing(
    kind: str, sprung: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = planted(sprung)[kind]
    readers: dict[str, Callable[[str], object]] = {
        "recipe.yaml": load_recipe,
        "law.json": load_law,
        "cost.json": load_cost_model,
        "table.csv": read_table,
        "table.parquet": read_table,
        "merge.yaml": lambda path: merge(path, tmp_path / "out"),
    }
    for name, read in readers.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(RaymixError):
            read(name)


@pytest.mark.parametrize("kind", ["pickle", "arrow"])
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "arrow", "txt", "jsonl.gz"])
def test_sources_of_a_corpus_run_nothing(
    kind: str, ending: str, sprung: Path, tmp_path: Path
) -> None:
    from raymix.corpus.preparation import prepare

    (tmp_path / f"evil.{ending}").write_bytes(planted(sprung)[kind])
    made = Recipe.model_validate(
        {
            "name": "x",
            "train": {"steps": 1},
            "corpus": {
                "path": str(tmp_path / "corpus"),
                "domains": [{"name": "a", "train": str(tmp_path / f"evil.{ending}")}],
            },
        }
    )
    outcome(lambda: prepare(made.corpus, parallelism=0), ending)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
@pytest.mark.parametrize("allow", [False, True])
def test_models_to_merge_run_nothing(name: str, allow: bool, sprung: Path, tmp_path: Path) -> None:
    family = write_family(tmp_path, tasks=2)
    (tmp_path / "m2" / "model.safetensors").unlink()
    torch.save({**weights(2), "bomb": Bomb(sprung)}, tmp_path / "m2" / name)
    if name.startswith("adapter"):
        (tmp_path / "m2" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    with pytest.raises(RaymixError):
        merge({"merge_method": "drm", **family, "allow_pickle": allow}, tmp_path / "out")


def test_groups_of_domains_run_nothing(sprung: Path, tmp_path: Path) -> None:
    from raymix.mixers import MixerContext
    from raymix.mixers.adaptive.bases import read_bases

    np.savez(tmp_path / "groups.npz", shares=np.array([Bomb(sprung)], dtype=object))
    context = MixerContext(
        domains=("a", "b"), tokens_D=np.array([5, 5]), total_tokens=9, total_steps=9
    )
    with pytest.raises(RaymixError):
        read_bases(str(tmp_path / "groups.npz"), context, uniform=True)


# Indexes stay in their directory.


@pytest.mark.parametrize(
    "path",
    [
        "../x.arrow",
        "a/../../x.arrow",
        "/etc/passwd",
        "..\\x.arrow",
        "file:///etc/passwd",
        "C:x",
        "",
    ],
)
@pytest.mark.parametrize("where", ["shard", "domain"])
def test_a_manifest_does_not_lead_out_of_its_corpus(path: str, where: str, run: Recipe) -> None:
    manifest = Path(run.corpus.path) / "manifest.json"
    document = json.loads(manifest.read_text())
    if where == "shard":
        document["domains"]["a"]["train"]["shards"][0]["file"] = path
    else:
        document["domains"][path] = document["domains"].pop("a")
    manifest.write_text(json.dumps(document))
    with pytest.raises(CorpusError, match="leads out of the corpus"):
        Corpus.open(run.corpus.path)


def test_a_checkpoint_does_not_lead_out_of_its_directory(run: Recipe, tmp_path: Path) -> None:
    from raymix.training.run.checkpoint import newest_checkpoint, read_state

    (tmp_path / "outside").write_bytes(b"12345")
    newest = max((Path(run.run_dir) / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    state["files"]["../../../outside"] = 5
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(RaymixError, match="is not a file name"):
        read_state(newest)
    checkpoint = newest_checkpoint(Path(run.run_dir) / "checkpoints")
    assert checkpoint is not None
    assert checkpoint[0] != newest


# What is secret is not shown.


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/*.jsonl",
        f"https://me:{SECRET}@host/x.jsonl",
        f"s3://bucket/x.jsonl?secret_key={SECRET}&region=us",
        f"https://host/x.jsonl?X-Amz-Signature={SECRET}",
        f"az://c/x.jsonl?a=1&sas_token={SECRET}",
    ],
)
@pytest.mark.parametrize("field", ["train", "path", "tokenizer"])
def test_a_recipe_is_no_place_for_a_password(url: str, field: str, tmp_path: Path) -> None:
    corpus: dict[str, Any] = {"path": "c", "domains": [{"name": "a", "train": "s3://b/a.jsonl"}]}
    if field == "train":
        corpus["domains"][0]["train"] = url
    else:
        corpus[field] = url
    text = yaml.safe_dump({"name": "x", "train": {"steps": 1}, "corpus": corpus})
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RaymixError, match="no place for a password") as caught:
        load_recipe(tmp_path / "x.yaml")
    assert SECRET not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_addresses_of_storage_without_one_are_taken() -> None:
    from raymix.recipe.base import no_secret

    for url in ("s3://b/*.jsonl?endpoint_override=localhost:9", "gs://me@b/x", "data/a:b@c/*.txt"):
        assert no_secret(url) == url


class Echo(http.server.BaseHTTPRequestHandler):
    """A job server that refuses, and says in its answer what it was sent, as proxies do."""

    sent: ClassVar[list[str]] = []

    def _refuse(self) -> None:
        self.sent.append(str(self.headers))
        # The question that comes first is answered, so that the others are put too.
        known = self.path.endswith("/version")
        version = {"version": "4", "ray_version": ray_version("ray"), "ray_commit": ""}
        body = (json.dumps(version) if known else f"refused: {dict(self.headers)}").encode()
        self.send_response(200 if known else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = _refuse

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def echo() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("token_place", ["environment", "file"])
def test_planted_tokens_appear_nowhere(token_place: str, echo: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    planted_in = {**dict.fromkeys(SECRETS, SECRET), "RAY_AUTH_MODE": "token"}
    if token_place == "file":
        del planted_in["RAY_AUTH_TOKEN"]
        (home / ".ray" / "auth_token").write_text(SECRET)
    work = tmp_path / "work"
    work.mkdir()
    shell = Shell(work, env={**planted_in, "HOME": str(home)})
    write_recipe(
        work / "tiny.yaml",
        corpus__tokenizer={"kind": "byte"},
        corpus__domains=[{"name": "math", "train": str(QUICKSTART / "train" / "math.parquet")}],
        train__steps=3,
        data__rows_per_step=2,
        cluster__workers=0,
    )
    absent = write_recipe(work / "absent.yaml", corpus__path="elsewhere",
                          corpus__domains=[{"name": "a", "train": "nowhere/*.txt"}])  # fmt: skip
    lines = [
        ("prepare tiny.yaml", 0),
        ("plan tiny.yaml", 0),
        ("train tiny.yaml", 0),
        ("watch runs/tiny --once", 0),
        ("report runs/tiny", 0),
        ("eval runs/tiny", 0),
        ("export runs/tiny out", 0),
        (f"prepare {absent.name}", 2),
        ("train tiny.yaml train.lr=1e9 train.steps=30 --if-exists new", 1),
        (f"submit train tiny.yaml --address {echo} --storage /shared", 2),
        (f"status --address {echo}", 2),
        (f"logs raymix-x --address {echo}", 2),
        (f"stop raymix-x --address {echo}", 2),
        ("submit train tiny.yaml --address http://127.0.0.1:1 --storage /shared", 2),
        ("submit train tiny.yaml --address http://10.0.0.1:8265 --storage /shared", 2),
        (f"status --address http://me:{SECRET}@127.0.0.1:8265", 2),
    ]
    for line, code, text in typed(shell, lines):
        assert SECRET not in text, line
        assert f"exit {code}" in text, f"{line}: {text}"
    assert any(SECRET in sent for sent in Echo.sent)
    for file in work.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
