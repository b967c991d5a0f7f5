"""Names of the Hub in messages and cards, and network errors of whatever library as ours."""

from __future__ import annotations

import httpx2
import pytest
import requests

from raymix.cli._run import explain
from raymix.errors import StorageError, UnreachableError
from raymix.store.remote.errors import storage_errors
from raymix.store.remote.hub import HubRepo, hub_name, model_repo

COMMIT = "0123456789" * 4


def test_a_directory_of_the_cache_has_its_name_and_commit() -> None:
    path = f"/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/{COMMIT}"
    assert hub_name(path) == f"Qwen/Qwen3-0.6B@{COMMIT}"
    assert hub_name(f"models--gpt2/snapshots/{COMMIT}/") == f"gpt2@{COMMIT}"
    assert hub_name("/models/Qwen/Qwen3-0.6B") is None


def test_what_to_download_is_a_command() -> None:
    assert HubRepo("gpt2").download == "hf download gpt2"
    dataset = HubRepo("some/texts", "v1", kind="dataset")
    assert dataset.download == "hf download some/texts --repo-type dataset --revision v1"
    assert model_repo("hf://gpt2", None, "model.path") == HubRepo("gpt2", field="model.path")
    for other in ("/gpt2", "gpt2", "s3://bucket/model", "hf://datasets/a/b"):
        assert model_repo(other, None, "model.path") is None


def answer(status: int) -> httpx2.HTTPStatusError:
    request = httpx2.Request("GET", "https://example.org")
    return httpx2.HTTPStatusError("no", request=request, response=httpx2.Response(status))


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (httpx2.ConnectError("refused"), UnreachableError, "does not answer"),
        (requests.ConnectTimeout("slow"), UnreachableError, "does not answer"),
        (answer(503), UnreachableError, "does not answer"),
        (answer(403), StorageError, "denies access"),
        (answer(410), StorageError, "answers with an error"),
    ],
)
def test_errors_of_the_network_are_storage_errors(
    error: Exception, kind: type[StorageError], says: str
) -> None:
    ours = storage_errors("hf://datasets/a/b/c.parquet", error, "corpus.domains.0.train")
    assert type(ours) is kind
    assert says in str(ours)
    assert str(ours).startswith("corpus.domains.0.train = 'hf://datasets/a/b/c.parquet': ")
    # Where nobody translated it, it is bad input all the same.
    name, problems, code = explain(error)
    assert code == 2
    assert name == type(error).__name__
    assert "Check the network" in problems[0]


def test_other_errors_are_left_alone() -> None:
    assert storage_errors("hf://a/b", ValueError("no")) is None
    assert storage_errors("hf://a/b", FileNotFoundError("no")) is None
    assert storage_errors("/a/b", ConnectionError("no")) is None
