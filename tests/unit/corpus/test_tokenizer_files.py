"""Directories without a tokenizer.json: refused with the command that writes one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from raymix.corpus.tokenizers.tokenizer import byte_tokenizer, load_pretrained
from raymix.errors import CorpusError
from raymix.recipe import PretrainedTokenizer

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "the"]


def refusal(directory: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        load_pretrained(PretrainedTokenizer(path=str(directory)))
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "BertTokenizer"])
def test_the_command_writes_the_tokenizer_that_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "tok"
    directory.mkdir()
    if kind == "GPT2Tokenizer":
        byte_tokenizer().model.save(str(directory))
    else:
        (directory / "vocab.txt").write_text("\n".join(BERT))
    settings = {"tokenizer_class": kind, "eos_token": "[SEP]" if kind[0] == "B" else "a"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    code = re.search(r'Write one by: python -c "(.*?)", and name tok-fast', refusal(directory))
    assert code is not None
    exec(code[1], {})
    loaded = load_pretrained(PretrainedTokenizer(path="tok-fast"))
    reference = AutoTokenizer.from_pretrained(str(directory))
    assert loaded.info.vocab_size == len(reference)
    again = AutoTokenizer.from_pretrained("tok-fast")
    text = "hello worlds the"
    assert again(text)["input_ids"] == reference(text)["input_ids"]


def test_a_sentencepiece_model_needs_its_library_first(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    assert "Write one by: pip install sentencepiece protobuf tiktoken && python -c" in refusal(
        tmp_path
    )


def test_a_vocabulary_alone_does_not_say_how_texts_are_split(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT))
    assert "vocab.txt does not say how texts are split: get the tokenizer_config.json" in refusal(
        tmp_path
    )
