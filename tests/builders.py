"""Small objects for several tests: params, bins of colored squares, tiny networks."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from ruamel.yaml import YAML
from torch import Tensor, nn

from stages.formats.shards import IMAGES, shard_name, write_table
from stages.imaging.loader import Bins, open_bins, pack_bins
from stages.networks import inference
from stages.networks.classifier import Classifier, build_classifier
from stages.runtime.params import ModelParams, load_params
from stages.training import engine

REPOSITORY = Path(__file__).parent.parent
SIZE = 32
TINY_VIT: dict[str, Any] = {
    "model_type": "vit",
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TINY_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
TINY_CONVNEXT: dict[str, Any] = {
    "model_type": "convnext",
    "num_stages": 2,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}
# One per quantity, so different that even a tiny network tells them apart.
COLORS = [(220, 40, 40), (40, 200, 60), (50, 60, 220), (230, 210, 40), (200, 60, 210)]


#: Settings by which a training has all the state that a checkpoint keeps: averaged weights, those
#: of the best epoch, and every random change of the images.
ALL_STATE: dict[str, Any] = {
    "train.vit.ema_decay": 0.9,
    "train.vit.color_jitter": 0.2,
    "train.vit.rotation": 5.0,
    "train.vit.shift": 0.05,
    "train.vit.blur": 1.0,
    "train.vit.side_by_side": 0.2,
    "train.vit.keep": "best",
}


def model_params(model: str, /, **settings: Any) -> ModelParams:
    """The repository's params of a model, with some of them changed."""
    block = load_params(REPOSITORY / "params.yaml").model(model)
    return ModelParams.model_validate(block.model_dump() | settings)


def write_params(folder: Path, changes: Mapping[str, Any]) -> None:
    """Write params.yaml into `folder`, with changes by dotted key, like train.vit.seed."""
    yaml = YAML(typ="safe", pure=True)
    values = yaml.load(REPOSITORY / "params.yaml")
    for key, value in changes.items():
        *parents, last = key.split(".")
        block = values
        for parent in parents:
            block = block[parent]
        block[last] = value
    yaml.dump(values, folder / "params.yaml")


def square(quantity: int, seed: int) -> bytes:
    """A JPEG in the quantity's color, a little different for each seed, and darker on one side."""
    chance = np.random.default_rng([quantity, seed])
    pixels = np.empty((SIZE, SIZE, 3))
    pixels[:] = COLORS[(quantity - 1) % len(COLORS)] + chance.uniform(-35, 35, 3)
    pixels[:, : SIZE // 2] *= 0.7
    pixels += chance.uniform(-12, 12, pixels.shape)
    return as_jpeg(pixels.clip(0, 255).astype(np.uint8))


def noise(quantity: int, seed: int) -> bytes:
    """A JPEG of noise, on which no gradient is 0: Adam would turn rounding into a step."""
    chance = np.random.default_rng([quantity, seed])
    return as_jpeg(chance.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def as_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pillow_pixels(data: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def bin_rows(
    quantities: Sequence[int], render: Callable[[int, int], bytes] = square
) -> list[dict[str, Any]]:
    """One bin for each quantity, with the ids 00001 and up."""
    return [
        {"id": f"{number:05d}", "quantity": quantity, "image": render(quantity, number)}
        for number, quantity in enumerate(quantities, start=1)
    ]


def write_resized(folder: Path, rows: Sequence[dict[str, Any]], shard_bins: int = 5) -> None:
    """Write the rows as shards, like those of data/resized."""
    for number, start in enumerate(range(0, len(rows), shard_bins)):
        table = pa.Table.from_pylist(list(rows[start : start + shard_bins]), IMAGES)
        write_table(folder / shard_name(number), table)


def write_split(
    path: Path, sets: Mapping[str, str], groups: Mapping[str, str] | None = None
) -> None:
    """Write a data/split.csv. `sets` has each id's set, and `groups` the groups of siblings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    group = [(groups or {}).get(bin_id, bin_id) for bin_id in sets]
    columns = {"id": list(sets), "set": list(sets.values()), "group": group}
    pd.DataFrame(columns).to_csv(path, index=False)


def make_bins(
    folder: Path, quantities: Sequence[int], render: Callable[[int, int], bytes] = square
) -> Bins:
    """Bins of colored squares, written to files in `folder` and packed."""
    rows = bin_rows(quantities, render)
    write_resized(folder / "resized", rows)
    write_split(folder / "split.csv", {row["id"]: "train" for row in rows})
    (folder / "work").mkdir()
    pack_bins(folder / "resized", folder / "split.csv", ["train"], SIZE, folder / "work")
    return open_bins(folder / "work", "train", SIZE)


def tiny_network(labels: int) -> nn.Module:
    """One convolution, whose output differs for flipped images."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(64, labels)
    )


def full_network(labels: int) -> nn.Module:
    """A network with batch normalization, which makes a bias before it superfluous, and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 8, stride=8, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, labels),
    )


class Filling(torch.autograd.Function):
    """The identity, whose gradient has memory for only `most` images."""

    @staticmethod
    def forward(context: Any, images: Tensor, most: int) -> Tensor:
        context.most = most
        return images.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        refuse(len(gradient), context.most)
        return gradient, None


def refuse(images: int, most: int) -> None:
    if images > most:
        raise torch.OutOfMemoryError(f"{images} images")


class Large(nn.Module):
    """A network with memory for `most` images per pass, after `easy` batches of any size."""

    def __init__(self, labels: int, most: int, *, backward: bool, easy: int = 0) -> None:
        super().__init__()
        self.first, *rest = tiny_network(labels).children()
        self.rest = nn.Sequential(*rest)
        self.most = most
        self.backward = backward
        self.easy = easy

    def forward(self, images: Tensor) -> Any:
        hidden = self.first(images)
        self.easy -= self.training
        if self.easy >= 0:
            return self.rest(hidden)
        if self.backward:
            hidden = Filling.apply(hidden, self.most)
        else:
            refuse(len(images), self.most)
        return self.rest(hidden)


def tiny_classifier(
    labels: list[int], make_network: Callable[[int], nn.Module] = tiny_network
) -> Classifier:
    """A classifier whose random weights are always the same."""
    torch.manual_seed(0)
    network = make_network(len(labels))
    return Classifier(network, labels, SIZE, [0.53, 0.45, 0.36], [0.17, 0.15, 0.11])


def random_classifier(
    settings: ModelParams, labels: Sequence[int] = (1, 2, 3, 4, 5), seed: int = 0
) -> Classifier:
    """The network of `settings` with random weights, since no folder has pretrained ones."""
    torch.manual_seed(seed)
    return build_classifier(settings, Path("nowhere"), list(labels), SIZE)


def noise_images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def logits(classifier: Classifier) -> Tensor:
    classifier.network.eval()
    with torch.inference_mode():
        return classifier.logits(noise_images())


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's state."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def close(some: Mapping[str, Tensor], others: Mapping[str, Tensor], tolerance: float) -> bool:
    """Whether all numbers are equal up to the tolerance."""
    return some.keys() == others.keys() and all(
        torch.allclose(value, others[name], rtol=0, atol=tolerance) for name, value in some.items()
    )


def equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether all numbers are equal bit by bit."""
    return some.keys() == others.keys() and all(
        torch.equal(value, others[name]) for name, value in some.items()
    )


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Use one thread: small tensors gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in float32 even on a bfloat16 processor, for comparisons to many digits."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (engine, inference):
            patch.setattr(
                module,
                "autocast",
                lambda device, _: torch.autocast(device.type, enabled=False),
            )
        yield
