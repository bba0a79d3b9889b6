"""AWS credentials for the bucket, found by boto3 as for DVC's remote."""

from datetime import timedelta
from typing import Any

from botocore.exceptions import BotoCoreError
from obstore.auth.boto3 import Boto3CredentialProvider

from stages.runtime.errors import UserError

# botocore renews credentials some minutes before they expire, so obstore asks for them often.
_ASKED_AGAIN = timedelta(minutes=2)


class Credentials(Boto3CredentialProvider):
    """From environment variables, AWS_PROFILE, SSO, or the role of a container or instance."""

    def __init__(self) -> None:
        """Raises UserError if there are none."""
        try:
            super().__init__(ttl=_ASKED_AGAIN)
        except (BotoCoreError, ValueError) as error:
            reason = error if isinstance(error, BotoCoreError) else "there are none"
            raise UserError(
                f"AWS credentials: {reason}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
                " AWS_PROFILE, or log in (aws sso login)"
            ) from None
        # Without the session's region: the bucket's own is in params.yaml.
        self.config = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Each machine of a cluster finds its own, which it can renew."""
        return Credentials, ()
