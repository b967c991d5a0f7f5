"""Conversations: only answers are learned, from the file to the loss."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

import raymix
from raymix.corpus import prepare
from raymix.corpus.chats.messages import Conversation
from raymix.corpus.chats.template import CHATML, ChatTemplate, TemplateRefused
from raymix.errors import CorpusError, RecipeError
from raymix.recipe import CorpusConfig, load_recipe
from raymix.recipe.training import DocumentData
from raymix.sampling import MixtureEntry, MixtureLog
from raymix.store import Corpus
from raymix.streaming.sequences.step_plans import StepPlans
from raymix.training.evaluate.held_out import held_out_rows
from raymix.training.step.probing import ProbeReader
from tests.support.chats import UNMARKED, chat_config, chat_corpus, sums, write_chats
from tests.support.shell import write_recipe
from tests.support.step_plans import CONFIG, start
from tests.support.streams import fixed, local, local_stream

SPECIAL = {"bos_token": "<s>"}
DATA = DocumentData(mode="documents", sequence_length=96, tokens_per_step=512)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return chat_corpus(tmp_path_factory.mktemp("chats"))


def stream_of(corpus: Corpus, domain: str, split: str) -> np.ndarray:
    count = corpus.split(domain, split).blocks
    return np.concatenate([b.tokens for b in corpus.read_blocks(domain, split, range(count))])


def documents(corpus: Corpus, domain: str, split: str = "train") -> list[tuple[int, int]]:
    ends = np.cumsum(corpus.document_lengths(domain, split)).tolist()
    return list(pairwise([0, *ends]))


def decoded(corpus: Corpus, tokens: np.ndarray) -> str:
    tokenizer = Tokenizer.from_file(f"{corpus.tokenizer_path}/tokenizer.json")
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def answers(chat: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in chat if message["role"] == "assistant"]


@pytest.mark.parametrize("source", [CHATML, CHATML.replace("{% generation %}", "").replace(
    "{% endgeneration %}", ""), UNMARKED])  # fmt: skip
def test_answers_are_found_with_marks_and_without(source: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    for chat in sums(12):
        (example,) = template.examples(Conversation(tuple(chat)))
        passages = [example.text[first:last] for first, last in example.spans]
        assert len(passages) == len(answers(chat))
        for said, answer in zip(passages, answers(chat), strict=True):
            assert said.startswith(answer)
            assert said[len(answer) :].strip() in {"<|im_end|>", ";"}


def test_threads_may_render_at_once() -> None:
    template, chats = ChatTemplate(CHATML, {}), [Conversation(tuple(chat)) for chat in sums(200)]
    alone = [template.examples(chat) for chat in chats]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(template.examples, chats)) == alone


@pytest.mark.parametrize("tokenizer", [
    "byte", {"train": "bpe", "vocab_size": 400, "sample_bytes": 20_000}
])  # fmt: skip
def test_the_loss_mask_tokens_are_the_answers(tmp_path: Path, tokenizer: Any) -> None:
    chats = sums(80)
    corpus = chat_corpus(tmp_path, chats, tokenizer=tokenizer)
    said: list[str] = []
    for split in ("train", "valid"):
        loss_mask = corpus.loss_mask("chat", split)
        assert loss_mask is not None
        tokens = stream_of(corpus, "chat", split)
        for first, last in documents(corpus, "chat", split):
            mask = loss_mask.mask(first, last)
            assert not mask[0]
            assert mask[-1], "the end of the conversation is learned with its last answer"
            edges = np.flatnonzero(np.diff(mask[:-1], prepend=False, append=False))
            said += [
                decoded(corpus, tokens[first:last][a:b]) for a, b in edges.reshape(-1, 2).tolist()
            ]
    expected = [f"{answer}<|im_end|>" for chat in chats for answer in answers(chat)]
    assert sorted(said) == sorted(expected)
    assert corpus.loss_mask("text", "train") is None


def test_a_batch_counts_and_marks_what_is_loss_mask(corpus: Corpus) -> None:
    stream = local_stream(corpus, local(fixed([0.5, 0.5]), corpus), DATA)
    plans = StepPlans(corpus, DATA, CONFIG)
    even = MixtureEntry(0, 0, (0.5, 0.5), "fixed")
    plans.reset(start(corpus), MixtureLog(corpus.domain_names, [even]).entries, 6)
    counts = {True: 0, False: 0}
    for step in range(6):
        batch = stream.next()
        labels = 0
        for document in chain.from_iterable(batch.micro_batches):
            chat = document.loss_mask is not None
            counts[chat] += 1
            labels += int(document.loss_mask.sum()) if chat else len(document.tokens) - 1
        planned = plans.plan(step).for_rank(0)
        assert batch.label_tokens == labels == planned.label_tokens
        assert batch.batch_hash == planned.batch_hash
    assert min(counts.values()) > 0


def test_held_out_and_probed_rows_are_masked(corpus: Corpus) -> None:
    rows = held_out_rows(corpus, sequence_length=64, rows_per_domain=3)
    assert rows.loss_mask is not None
    chat, text = rows.loss_mask[rows.domain_B == 0], rows.loss_mask[rows.domain_B == 1]
    assert text.all()
    assert 0 < chat.mean() < 0.9
    loss_mask = corpus.loss_mask("chat", "valid")
    assert loss_mask is not None
    assert chat.ravel().tolist() == loss_mask.mask(0, chat.size).tolist()
    reader = ProbeReader(corpus, sequence_length=64, seed=3)
    domain_B = np.array([0, 1])
    probed = reader.rows(domain_B, np.array([2, 2]))
    assert probed.loss_mask is not None
    assert 0 < probed.loss_mask[0].mean() < 0.9
    assert probed.loss_mask[1].all()


def test_a_run_learns_answers_and_its_held_out_loss_is_of_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = chat_config(tmp_path, sums(200))
    model = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    recipe = raymix.Recipe.model_validate(
        {
            "name": "chats",
            "corpus": config.model_dump(mode="json"),
            "data": DATA.model_dump(mode="json"),
            "mixer": {"kind": "uniform"},
            "model": {"type": "llama", "config": model},
            "train": {"steps": 30, "lr": 1e-2},
            "eval": {"rows_per_domain": 4},
            "cluster": {"workers": 0},
        }
    )
    raymix.prepare(config, parallelism=0)
    raymix.train(recipe)
    corpus = Corpus.open(config.path)
    checkpoint = sorted((tmp_path / "runs/chats/checkpoints").glob("step-*"))[-1]
    assert direct_loss(corpus, checkpoint) == pytest.approx(last_loss(tmp_path), rel=1e-4)


def last_loss(root: Path) -> float:
    from raymix.training.run.rundir import read_metrics

    lines = read_metrics(root / "runs/chats/metrics.jsonl")
    return [line for line in lines if "eval" in line][-1]["eval"]["chat"]["loss"]


def direct_loss(corpus: Corpus, checkpoint: Path) -> float:
    """Return the loss of the answers in the first held-out rows, without any of raymix."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokens = stream_of(corpus, "chat", "valid").astype(np.int64)
    loss_mask = corpus.loss_mask("chat", "valid")
    assert loss_mask is not None
    starts = [first for first, _ in documents(corpus, "chat", "valid")]
    nats = count = 0.0
    for first in range(0, 4 * 96, 96):
        inside = [s for s in starts if first < s < first + 96]
        for a, b in pairwise([first, *inside, first + 96]):
            mask = torch.from_numpy(loss_mask.mask(a, b)[1:])
            piece = torch.from_numpy(tokens[a:b])[None]
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            nats += float(cross_entropy(logits[mask], piece[0, 1:][mask], reduction="sum"))
            count += int(mask.sum())
    return nats / count


