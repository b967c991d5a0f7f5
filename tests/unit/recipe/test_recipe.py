"""Loading recipes: files, functions, overrides, paths, and the way back to YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raymix.errors import RecipeError
from raymix.recipe import (
    ByteTokenizer,
    CorpusConfig,
    DocumentData,
    DomainConfig,
    PretrainedModel,
    PretrainedTokenizer,
    ProportionalMixer,
    Recipe,
    ReplayMixer,
    StaticMixer,
    TemperatureMixer,
    TrainConfig,
    TrainedTokenizer,
    UniformMixer,
    commented_recipe,
    load_recipe,
    recipe_schema,
    recipe_to_yaml,
    resolve_paths,
)
from tests.support.recipes import DOCUMENT, document, write


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a recipe in `pipelines/`, seen from the directory above it."""
    (tmp_path / "pipelines").mkdir()
    write(tmp_path / "pipelines" / "demo.yaml")
    monkeypatch.chdir(tmp_path)
    return "pipelines/demo.yaml"


def problems(source: str | Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return caught.value.problems


def test_defaults_fill_what_is_left_out(file: str) -> None:
    recipe = load_recipe(file)
    assert recipe.seed == 0
    assert recipe.corpus.tokenizer == ByteTokenizer()
    assert recipe.data.mode == "packed"
    assert recipe.train.steps == 10


ELSEWHERE: dict[str, Any] = {
    "corpus": {
        "path": "../corpora/demo",
        "tokenizer": "./tok",
        "chat_template": "chat.jinja",
        "domains": [{"name": "a", "train": "d/*.txt", "valid": ["v.txt"]}],
    },
    "data": {"mode": "documents", "assign": {"cost": "cost.json"}},
    "mixer": {"kind": "replay", "log": "a.jsonl"},
    "model": {"kind": "pretrained", "path": "models/m/"},
    "run": {"dir": "../runs/{name}"},
    "tune": {"proxy": {"data.assign.cost": "other.json", "model": {"path": "./small"}}},
    "specialists": {"finetune": {"data": {"assign": {"cost": "third.json"}}}},
}


def paths_in(value: Any) -> set[str]:
    """Return every text of a recipe that looks like a path."""
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return {path for item in items for path in paths_in(item)}
    return {value} if isinstance(value, str) and "/" in value else set()


def test_every_path_starts_at_the_recipe_wherever_it_is_loaded(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / file, {**DOCUMENT, **ELSEWHERE})
    recipe = load_recipe(file)
    below = ["tok", "chat.jinja", "d/*.txt", "v.txt", "cost.json", "a.jsonl", "models/m", "small"]
    below += ["other.json", "third.json"]
    expected = {f"{tmp_path}/pipelines/{name}" for name in below}
    expected |= {f"{tmp_path}/corpora/demo", f"{tmp_path}/runs/{{name}}"}
    assert paths_in(recipe.model_dump()) == expected
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / file) == recipe
    assert resolve_paths(recipe, "/elsewhere") == recipe
    (tmp_path / "other").mkdir()
    extending = write(tmp_path / "other" / "r.yaml", {"extends": f"../{file}"})
    assert load_recipe(extending) == recipe


def test_paths_on_the_command_line_start_at_the_working_directory(
    file: str, tmp_path: Path
) -> None:
    recipe = load_recipe(
        file,
        [
            "corpus.tokenizer={path: ./tok}",
            "corpus.path=c",
            "corpus.domains.0.train=[x.txt, s3://b/y.txt]",
            "corpus.domains.1.train.0=z.txt",
            "mixer={kind: replay, log: a.jsonl}",
            "model={kind: pretrained, path: ./m}",
            "run.dir=out/{seed}",
            "tune.proxy={data.assign.cost: p.json}",
        ],
    )
    books, code = recipe.corpus.domains
    assert books.train == (f"{tmp_path}/x.txt", "s3://b/y.txt")
    assert code.train == (f"{tmp_path}/z.txt", "s3://bucket/*.jsonl")
    assert recipe.corpus.tokenizer == PretrainedTokenizer(path=f"{tmp_path}/tok")
    assert recipe.corpus.path == f"{tmp_path}/c"
    assert recipe.mixer == ReplayMixer(kind="replay", log=f"{tmp_path}/a.jsonl")
    assert recipe.model == PretrainedModel(kind="pretrained", path=f"{tmp_path}/m")
    assert recipe.run_dir == f"{tmp_path}/out/0"
    assert recipe.tune.proxy == {"data.assign.cost": f"{tmp_path}/p.json"}


