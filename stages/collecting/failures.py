"""What a failed request means: a fault of the object, of the store, or of this machine."""

import errno
import os
import re

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, S3Store

#: Errors of this machine, not of the file: they stop the stage, because any file may be next.
MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}
#: S3 codes that every other request would get, too, however often it is sent.
OTHER_REGION = {
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
CLOCK = "RequestTimeTooSkewed"
WRONG_CREDENTIALS = {
    "AuthFailure",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "InvalidToken",
    "NotSignedUp",
    "SignatureDoesNotMatch",
}
#: For requests without a signature; the last is rclone's.
UNSIGNED = {"MissingAuthenticationToken", "MissingSecurityHeader", "UnsupportedAlgorithm"}
#: Codes of our own, for failures before any request is sent.
NO_CREDENTIALS = "NoCredentials"
UNTRUSTED = "UntrustedCertificate"
_ALIKE_FOR_ALL = {
    *OTHER_REGION,
    *EXPIRED,
    CLOCK,
    *WRONG_CREDENTIALS,
    *UNSIGNED,
    NO_CREDENTIALS,
    UNTRUSTED,
}
# What can be wrong with a single file; every other error of a disk is the machine's.
_FILE_ERRORS = {
    errno.ENOENT: "not found",
    errno.EACCES: "access denied",
    errno.EPERM: "access denied",
    errno.ENOTDIR: "not found",
    errno.EISDIR: "a folder",
    errno.ELOOP: "a loop of links",
    errno.ENAMETOOLONG: "its name is too long",
}


class ObjectError(Exception):
    """One object cannot be read as it was listed; the text says why."""


class RefusedError(ObjectError):
    """The store refuses this request; the reader finds out whether it refuses all others."""


class DamagedError(ObjectError):
    """The content is not what was listed; retries are counted by `kind`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class TransientError(Exception):
    """The request failed, but may succeed later; `error` is obstore's own."""

    def __init__(self, kind: str, error: BaseError) -> None:
        super().__init__(kind)
        self.kind = kind
        self.error = error


class StoreError(Exception):
    """Nothing can be read any more; the text says why, and follows the bucket's name."""


def failure_of(
    error: BaseError | FileNotFoundError, store: S3Store | LocalStore, key: str
) -> Exception:
    """What to raise instead of obstore's error, whose text repeats the server's answer.

    RefusedError or TransientError; OSError if this machine is at fault; or obstore's own error if
    every other request would fail in the same way.
    """
    text = str(error)
    numbers = [int(number) for number in re.findall(r"(?:os error |\bcode: )(\d+)", text)]
    for number in numbers:
        if number in MACHINE_ERRORS:
            return OSError(number, os.strerror(number), key)
    if isinstance(error, FileNotFoundError):
        return RefusedError("not found")
    code = code_of(error)
    if code in _ALIKE_FOR_ALL:
        return error
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return RefusedError("access denied" if code in {"", "AccessDenied"} else f"refused: {code}")
    if isinstance(store, LocalStore):
        return _failure_of_file(numbers[0] if numbers else errno.EIO, key)
    return _failure_of_request(error, re.search(r"status code: (\d{3})", text), code)


def code_of(error: Exception) -> str:
    """The S3 code in the server's answer, one of this module's codes, or ""."""
    text = str(error)
    if found := re.search(r"<Code>([A-Za-z0-9.]{1,64})</Code>", text):
        return found[1]
    if "redirect without LOCATION" in text:
        return "PermanentRedirect"
    if "External AWS credential provider" in text:
        return NO_CREDENTIALS
    return UNTRUSTED if "InvalidCertificate(" in text else ""


def _failure_of_file(number: int, key: str) -> Exception:
    if number in _FILE_ERRORS:
        return RefusedError(_FILE_ERRORS[number])
    return OSError(number, os.strerror(number), key)


def _failure_of_request(error: BaseError, status: re.Match[str] | None, code: str) -> Exception:
    if status is None:
        return TransientError("network error", error)
    # 408 and 429 invite another attempt, as 5xx do.
    if status[1].startswith("4") and status[1] not in {"408", "429"}:
        return RefusedError(" ".join(["refused request", status[1], code]).rstrip())
    return TransientError(f"server error {status[1]}", error)
