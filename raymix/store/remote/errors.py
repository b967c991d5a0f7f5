"""What a store behind a URL has against being used, told from what its errors say."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from raymix.errors import StorageError, UnreachableError

# Words by which errors are told apart: pyarrow raises one type for all that a store answers.
_NO_BUCKET = ("NO_SUCH_BUCKET", "NoSuchBucket", "Bucket '")
_FORBIDDEN = (
    *("ACCESS_DENIED", "AccessDenied", "INVALID_ACCESS_KEY_ID", "InvalidAccessKeyId"),
    *("SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "ExpiredToken", "INVALID_CLIENT_TOKEN_ID"),
    *("MISSING_AUTHENTICATION_TOKEN", "HTTP status 401", "HTTP status 403", "Permission denied"),
)
_SILENT = (
    *("NETWORK_CONNECTION", "curlCode", "Could not connect", "Could not resolve", "timed out"),
    *("REQUEST_TIMEOUT", "SERVICE_UNAVAILABLE", "SLOW_DOWN", "INTERNAL_FAILURE", "THROTTLING"),
)
_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

_Result = TypeVar("_Result")


def is_remote(url: str) -> bool:
    """Return whether `url` names a store rather than a path of this machine."""
    return "://" in url and not url.startswith("file://")


def storage_errors(url: str, error: BaseException, field: str = "path") -> StorageError | None:
    """Return what an error says of the store behind `url`; None if it is not the store's.

    Args:
        url: What was asked for.
        error: What the file system raised.
        field: What holds the URL, for the message.
    """
    if not is_remote(url) or not isinstance(error, OSError) or _is_absence(error):
        return None
    said = " ".join(str(error).split())
    if any(word in said for word in _NO_BUCKET):
        return StorageError.at(field, url, "there is no such bucket", fix="Make it first")
    if isinstance(error, PermissionError) or any(word in said for word in _FORBIDDEN):
        return StorageError.at(
            field,
            url,
            "the store does not allow it",
            fix="See to the rights, and to the credentials in the environment of every node",
        )
    silent = isinstance(error, ConnectionError | TimeoutError)
    if silent or any(word in said for word in _SILENT):
        return UnreachableError.at(
            field,
            url,
            "the store does not answer",
            fix="See to the network, and to AWS_ENDPOINT_URL where the store is not Amazon's",
        )
    if "AWS Error" in said or "google::cloud" in said:
        return StorageError.at(field, url, f"the store refuses: {said[:300]}")
    return None


def _is_absence(error: OSError) -> bool:
    return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)


@contextlib.contextmanager
def translate_storage_errors(url: str, field: str = "path") -> Iterator[None]:
    """Raise what the store behind `url` has against being used as a StorageError."""
    try:
        yield
    except OSError as error:
        raise storage_errors(url, error, field) or error from error


def with_retries(work: Callable[[], _Result]) -> _Result:
    """Return what `work` does, tried again for half a minute while the store does not answer.

    Raises:
        UnreachableError: If it does not answer for that long.
    """
    for delay in _DELAYS_S:
        try:
            return work()
        except UnreachableError:
            time.sleep(delay)
    return work()
