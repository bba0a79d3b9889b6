"""Opening the bucket of photographs and records, and saying what is wrong with it."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, S3Store

from stages.collecting.failures import StoreError
from stages.runtime import params
from stages.runtime.errors import UserError

RECORDS = "metadata/"
PHOTOGRAPHS = "bin-images/"
# Seconds: without a byte, and for a whole answer, which hundreds at once on a slow line need.
STALL_TIMEOUT = 5
ANSWER_TIMEOUT = 30

Store = S3Store | LocalStore


class Names(NamedTuple):
    """What messages call the settings of a bucket."""

    url: str = "bucket.url"
    endpoint: str = "bucket.endpoint"
    sign: str = "set bucket.anonymous to false"


def open_bucket(bucket: params.Bucket) -> Store:
    """Raises UserError where `bucket.url` is a folder that does not exist."""
    parts = urlsplit(bucket.url)
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        if not folder.is_dir():
            raise UserError(f"bucket.url: there is no folder {folder}")
        return LocalStore(folder)
    endpoint = bucket.endpoint or f"https://s3.{bucket.region}.amazonaws.com"
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        region=bucket.region,
        # Named for Amazon's own too, so that an AWS_ENDPOINT_URL meant for the DVC remote does not
        # apply here.
        endpoint=endpoint,
        skip_signature=bucket.anonymous,
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=STALL_TIMEOUT),
            "timeout": timedelta(seconds=ANSWER_TIMEOUT),
        },
        # The reader retries: it counts, and it knows what a right answer is.
        retry_config={"max_retries": 0},
    )


def explained(bucket: params.Bucket) -> AbstractContextManager[None]:
    """Turn what the store raises into a UserError that names the bucket and what to do."""
    place = bucket.url + (f" at {bucket.endpoint}" if bucket.endpoint else "")
    return explained_at(place, Names(), anonymous=bucket.anonymous)


@contextmanager
def explained_at(place: str, names: Names, *, anonymous: bool) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise UserError(f"{place} {error}") from None
    except InvalidPathError as error:
        raise UserError(
            f"{place} has an object whose key is not a path: {_first_line(error)}; remove it"
        ) from None
    except BaseError as error:
        raise UserError(f"{place} {_advice(error, names, anonymous=anonymous)}") from None


def _advice(error: BaseError, names: Names, *, anonymous: bool) -> str:
    # A listing raises its HTTP status inside a generic error, as text.
    text = str(error)
    if "<Code>NoSuchBucket</Code>" in text:
        return f"does not exist: check {names.url} and {names.endpoint}"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403 Forbidden" in text:
        if anonymous:
            return (
                f"refuses access: it does not allow anonymous reads; {names.sign}, and set"
                " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
            )
        return "refuses access: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return (
        f"cannot be read: {_first_line(error)}. Check {names.endpoint} and the network; the next"
        " run continues where this one stopped"
    )


def _first_line(error: BaseError) -> str:
    """The start of the error's text, which goes on with a dump of all its sources.

    Without what the server answered (XML), in which S3 repeats keys and session tokens.
    """
    text = re.split("<|Got invalid", str(error))[0].strip().partition("\n")[0].rstrip(": ")
    return text if len(text) <= 300 else text[:300] + "..."