def test_names_of_the_hub_are_no_paths_unless_there_is_a_directory(
    file: str, tmp_path: Path
) -> None:
    names = ["corpus.tokenizer=gpt2", "model={kind: pretrained, path: Qwen/Qwen3-0.6B}"]
    recipe = load_recipe(file, names)
    assert recipe.corpus.tokenizer == PretrainedTokenizer(path="hf://gpt2")
    assert recipe.model == PretrainedModel(kind="pretrained", path="hf://Qwen/Qwen3-0.6B")
    # Once resolved they stay names, whatever lies in another working directory.
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert load_recipe(recipe) == recipe
    there = load_recipe(file, names)
    assert there.corpus.tokenizer == PretrainedTokenizer(path=f"{tmp_path}/gpt2")
    model = there.model
    assert isinstance(model, PretrainedModel)
    assert model.path == f"{tmp_path}/Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("path", ["a/b/c", "./gpt2", "tok.json", "a--b", "a..b", "-a/b", "é", "a "])
def test_other_words_are_paths(file: str, path: str, tmp_path: Path) -> None:
    recipe = load_recipe(file, [f"corpus.tokenizer={{path: '{path}'}}"])
    expected = os.path.normpath(tmp_path / path)
    assert recipe.corpus.tokenizer == PretrainedTokenizer(path=expected)


@pytest.mark.parametrize("path", ["s3://b/x", "gs://b/x/*.parquet", "file:///x", "/x"])
def test_urls_and_absolute_paths_stay(file: str, path: str) -> None:
    recipe = load_recipe(file, [f"corpus.path={path}", f"corpus.domains.0.train={path}"])
    assert recipe.corpus.path == path
    assert recipe.corpus.domains[0].train == (path,)


def test_a_directory_with_magic_characters_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / "a[1]{x}").mkdir()
    recipe = load_recipe(write(tmp_path / "a[1]{x}" / "r.yaml"))
    assert recipe.corpus.domains[0].train[0].endswith("a[[]1]{x}/data/books.parquet")
    assert recipe.run_dir == str(tmp_path / "a[1]{x}" / "runs" / "demo")


def test_home_is_filled_in(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_recipe(file, ["corpus.path=~/c"]).corpus.path == "/home/me/c"


def test_the_run_directory_takes_name_and_seed(file: str) -> None:
    recipe = load_recipe(file, ["run.dir=/r/{name}-{seed}", "seed=3"])
    assert recipe.run_dir == "/r/demo-3"


def test_resolving_twice_changes_nothing(file: str) -> None:
    recipe = load_recipe(file)
    assert resolve_paths(recipe, "elsewhere") == recipe


OVERRIDES: list[tuple[str, str, Any]] = [
    ("train.steps=200", "train.steps", 200),
    ("train.steps=1_000", "train.steps", 1000),
    ("train.lr=1e-4", "train.lr", 1e-4),
    ("train.clip_norm=null", "train.clip_norm", None),
    ("train.compile=true", "train.compile", True),
    ("train.betas=[0.8, 0.9]", "train.betas", (0.8, 0.9)),
    ("corpus.domains.0.name=books2", "corpus.domains.0.name", "books2"),
    ("corpus.domains.1.train=*.txt", "corpus.domains.1.train.0", "*.txt"),
    ("data.max_epochs.books=2", "data.max_epochs", {"books": 2.0}),
    ("name=no", "name", "no"),
    (" train.steps = 7 ", "train.steps", 7),
]


@pytest.mark.parametrize(("override", "path", "value"), OVERRIDES)
def test_overrides(file: str, override: str, path: str, value: Any) -> None:
    actual: Any = load_recipe(file, ["mixer={kind: uniform}", override])
    for key in path.split("."):
        actual = actual[int(key)] if key.isdecimal() else getattr(actual, key)
    assert actual == value or str(actual).endswith(f"/{value}")


def test_overrides_apply_in_order_and_the_last_wins(file: str) -> None:
    assert load_recipe(file, ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_an_index_just_past_the_end_appends(file: str) -> None:
    added = ["corpus.domains.2.name=new", "corpus.domains.2.train=n.txt"]
    assert [d.name for d in load_recipe(file, added).corpus.domains] == ["books", "code", "new"]


def test_another_kind_drops_the_fields_only_the_old_one_has(file: str) -> None:
    assert load_recipe(file, ["mixer.kind=uniform"]).mixer == UniformMixer(kind="uniform")
    both = load_recipe(file, ["data.rows_per_step=4", "data.mode=documents"]).data
    assert both == DocumentData(mode="documents")


def test_another_kind_keeps_typos(file: str) -> None:
    assert "mixer.wieghts" in problems(file, "mixer.wieghts=3", "mixer.kind=uniform")[0]


def test_a_name_with_dots_is_found_by_its_longest_match(tmp_path: Path) -> None:
    weights = {"a.b": 0.5, "a": 0.5}
    domains = [{"name": "a.b", "train": "x.txt"}, {"name": "a", "train": "y.txt"}]
    data = document(corpus={"path": "c", "domains": domains})
    data["mixer"]["weights"] = weights
    file = write(tmp_path / "r.yaml", data)
    mixer = load_recipe(file, ["mixer.weights.a.b=0.25", "mixer.weights.a=0.75"]).mixer
    assert mixer == StaticMixer(kind="static", weights={"a.b": 0.25, "a": 0.75})


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "r.yaml", {**DOCUMENT, "mixer": None, "eval": None}))
    assert recipe.mixer == ProportionalMixer()
    assert recipe.eval.rows_per_domain == 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("byte", ByteTokenizer()),
        ("{kind: byte}", ByteTokenizer()),
        ("/t", PretrainedTokenizer(path="/t")),
        ("{train: bpe, vocab_size: 300}", TrainedTokenizer(train="bpe", vocab_size=300)),
    ],
)
def test_tokenizer_forms(file: str, text: str, expected: object) -> None:
    assert load_recipe(file, [f"corpus.tokenizer={text}"]).corpus.tokenizer == expected


