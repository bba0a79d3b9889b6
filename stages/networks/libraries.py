"""The libraries that networks come from, each in a module of its own.

Such a module is imported when it is first used: the libraries take seconds to import.
"""

from pathlib import Path
from typing import Protocol

from torch import nn

from stages.runtime.params import ModelParams


class Library(Protocol):
    """What a library's module does.

    Its functions raise whatever the library raises, and ValueError; callers say what to do.
    """

    def download(self, model: ModelParams, folder: Path) -> str:
        """Put config.json and model.safetensors of the pretrained weights into `folder`.

        Returns the URL they are from. Raises UserError where they could not be downloaded.
        """

    def build(
        self, model: ModelParams, pretrained: Path, labels: list[int], size: int
    ) -> nn.Module:
        """A network for images of `size` pixels, with an output for each label.

        Its weights are those in the folder `pretrained` if the model asks for them, else random.
        """

    def save(self, network: nn.Module, model: ModelParams, labels: list[int], folder: Path) -> None:
        """Write config.json, with the labels, and model.safetensors."""

    def load(self, folder: Path, labels: list[int]) -> nn.Module:
        """The network that `save` wrote, with all of its weights."""


def library_of(name: str) -> Library:
    if name == "torchvision":
        from stages.networks import torchvision_models  # noqa: PLC0415 - imported when used

        return torchvision_models
    from stages.networks import transformers_models  # noqa: PLC0415 - imported when used

    return transformers_models
