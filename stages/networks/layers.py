"""The layers of a network, in the order in which images pass through them."""

from collections.abc import Iterable
from itertools import takewhile

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# A child with a larger share of the weights is not a layer, but contains the layers.
MOST_OF_THE_WEIGHTS = 0.8


def layers_of(network: nn.Module, outputs: Iterable[nn.Module]) -> list[str]:
    """The names of a network's repeated parts, like layer1 to layer4 of a ResNet, or ViT's blocks.

    Networks of all libraries have a stem, a sequence of such parts, and a head. A child without
    children of its own, like a first convolution, belongs to the stem or the head. So does a batch
    normalization, which in timm may contain its activation. `outputs` are the layers that compute
    the scores, whose weights do not count.
    """
    ignored = {id(parameter) for layer in outputs for parameter in layer.parameters()}

    def weights(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if id(p) not in ignored)

    prefix, parent = "", network
    while True:
        parts = {
            prefix + name: child for name, child in _containers(parent).items() if weights(child)
        }
        nested = [name for name, part in parts.items() if _containers(part)]
        largest = max(nested, key=lambda name: weights(parts[name]), default="")
        if not largest:
            return [*parts]
        most = weights(parts[largest]) > MOST_OF_THE_WEIGHTS * weights(parent)
        if not most and len(nested) > 1:
            return [*parts]
        prefix, parent = f"{largest}.", parts[largest]


def _containers(module: nn.Module) -> dict[str, nn.Module]:
    """The children that have children of their own."""
    return {
        name: child
        for name, child in module.named_children()
        if [*child.children()] and not isinstance(child, _BatchNorm)
    }


def depths_of(
    network: nn.Module, layers: Iterable[str], outputs: Iterable[nn.Module]
) -> dict[str, int]:
    """How deep each parameter is: 0 in the stem, 1 in the first layer, and so on.

    What lies between two layers, like the batch normalization after a first convolution that is a
    layer, belongs to the first of them. What comes after the last layer is one deeper, and so are
    the `outputs`, wherever they are.
    """
    numbers = {f"{name}.": number for number, name in enumerate(layers, start=1)}
    depths, depth = {}, 0
    for name, _ in network.named_parameters():
        of_layer = (number for prefix, number in numbers.items() if name.startswith(prefix))
        depth = next(of_layer, depth)
        depths[name] = depth
    after_layers = takewhile(lambda name: not name.startswith((*numbers,)), reversed([*depths]))
    scores = {id(parameter) for layer in outputs for parameter in layer.parameters()}
    of_scores = [name for name, one in network.named_parameters() if id(one) in scores]
    return depths | dict.fromkeys([*after_layers, *of_scores], len(numbers) + 1)
