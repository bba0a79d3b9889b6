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
# Seconds: without a byte, and for a whole answer, which hundreds at once on a slow line need.
STALL_TIMEOUT = 5
ANSWER_TIMEOUT = 30

Store = S3Store | LocalStore


def open_bucket(bucket: params.Bucket) -> Store:
    """Raises UserError where there is no such folder, or no credentials to sign requests with."""
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
        credential_provider=None if bucket.anonymous else Credentials(),
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=STALL_TIMEOUT),
            "timeout": timedelta(seconds=ANSWER_TIMEOUT),
        },
        # The reader retries: it counts, and it knows what a right answer is.
        retry_config={"max_retries": 0},
    )
