"""Opening the bucket of photographs and records."""

from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.store import LocalStore, S3Store

from stages.collecting.credentials import Credentials
from stages.runtime import params
from stages.runtime.errors import UserError

RECORDS = "metadata/"
PHOTOGRAPHS = "bin-images/"
# Seconds without a byte, and for a whole answer: on a slow line, hundreds of them share it.
STALL_TIMEOUT = 5
ANSWER_TIMEOUT = 30

Store = S3Store | LocalStore


def open_bucket(bucket: params.Bucket) -> Store:
    """Raises UserError if there is no such folder, or no credentials to sign requests with."""
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
        # Set for Amazon too, so that an AWS_ENDPOINT_URL meant for the DVC remote has no effect.
        endpoint=endpoint,
        skip_signature=bucket.anonymous,
        credential_provider=None if bucket.anonymous else Credentials(),
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=STALL_TIMEOUT),
            "timeout": timedelta(seconds=ANSWER_TIMEOUT),
        },
        # The reader retries instead: it counts retries, and checks the answers.
        retry_config={"max_retries": 0},
    )
