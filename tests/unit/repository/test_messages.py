"""The exact words of the commonest errors: they are the part of raymix that users read most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymix.errors import RecipeError
from raymix.recipe import load_recipe
from tests.support.recipes import document, write

TRAIN_KEYS = (
    "steps, tokens, optimizer, optimizer_options, lr, min_lr_ratio, schedule, warmup_ratio, "
    "decay_ratio, weight_decay, betas, eps, clip_norm, max_skipped_steps, "
    "micro_batch_rows, precision, parallel, compile, activation_checkpointing, "
    "checkpoint_every, checkpoint_minutes, keep_checkpoints, probe_interval, probe"
)
SECTIONS = (
    "extends, name, seed, corpus, data, mixer, model, train, eval, cluster, run, tune, specialists"
)
NAME = "text of letters, digits, '_', '.' and '-' that begins with a letter or digit"

OVERRIDES = {
    "train.stesp=3": (
        f"train.stesp = 3: unknown key. Did you mean 'train.steps'? Known: {TRAIN_KEYS}."
    ),
    "steps=3": f"steps = 3: unknown key. Did you mean 'train.steps'? Known: {SECTIONS}.",
    "mixer.kind=unimx": (
        "mixer.kind = 'unimx': not known. Did you mean 'unimax'? Known: static, uniform, "
        "proportional, temperature, epochs, unimax, importance, schedule, replay, inherit, pike, "
        "dga, doge, doremi, odm, ado, rb, aioli."
    ),
    "mixer.kind=pyke": (
        "mixer.kind = 'pyke': not known. Did you mean 'pike'? Known: static, uniform, "
        "proportional, temperature, epochs, unimax, importance, schedule, replay, inherit, pike, "
        "dga, doge, doremi, odm, ado, rb, aioli."
    ),
    "mixer={kind: pike, tau: -1}": ("mixer.tau = -1: too small. Allowed: a number of at least 0."),
    "mixer={kind: pike, zeta_1: -0.1}": (
        "mixer.zeta_1 = -0.1: too small. Allowed: a number of at least 0."
    ),
    "mixer={kind: pike, lr: 0.1}": (
        "mixer.lr = 0.1: lr and smoothness go together. Give both, or neither and set zeta_2."
    ),
    "mixer={kind: pike, initial: {books: 0.5}}": (
        "mixer.initial = {'books': 0.5}: the shares sum to 0.5, not 1. "
        "A sum within 0.01 of 1 is allowed. Divide each by 0.5."
    ),
    "mixer={kind: dga}": (
        "mixer.targets = []: dga needs a target. Name a domain that is to be held out of the "
        "mixture, e.g. targets: [medicine]."
    ),
    "mixer={kind: dga, targets: boks}": (
        "mixer.targets = 'boks': no domain of the corpus has this name. Did you mean 'books'? "
        "Known: books, code."
    ),
    "mixer={kind: dga, targets: [books, code]}": (
        "mixer.targets = ('books', 'code'): every domain is a target. "
        "Leave at least one domain to train on."
    ),
    "mixer={kind: dga, targets: books, initial: {books: 0.5, code: 0.5}}": (
        "mixer.initial.books = 0.5: a target is measured and never trained on. Its share must be 0."
    ),
    "mixer.targets=[code]": (
        "mixer.weights.code = 0.5: a target is measured and never trained on. Its share must be 0."
    ),
    "mixer={kind: dga, targets: code, bases: {a: {coed: 1}}}": (
        "mixer.bases.a.coed = 1.0: no domain of the corpus has this name. Did you mean 'code'? "
        "Known: books, code."
    ),
    "mixer={kind: doremi, reference: {boks: 3}}": (
        "mixer.reference.boks = 3.0: no domain of the corpus has this name. Did you mean 'books'? "
        "Known: books, code."
    ),
    "mixer={}": (
        "mixer.kind = (missing): required. Known: static, uniform, proportional, temperature, "
        "epochs, unimax, importance, schedule, replay, inherit, pike, dga, doge, doremi, odm, "
        "ado, rb, aioli."
    ),
    "mixer=static": (
        "mixer = 'static': not a mapping. Allowed: a mapping whose kind is static, uniform, "
        "proportional, temperature, epochs, unimax, importance, schedule, replay, inherit, pike, "
        "dga, doge, doremi, odm, ado, rb or aioli."
    ),
    "train.steps=abc": (
        "train.steps = 'abc': not a whole number. "
        "Allowed: a whole number from 1 to 1,000,000,000,000, or null."
    ),
    "train.steps=true": (
        "train.steps = True: not a number. "
        "Allowed: a whole number from 1 to 1,000,000,000,000, or null."
    ),
    "train.lr=-1": "train.lr = -1: too small. Allowed: a number above 0.",
    "train.lr=.inf": "train.lr = inf: not a finite number. Allowed: a number above 0.",
    "train.schedule=cosin": (
        "train.schedule = 'cosin': not known. Allowed: 'cosine', 'wsd' or 'constant'. "
        "Did you mean 'cosine'?"
    ),
    "train.micro_batch_rows=0": (
        "train.micro_batch_rows = 0: too small. Allowed: a whole number of at least 1 or 'auto'."
    ),
    "train.tokens=5": (
        "train.steps = 10: tokens = 5 gives the length of the run as well. Give one of the two."
    ),
    "train.steps=null": (
        "train.steps = None: the length of the run is missing. Give steps or tokens."
    ),
    "name=a b": f"name = 'a b': not a valid name. Allowed: {NAME}.",
    "corpus.domains.1.name=Books": (
        "corpus.domains.1.name = 'Books': corpus.domains.0 has this name already. Rename one."
    ),
    "corpus.domains.1.name=tokenizer": (
        "corpus.domains.1.name = 'tokenizer': reserved for a file of the prepared corpus. "
        "Rename it."
    ),
    "corpus.domains.7.name=x": (
        "override = 'corpus.domains.7.name': corpus.domains is a list of 2: the index may be 0 "
        "to 2. Or set corpus.domains as a whole."
    ),
    "corpus.tokenizer={train: bpe}": (
        "corpus.tokenizer.vocab_size = (missing): required. Give a whole number from 258 to "
        "1,000,000. Tokens in the vocabulary, the end-of-text token among them."
    ),
    "mixer.weights={books: 0.5, code: 0.6}": (
        "mixer.weights = {'books': 0.5, 'code': 0.6}: the shares sum to 1.1, not 1. "
        "A sum within 0.01 of 1 is allowed. Divide each by 1.1. Or set relative: true for ratios."
    ),
    "mixer.weights={books: 0.5, coed: 0.5}": (
        "mixer.weights.coed = 0.5: no domain of the corpus has this name. Did you mean 'code'? "
        "Known: books, code."
    ),
    "data.max_epochs={books: 2, boks: 1}": (
        "data.max_epochs.boks = 1.0: no domain of the corpus has this name. "
        "Did you mean 'books'? Known: books, code."
    ),
    "cluster.workers=65": (
        "data.rows_per_step = 64: fewer rows than the 65 workers of cluster.workers. "
        "Every worker needs at least one row per step."
    ),
    "run.dir=runs/{day}": (
        "run.dir = 'runs/{day}': not a usable template. Only {name} and {seed} are filled in; "
        "a brace itself is written twice."
    ),
    "train.steps": (
        "override = 'train.steps': not a change of a field. "
        "Write FIELD=VALUE, e.g. train.steps=200."
    ),
    "train.betas=[0.9": (
        "train.betas = '[0.9': not valid YAML at line 2, column 1: while parsing a flow sequence; "
        "did not find expected ',' or ']'."
    ),
}

PIECES = [{"step": 0, "weights": {"books": 1}}, {"step": 5, "weights": {"code": 1}}]

FILES: dict[str, tuple[Any, str]] = {
    "not a mapping": (
        "- a\n",
        "recipe = 'r.yaml': the file holds a list, not a mapping. "
        "Write a new one with `raymix init FILE`.",
    ),
    "empty": (
        "# nothing\n",
        "recipe = 'r.yaml': the file is empty. Write a new one with `raymix init FILE`.",
    ),
    "syntax": (
        "name: a\n  seed: 1\n",
        "recipe = 'r.yaml': not valid YAML at line 2, column 7: "
        "mapping values are not allowed in this context.",
    ),
    "tab": (
        "corpus:\n\tpath: c\n",
        "recipe = 'r.yaml': not valid YAML at line 2, column 1: while scanning for the next token; "
        "found character that cannot start any token.",
    ),
    "key twice": (
        "train: {steps: 1}\nname: a\ntrain: {steps: 2}\n",
        "recipe = 'r.yaml': key 'train' is given twice, at lines 1 and 3.",
    ),
    "deep": (
        "[" * 1000,
        "recipe = 'r.yaml': nested more than 40 levels deep at line 1, column 41.",
    ),
    "endless": (
        "a: &a [*a]\n",
        "recipe = 'r.yaml': aliases repeat without end at line 1, column 4.",
    ),
    "tag": (
        "name: !!python/name:os.system\n",
        "recipe = 'r.yaml': name has the tag 'tag:yaml.org,2002:python/name:os.system', which "
        "recipes do not use.",
    ),
    "missing sections": (
        {"name": "a", "train": {"steps": 1}},
        "corpus = (missing): required. Give a mapping. "
        "Sources, tokenizer, and the prepared corpus.",
    ),
    "pieces out of order": (
        document(mixer={"kind": "schedule", "pieces": [PIECES[0], *PIECES[::-1]]}),
        "mixer.pieces.2.step = 0: not after the piece before it, at step 5.",
    ),
    "pieces start late": (
        document(mixer={"kind": "schedule", "pieces": PIECES[1:]}),
        "mixer.pieces.0.step = 5: the first piece must start at step 0.",
    ),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message(source: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("override", "expected"), OVERRIDES.items(), ids=OVERRIDES.keys())
def test_fields(here: Path, override: str, expected: str) -> None:
    write(here / "r.yaml")
    assert message("r.yaml", override) == expected


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES.keys())
def test_files(here: Path, content: Any, expected: str) -> None:
    write(here / "r.yaml", content)
    assert message("r.yaml") == expected


def test_paths(here: Path) -> None:
    write(here / "recipe.yaml")
    assert message("recpe.yaml") == (
        "recipe = 'recpe.yaml': no such file. Did you mean 'recipe.yaml'?"
    )
    (here / "sub").mkdir()
    assert message("sub") == "recipe = 'sub': a directory. Name the YAML file in it."
    assert message("a\0b") == "recipe = 'a\\x00b': cannot be read: embedded null byte."


def test_bytes_that_are_no_text(here: Path) -> None:
    (here / "r.yaml").write_bytes(b"name: a\nseed: \xff\n")
    assert message("r.yaml") == (
        "recipe = 'r.yaml': not UTF-8 text: byte 0xff at line 2. A recipe is a YAML file."
    )


def test_long_values_are_cut_short(here: Path) -> None:
    write(here / "r.yaml")
    text = message("r.yaml", f"train.steps={'x' * 500}")
    assert len(text) < 250
    assert "..." in text
