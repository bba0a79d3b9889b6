"""What a failure of the bucket means for the user, and what to do about it."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
)

from stages.collecting.failures import (
    CLOCK,
    EXPIRED,
    NO_CREDENTIALS,
    OTHER_REGION,
    UNSIGNED,
    UNTRUSTED,
    WRONG_CREDENTIALS,
    StoreError,
    code_of,
)
from stages.runtime import params
from stages.runtime.errors import UserError

_VARIABLES = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)"
_RESUME = "the next run continues where this one stopped"


class Names(NamedTuple):
    """What messages call the settings of a bucket."""

    url: str = "bucket.url"
    endpoint: str = "bucket.endpoint"
    sign: str = "set bucket.anonymous to false"
    region: str = "bucket.region"


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
            f"{place} has an object whose key is not a path: {_first_line(str(error))}; remove it"
        ) from None
    except BaseError as error:
        raise UserError(f"{place} {_advice(error, names, anonymous=anonymous)}") from None


def _advice(error: BaseError, names: Names, *, anonymous: bool) -> str:
    text, code = str(error), code_of(error)
    if known := _advice_by_code(text, names).get(code):
        return known
    proxy = "" if code else _proxy(text)
    # A listing raises its HTTP status inside a generic error, as text.
    denied = isinstance(error, PermissionDeniedError) or "403 Forbidden" in text
    if anonymous and (denied or code in UNSIGNED):
        return (
            f"refuses access: it does not allow anonymous reads; {names.sign}, and set"
            f" {_VARIABLES} in the environment{proxy}"
        )
    if denied:
        return f"refuses access: check {_VARIABLES}, and what they may read{proxy}"
    cause = _cause(text, code)
    return f"cannot be read: {cause}. Check {names.endpoint} and the network{proxy}; {_RESUME}"


def _advice_by_code(text: str, names: Names) -> dict[str, str]:
    """What to say of each code that says enough by itself."""
    refuses = "refuses access: the"
    region = f"is in another region than {names.region} says: {_right_region(text, names)}"
    expired = f"{refuses} credentials have expired. Renew them; {_RESUME}"
    unknown = f"{refuses} credentials are not valid there. Check {_VARIABLES} and {names.endpoint}"
    provider = _first_line(text).partition("provider: ")[2]
    return {
        "NoSuchBucket": f"does not exist: check {names.url} and {names.endpoint}",
        **dict.fromkeys(OTHER_REGION, region),
        **dict.fromkeys(EXPIRED, expired),
        **dict.fromkeys(WRONG_CREDENTIALS, unknown),
        CLOCK: f"{refuses} clock of this machine is wrong. Set it; {_RESUME}",
        NO_CREDENTIALS: f"cannot be asked without credentials, which AWS did not give: {provider}",
        UNTRUSTED: (
            "has a certificate that this machine does not trust. If your network has a certificate"
            " authority of its own, set SSL_CERT_FILE to its file, and for DVC's remote run `dvc"
            " remote modify --local storage ssl_verify FILE`"
        ),
    }


def _right_region(text: str, names: Names) -> str:
    """Answers to signed requests name the bucket's region, redirects have it in a header."""
    region = re.search("<Region>([a-z0-9-]{1,40})</Region>", text)
    if region:
        return f"set {names.region} to {region[1]}"
    return f"set {names.region} to the one that `curl -sI {_requested(text)}` shows"


def _proxy(text: str) -> str:
    """Where the environment sends this request through a proxy, its name and the way around it."""
    url = urlsplit(_requested(text))
    proxies = getproxies_environment()
    scheme = url.scheme if url.scheme in proxies else "all"
    if scheme not in proxies or proxy_bypass(url.netloc):
        return ""
    # Without its user and password.
    proxy = proxies[scheme].rpartition("@")[2].rpartition("://")[2]
    return (
        f", and the proxy {proxy} that {scheme.upper()}_PROXY names (a host in NO_PROXY is reached"
        f" without it: NO_PROXY={url.hostname})"
    )


def _requested(text: str) -> str:
    """The URL of the request that failed, without its query."""
    url = re.search(r"performing \w+ (https?://[^\s?]+)", text)
    return url[1] if url else ""


def _cause(text: str, code: str) -> str:
    """What the server or the operating system said; the latter is in the dump of sources."""
    line = _first_line(text).rpartition(" - ")[2]
    if "status code" in text:
        return f"{line} ({code})" if code else line
    for field in ("message", "error"):
        if said := re.search(rf'\b{field}: "([^"\n]{{1,200}})"', text):
            return said[1]
    return line


def _first_line(text: str) -> str:
    """The start of the error's text, before a dump of all its sources.

    Without what the server answered (XML), in which S3 repeats keys and session tokens.
    """
    line = re.split("<|Got invalid", text)[0].strip().partition("\n")[0].rstrip(": ")
    return line if len(line) <= 300 else line[:300] + "..."
