"""AWS credentials for the bucket: what boto3 finds, as for DVC's remote."""

from datetime import timedelta
from typing import Any

from botocore.exceptions import BotoCoreError
from obstore.auth.boto3 import Boto3CredentialProvider

from stages.runtime.errors import UserError

# botocore renews credentials some minutes before they expire; obstore asks for them so often.
_ASKED_AGAIN = timedelta(minutes=2)


class Credentials(Boto3CredentialProvider):
    """From variables, AWS_PROFILE, SSO, a container or an instance's role."""

    def __init__(self) -> None:
        """Raises UserError where there are none."""
        try:
            super().__init__(ttl=_ASKED_AGAIN)
        except (BotoCoreError, ValueError) as error:
            reason = error if isinstance(error, BotoCoreError) else "there are none"
            raise UserError(
                f"AWS credentials: {reason}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
                " AWS_PROFILE, or log in (aws sso login)"
            ) from None
        # Not the session's region: the bucket's own is in params.yaml.
        self.config = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Another machine of a cluster finds its own, which can be renewed there."""
        return Credentials, ()
