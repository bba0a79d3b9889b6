"""Downloads from the Hugging Face hub. No other module of this package imports its client."""

import logging
import re
from pathlib import Path

import huggingface_hub

from stages.networks.model_files import CONFIG, WEIGHTS
from stages.runtime.errors import UserError

# Its warnings about retries contain signed URLs, which give anybody access to a file.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def download_model(repository: str, revision: str, folder: Path) -> str:
    """Download config.json and model.safetensors of a repository, byte for byte.

    The client resumes an interrupted download from a hidden folder beside them. Returns the URL of
    the revision. Raises UserError if a file could not be downloaded.
    """
    for name in (CONFIG, WEIGHTS):
        try:
            huggingface_hub.hf_hub_download(repository, name, revision=revision, local_dir=folder)
        # The client raises errors of its own, of its HTTP library and of the system.
        except Exception as error:  # noqa: BLE001
            reason = _without_secrets(str(error).strip().partition("\n")[0])
            raise UserError(
                f"{name} of {repository} at {revision} could not be downloaded: {reason}"
            ) from None
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}/tree/{revision}"


def _without_secrets(text: str) -> str:
    """Remove signatures of URLs, and the user's token, which a server may repeat in its answer."""
    text = re.sub(r"(https?://[^\s?]*)\?[^\s'\"]*", r"\1", text)
    token = huggingface_hub.get_token()
    return text.replace(token, "***") if token else text