def test_yaml_words_and_numbers_mean_what_they_look_like(tmp_path: Path) -> None:
    text = """
name: on
seed: 010
corpus:
  path: 2024-01-01
  domains:
    - {name: no, train: x.txt}
    - {name: "2024", train: y.txt}
mixer: {kind: static, weights: {no: 5e-1, 2024: .5}}
train: {steps: 10, lr: 3e-4}
"""
    recipe = load_recipe(write(tmp_path / "r.yaml", text))
    assert (recipe.name, recipe.seed, recipe.train.lr) == ("on", 10, 3e-4)
    assert recipe.corpus.path.endswith("/2024-01-01")
    assert recipe.mixer == StaticMixer(kind="static", weights={"no": 0.5, "2024": 0.5})


def test_aliases_work(tmp_path: Path) -> None:
    text = """
name: demo
corpus: {path: c, domains: [{name: a, train: &all [x.txt]}, {name: b, train: *all}]}
train: {steps: 1}
"""
    a, b = load_recipe(write(tmp_path / "r.yaml", text)).corpus.domains
    assert a.train == b.train


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_recipe(file).name == "demo"


def test_a_function_may_give_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_recipes.py").write_text(
        "from raymix.recipe import *\n"
        "def small():\n"
        "    return Recipe(name='f', corpus=CorpusConfig(path='c'), train=TrainConfig(steps=3))\n"
        "def wrong():\n    return {}\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("my_recipes:small", ["train.steps=4"])
    assert (recipe.train.steps, recipe.corpus.path) == (4, str(tmp_path / "c"))
    assert "returned a dict" in problems("my_recipes:wrong")[0]
    assert "Did you mean 'small'" in problems("my_recipes:smal")[0]
    assert "no function 'value'" in problems("my_recipes:value")[0]
    assert "No module named 'nowhere'" in problems("nowhere:small")[0]


def test_a_recipe_object_is_a_source_too() -> None:
    made = Recipe(
        name="x",
        corpus=CorpusConfig(path="c", domains=(DomainConfig(name="a", train=("a.txt",)),)),
        train=TrainConfig(tokens=100),
    )
    assert load_recipe(made).corpus.path == os.path.abspath("c")
    assert load_recipe(made, ["mixer.kind=temperature"]).mixer == TemperatureMixer(
        kind="temperature"
    )


def test_recipes_are_frozen(file: str) -> None:
    with pytest.raises(ValidationError):
        load_recipe(file).name = "other"  # type: ignore[misc] # refused is what is shown


