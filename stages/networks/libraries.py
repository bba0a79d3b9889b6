"""The libraries that provide networks; there is a module for each.

A module is imported when it is first used, because the libraries take seconds to import.
"""

from pathlib import Path
from typing import Protocol

from torch import nn

from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams


class Library(Protocol):
    """The functions of a library's module.

    They raise ValueError and whatever the library raises; callers turn that into advice.
    """

    def download(self, params: ModelParams, folder: Path) -> str:
        """Download the pretrained weights to `folder`, as config.json and model.safetensors.

        Returns the URL of their source. Raises UserError if they could not be downloaded.
        """

    def build(
        self, params: ModelParams, pretrained: Path, labels: list[int], size: int
    ) -> nn.Module:
        """A network for images of `size` pixels, with one output per label.

        Its weights are those in the folder `pretrained` if `params.pretrained`, else random.
        """

    def save(
        self, network: nn.Module, params: ModelParams, labels: list[int], folder: Path
    ) -> None:
        """Write config.json, with the labels, and model.safetensors."""

    def load(self, folder: Path, labels: list[int]) -> nn.Module:
        """The network that `save` wrote, with all its weights."""


def library_of(name: str) -> Library:
    """Raises UserError if the library is not installed, since timm is optional."""
    if name == "torchvision":
        from stages.networks import torchvision_models  # noqa: PLC0415 - imported when used

        return torchvision_models
    if name == "timm":
        try:
            from stages.networks import timm_models  # noqa: PLC0415 - imported when used
        except ModuleNotFoundError as error:
            if error.name != "timm":
                raise
            raise UserError(
                "the library timm is not installed: `make setup` installs it, and so does"
                " `pip install timm`"
            ) from None
        return timm_models
    from stages.networks import transformers_models  # noqa: PLC0415 - imported when used

    return transformers_models
