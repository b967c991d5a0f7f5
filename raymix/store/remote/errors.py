"""Translate object-store errors: missing bucket, no permission, no answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from raymix.errors import RaymixError, StorageError, UnreachableError

# pyarrow raises OSError for whatever a store answers, so only the text tells errors apart.
_NO_BUCKET = ("NO_SUCH_BUCKET", "NoSuchBucket", "Bucket '")
_FORBIDDEN = (
    *("ACCESS_DENIED", "AccessDenied", "INVALID_ACCESS_KEY_ID", "InvalidAccessKeyId"),
    *("SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "ExpiredToken", "INVALID_CLIENT_TOKEN_ID"),
    *("MISSING_AUTHENTICATION_TOKEN", "HTTP status 401", "HTTP status 403", "Permission denied"),
)
_NO_ANSWER = (
    *("NETWORK_CONNECTION", "curlCode", "Could not connect", "Could not resolve", "timed out"),
    *("REQUEST_TIMEOUT", "SERVICE_UNAVAILABLE", "SLOW_DOWN", "INTERNAL_FAILURE", "THROTTLING"),
)
# What file systems behind fsspec are made with; their errors need not be OSErrors.
_NETWORK_LIBRARIES = frozenset(
    {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "botocore", "huggingface_hub"}
)
# Half a minute in all: longer than a store's failover, shorter than a user's patience.
_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

# Variables that say where a store is.
_ENDPOINTS = {
    "s3": "AWS_ENDPOINT_URL if the store is not Amazon's",
    "hf": "HF_ENDPOINT and HF_HUB_OFFLINE",
}

_Result = TypeVar("_Result")


def is_remote(url: str) -> bool:
    """Return whether `url` names a store rather than a path of this machine."""
    return "://" in url and not url.startswith("file://")


def of_network(error: BaseException) -> bool:
    """Return whether an error comes from a library that talks to servers."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & _NETWORK_LIBRARIES)


def storage_errors(url: str, error: BaseException, field: str = "path") -> StorageError | None:
    """Return the storage error behind another one; None if it is not the store's.

    Args:
        url: The URL accessed.
        error: The error that the file system raised.
        field: Recipe field that holds the URL, for the message.
    """
    # Absence has a meaning of its own to callers, local or not.
    if not is_remote(url) or isinstance(error, RaymixError) or _is_absence(error):
        return None
    if not isinstance(error, OSError) and not of_network(error):
        return None
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", 0))
    # Messages of stores hold line breaks.
    text = " ".join(str(error).split())
    # Before permissions: some stores deny access to a bucket that does not exist, and name it.
    if any(word in text for word in _NO_BUCKET):
        return StorageError.at(field, url, "no such bucket", fix="Create the bucket first")
    forbidden = isinstance(error, PermissionError) or status in (401, 403)
    if forbidden or any(word in text for word in _FORBIDDEN):
        return StorageError.at(
            field,
            url,
            "the store denies access",
            fix="Check permissions, and the credentials in the environment of every node",
        )
    no_answer = isinstance(error, ConnectionError | TimeoutError) or (
        of_network(error) and (not status or status == 429 or status >= 500)
    )
    if no_answer or any(word in text for word in _NO_ANSWER):
        variable = _ENDPOINTS.get(url.partition("://")[0])
        return UnreachableError.at(
            field,
            url,
            "the store does not answer",
            fix=f"Check the network{f', and {variable}' if variable else ''}",
        )
    if "AWS Error" in text or "google::cloud" in text or of_network(error):
        return StorageError.at(field, url, f"the store answers with an error: {text[:300]}")
    return None


def _is_absence(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)


@contextlib.contextmanager
def translate_storage_errors(url: str, field: str = "path") -> Iterator[None]:
    """Raise errors of the store behind `url` as StorageErrors."""
    try:
        yield
    except Exception as error:
        if known := storage_errors(url, error, field):
            raise known from error
        raise


def with_retries(work: Callable[[], _Result]) -> _Result:
    """Return the result of `work`, retried for half a minute while the store does not answer.

    Raises:
        UnreachableError: If the store does not answer within that time.
    """
    for delay in _DELAYS_S:
        try:
            return work()
        except UnreachableError:
            time.sleep(delay)
    return work()