def test_parquet_and_other_keys_hold_conversations_too(tmp_path: Path) -> None:
    chats = sums(40)
    other = [
        [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]}
         for m in chat if m["role"] != "system"]
        for chat in chats
    ]  # fmt: skip
    pq.write_table(pa.table({"talk": chats}), tmp_path / "a.parquet")
    domains = [
        {"name": "a", "train": str(tmp_path / "a.parquet"), "messages_column": "talk"},
        {"name": "b", "train": write_chats(tmp_path / "b.jsonl", other, "conversations"),
         "messages_column": "conversations"},
    ]  # fmt: skip
    corpus = chat_corpus(tmp_path, domains=domains)
    loss_mask = [corpus.split(name, "train").loss_tokens for name in "ab"]
    held_out = [corpus.split(name, "valid").loss_tokens for name in "ab"]
    assert loss_mask[0] + held_out[0] == loss_mask[1] + held_out[1] > 0


def texts(corpus: Corpus, domain: str = "chat") -> list[str]:
    return [
        decoded(corpus, stream_of(corpus, domain, split)[first:last])
        for split in ("train", "valid")
        for first, last in documents(corpus, domain, split)
    ]


CALLS = (
    "{% if tools %}{{ '<tools>' + tools | tojson + '</tools>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '[' + message.role + '] ' }}{% if message.tool_calls %}"
    "{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "{% else %}{{ message.content }}{% endif %}{{ ' ;\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def calling(number: int) -> list[dict[str, Any]]:
    arguments = {"city": f"Paris {number}"} if number % 2 else {"when": number}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "31"},
        {"role": "assistant", "content": f"answer {number}"},
    ]


TOOLS = [
    {"name": "f", "description": "Weather"},
    {"name": "g", "parameters": {"type": "object"}},
]


@pytest.mark.parametrize("form", ["struct", "json", "jsonl", "sharegpt"])
def test_calls_and_tools_are_those_of_the_row(tmp_path: Path, form: str) -> None:
    """Arrow gives every row the keys of all; what the model is to say has its own only."""
    rows: list[dict[str, Any]] = [{"messages": calling(n), "tools": TOOLS} for n in range(60)]
    source = str(tmp_path / "a.parquet")
    if form == "json":
        rows = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    if form == "sharegpt":
        speakers = ("human", "function_call", "observation", "gpt")
        for row in rows:
            row["messages"] = [
                {"from": speaker, "value": m.get("content") or json.dumps(
                    m["tool_calls"][0]["function"])}
                for speaker, m in zip(speakers, row["messages"], strict=True)
            ]  # fmt: skip
    if form == "jsonl":
        source = str(tmp_path / "a.jsonl")
        Path(source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), source)
    (tmp_path / "own.jinja").write_text(CALLS)
    domains = [{"name": "chat", "train": source, "messages_column": "messages"}]
    corpus = chat_corpus(tmp_path, domains=domains, chat_template=str(tmp_path / "own.jinja"))
    head = (
        '<tools>[{"name": "f", "description": "Weather"}, '
        '{"name": "g", "parameters": {"type": "object"}}]</tools>\n'
    )
    wanted = set()
    for n in range(60):
        arguments = f'{{"city": "Paris {n}"}}' if n % 2 else f'{{"when": {n}}}'
        wanted.add(
            f"{head}[user] question {n} ;\n"
            f'[assistant] {{"name": "f", "arguments": {arguments}}} ;\n'
            f"[tool] 31 ;\n[assistant] answer {n} ;\n<|endoftext|>"
        )
    assert set(texts(corpus)) == wanted