def test_all_faults_are_reported_at_once(file: str) -> None:
    messages = problems(
        file,
        "train.stesp=3",
        "corpus.domains.0.nme=x",
        "mixer.weights.books=0.7",
        "data.rows_per_step=2",
        "cluster.workers=3",
        "seed=-1",
    )
    starts = [message.split(" = ")[0] for message in messages]
    assert starts == [
        "seed",
        "corpus.domains.0.nme",
        "mixer.weights",
        "train.stesp",
        "data.rows_per_step",
    ]


def test_rules_across_sections_are_checked_beside_other_faults(file: str) -> None:
    messages = problems(file, "train.steps=0", "mixer.weights={boks: 1}")
    assert [message.split(" = ")[0] for message in messages] == [
        "train.steps",
        "mixer.weights.boks",
    ]


def test_hundreds_of_wrong_names_are_summed_up(tmp_path: Path) -> None:
    domains = [{"name": f"cluster-{n}", "train": "x.txt"} for n in range(500)]
    weights = {f"clustre-{n}": 1 / 500 for n in range(500)}
    data = document(
        corpus={"path": "c", "domains": domains}, mixer={"kind": "static", "weights": weights}
    )
    messages = problems(write(tmp_path / "r.yaml", data))
    assert len(messages) == 6
    assert "Did you mean 'cluster-0'?" in messages[0]
    assert "cluster-19 and 480 more" in messages[0]
    assert "495 more names are of no domain" in messages[-1]
    assert max(map(len, messages)) < 1000


WEIGHTS = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,12}", fullmatch=True).filter(
        lambda name: name.lower() not in ("tokenizer", "manifest.json")
    ),
    st.integers(0, 1000),
    min_size=1,
    max_size=6,
).filter(
    lambda weights: sum(weights.values()) > 0 and len({n.lower() for n in weights}) == len(weights)
)


@settings(max_examples=60)
@given(
    weights=WEIGHTS,
    steps=st.integers(1, 10**12),
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**63 - 1),
    text=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1),
)
def test_yaml_round_trip(
    weights: dict[str, int], steps: int, lr: float, seed: int, text: str
) -> None:
    total = sum(weights.values())
    recipe = Recipe(
        name="r",
        seed=seed,
        corpus=CorpusConfig(
            path="/c",
            domains=tuple(
                DomainConfig(name=name, train=("/x",), text_column=text) for name in weights
            ),
        ),
        mixer=StaticMixer(kind="static", weights={k: v / total for k, v in weights.items()}),
        train=TrainConfig(steps=steps, lr=lr),
    )
    recipe = resolve_paths(recipe, "/")
    from raymix._utils.yaml import parse_yaml

    data = parse_yaml(recipe_to_yaml(recipe), name="recipe", value="text")
    assert Recipe.model_validate(data) == recipe


def test_the_resolved_file_loads_to_the_same_recipe(file: str, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["corpus.tokenizer={train: bpe, vocab_size: 300}"])
    saved = write(tmp_path / "resolved.yaml", recipe_to_yaml(recipe))
    assert load_recipe(saved) == recipe


def test_the_commented_recipe_is_valid_and_explains_every_field(tmp_path: Path) -> None:
    text = commented_recipe("fresh")
    recipe = load_recipe(write(tmp_path / "fresh.yaml", text))
    assert recipe.name == "fresh"
    assert text.startswith("# yaml-language-server: $schema=")
    lines = text.splitlines()
    keys = [n for n, line in enumerate(lines) if not line.lstrip().startswith(("#", "- {"))]
    assert len(keys) > 50
    assert max(map(len, lines)) <= 100
    for number in keys:
        if lines[number].strip():
            assert lines[number - 1].lstrip().startswith("#"), lines[number]


def test_the_schema_describes_every_field() -> None:
    schema = recipe_schema()
    required = [{"required": ["name", "corpus", "train"]}, {"required": ["extends"]}]
    assert schema["anyOf"] == required
    for name, model in {**schema["$defs"], "Recipe": schema}.items():
        for field, entry in model["properties"].items():
            assert entry.get("description") or "$ref" in entry, f"{name}.{field}"
    tokenizer = schema["$defs"]["CorpusConfig"]["properties"]["tokenizer"]
    assert {"type": "string"} in tokenizer["anyOf"]