def test_a_tools_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": sums(9)}), tmp_path / "a.parquet")
    domains = [{"name": "a", "train": str(tmp_path / "a.parquet"), "messages_column": "messages",
                "tools_column": "functions"}]  # fmt: skip
    with pytest.raises(CorpusError, match=r"a\.tools_column = 'functions'"):
        chat_corpus(tmp_path, domains=domains)


def test_tools_may_be_left_out(tmp_path: Path) -> None:
    rows = [{"messages": chat, "tools": "a hammer"} for chat in sums(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    domain = {"name": "chat", "train": str(tmp_path / "a.parquet"), "messages_column": "messages"}
    with pytest.raises(CorpusError, match=r"not a list of schemas \(tools_column: false leaves"):
        chat_corpus(tmp_path, domains=[domain])
    path = str(tmp_path / "without")
    corpus = chat_corpus(tmp_path, domains=[{**domain, "tools_column": False}], path=path)
    assert len(texts(corpus)) == 40
    with pytest.raises(RecipeError, match=r"tools_column = True: not text"):
        load_recipe(
            write_recipe(tmp_path / "r.yaml", corpus__domains=[{**domain, "tools_column": True}])
        )


def test_bad_conversations_are_rejected_by_reason(tmp_path: Path) -> None:
    bad = [
        [{"role": "user"}], "hello", [], [1], None,
        [{"role": "user", "content": "and no answer"}],
        [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}],
    ]  # fmt: skip
    corpus = chat_corpus(tmp_path, [*sums(30), *bad])
    reasons = corpus.manifest.domains["chat"].rejected_by_reason
    assert {reason.partition(" (")[0]: count for reason, count in reasons.items()} == {
        "not a list of messages": 4,
        "no answer to learn": 1,
        "chat template: it knows no role 'narrator'": 1,
        "a content part of type 'image', and only text is read": 1,
    }


def test_conversations_without_an_answer_are_left_out_and_no_fault(tmp_path: Path) -> None:
    silent = [[{"role": "user", "content": f"{n}"}] for n in range(20)]
    unlearned = [
        [{**message, "weight": 0, "content": f"{n} {message['content']}"} for message in chat]
        for n, chat in enumerate(sums(5))
    ]
    chats = [*sums(30), *silent, *unlearned]
    corpus = chat_corpus(tmp_path / "..", chats, path=str(tmp_path / "some"), max_rejected=0)
    info = corpus.manifest.domains["chat"]
    assert info.rejected_by_reason == {"no answer to learn": 25}
    assert info.train.documents + info.valid.documents == 30
    with pytest.raises(CorpusError, match=r"no document of domain 'chat' is left to use"):
        chat_corpus(tmp_path, silent, max_rejected=0)


def test_half_characters_are_repaired_and_counted(tmp_path: Path) -> None:
    """JSON of a text that was cut within an emoji."""
    half = [{"role": "user", "content": "a \ud83d"}, {"role": "assistant", "content": "b \ude00"}]
    corpus = chat_corpus(tmp_path, [*sums(30), half])
    wanted = "<|im_start|>user\na \ufffd<|im_end|>\n<|im_start|>assistant\nb \ufffd<|im_end|>\n"
    assert f"{wanted}<|endoftext|>" in texts(corpus)
    assert corpus.manifest.domains["chat"].repaired == 1


THINKING = (
    "{% for message in messages %}{{ '[' + message.role + '] ' }}"
    "{% if message.role == 'assistant' and not loop.last %}"
    "{{ message.content.split('</think>')[-1] }}{% else %}{{ message.content }}{% endif %}"
    "{{ ' ;\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
"""A template that drops the reasoning of earlier turns."""


def test_a_conversation_becomes_the_examples_of_inference_in_one_split(tmp_path: Path) -> None:
    chats = [
        [
            {"role": "user", "content": f"q{n}"},
            {"role": "assistant", "content": f"<think>x</think>a{n}"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": f"<think>y</think>b{n}"},
        ]
        for n in range(40)
    ]
    (tmp_path / "own.jinja").write_text(THINKING)
    own = str(tmp_path / "own.jinja")
    corpus = chat_corpus(tmp_path, chats, chat_template=own, valid_fraction=0.3)
    splits = {}
    for split in ("train", "valid"):
        tokens, loss_mask = stream_of(corpus, "chat", split), corpus.loss_mask("chat", split)
        assert loss_mask is not None
        for first, last in documents(corpus, "chat", split):
            document = decoded(corpus, tokens[first:last])
            learned = decoded(corpus, tokens[first:last][loss_mask.mask(first, last)])
            splits[document] = split, learned
    for n in range(40):
        first = f"[user] q{n} ;\n[assistant] <think>x</think>a{n} ;\n<|endoftext|>"
        second = (
            f"[user] q{n} ;\n[assistant] a{n} ;\n[user] again ;\n"
            f"[assistant] <think>y</think>b{n} ;\n<|endoftext|>"
        )
        assert splits[first][1] == f"<think>x</think>a{n} ;\n<|endoftext|>"
        assert splits[second][1] == f"<think>y</think>b{n} ;\n<|endoftext|>"
        assert splits[first][0] == splits[second][0]
    assert len(splits) == 80
    assert {split for split, _ in splits.values()} == {"train", "valid"}


def test_the_date_is_part_of_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + UNMARKED)
    own = str(tmp_path / "own.jinja")
    first = chat_corpus(tmp_path, chat_template=own)
    assert all(text.startswith("26 Jul 2024 ") for text in texts(first))
    with pytest.raises(CorpusError, match=r"corpus\.chat_date = '2031-05-04'"):
        chat_corpus(tmp_path, chat_template=own, chat_date="2031-05-04")
    path = str(tmp_path / "later")
    later = chat_corpus(tmp_path, chat_template=own, chat_date="2031-05-04", path=path)
    assert all(text.startswith("04 May 2031 ") for text in texts(later))
    assert later.fingerprint != first.fingerprint
    with pytest.raises(RecipeError, match=r"corpus\.chat_date = 'today': not a date"):
        load_recipe(write_recipe(tmp_path / "r.yaml", corpus__chat_date="today"))


@pytest.mark.parametrize(("changes", "words"), [
    ({"chat_template": None}, "corpus.chat_template = None: the tokenizer has no chat template"),
    ({"chat_template": "/nowhere/x.jinja"}, "corpus.chat_template = '/nowhere/x.jinja': cannot"),
])  # fmt: skip
def test_a_template_that_is_not_there(tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(CorpusError) as caught:
        chat_corpus(tmp_path, **changes)
    assert words in str(caught.value)


def test_another_template_prepares_anew(tmp_path: Path) -> None:
    first = chat_corpus(tmp_path / "..", path=str(tmp_path / "one")).fingerprint
    (tmp_path / "own.jinja").write_text(UNMARKED.replace("{{ bos_token }}", ""))
    own = str(tmp_path / "own.jinja")
    second = chat_corpus(tmp_path, path=str(tmp_path / "two"), chat_template=own)
    assert second.fingerprint != first
    saved = Path(second.tokenizer_path, "chat_template.jinja").read_text()
    assert saved == Path(own).read_text()


@pytest.mark.parametrize(("domain", "words"), [
    ({"messages_column": "m"}, "corpus.domains.0.messages_column = 'm': rows that are cut"),
    ({"messages_column": "m", "tokens_column": "t"}, "tokens_column = 't' is given as well"),
    ({"messages_column": "m", "format": "text"}, "plain text has no columns"),
    ({"tools_column": "t"}, "tools belong to conversations, and messages_column is not given"),
])  # fmt: skip
def test_recipes_that_cannot_be_are_refused(tmp_path: Path, domain: Any, words: str) -> None:
    domains = [{"name": "a", "train": "x.jsonl", **domain}]
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path / "r.yaml", corpus__domains=domains))
    assert words in str(caught.value)


def test_a_corpus_of_conversations_is_not_packed(corpus: Corpus, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", corpus={"path": corpus.path}, mixer={"kind": "uniform"}
    )
    with pytest.raises(RecipeError, match=r"data\.mode = 'packed': 'chat' has a loss mask"):
        raymix.plan(load_recipe(recipe))


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    corpus = chat_corpus(tmp_path)
    file = Path(corpus.path, "chat/train/loss_mask.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorpusError, match=r"chat/train/loss_mask\.arrow is corrupt"):
        Corpus.open(corpus.path).loss_mask("chat", "train")


def test_templates_are_text_of_the_recipe_only(tmp_path: Path) -> None:
    """A template is run in a sandbox: it reaches nothing of Python."""
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(TemplateRefused):
        template.examples(Conversation(({"role": "user", "content": "x"},)))
    assert CorpusConfig.model_validate({"path": str(tmp_path)}).chat_template is None


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
def test_a_system_column_is_read_from_files(tmp_path: Path, form: str) -> None:
    rows = [
        {
            "conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}],
            "system": f"Rule {n}." if n % 2 else None,
        }
        for n in range(40)
    ]
    path = tmp_path / f"x.{form}"
    table = pa.Table.from_pylist(rows)
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    for given, expected in ((None, {f"Rule {n}." for n in range(1, 40, 2)}), (False, set())):
        domain = {"name": "x", "train": str(path), "messages_column": "conversations"}
        changes = {
            "path": str(tmp_path / str(given)),
            "domains": [domain | {"system_column": given}],
        }
        config = chat_config(tmp_path, [], **changes)
        prepare(config, parallelism=0)
        made = Corpus.open(config.path)
        text = "".join(decoded(made, stream_of(made, "x", split)) for split in ("train", "valid"))
        assert set(re.findall(r"<\|im_start\|>system\n(.*?)<", text)) == expected
    absent = chat_config(
        tmp_path, [], path=str(tmp_path / "n"), domains=[domain | {"system_column": "prompt"}]
    )
    with pytest.raises(CorpusError, match=r"x\.system_column|no 'prompt' key"):
        prepare(absent, parallelism=0)
