"""Small made things that several tests need: params, bins of coloured squares, tiny networks."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from ruamel.yaml import YAML
from torch import nn

from stages.core.loader import Bins, load_bins
from stages.core.networks import Classifier
from stages.core.params import Model, load_params
from stages.core.shards import IMAGES, shard_name, write_table

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
# One per quantity, far apart, so that even a tiny network tells them.
COLORS = [(220, 40, 40), (40, 200, 60), (50, 60, 220), (230, 210, 40), (200, 60, 210)]


def model_knobs(model: str, /, **knobs: Any) -> Model:
    """The repository's train block of that model, with some of its knobs changed."""
    block = load_params(REPOSITORY / "params.yaml").model(model)
    return Model.model_validate(block.model_dump() | knobs)


def write_params(folder: Path, changes: Mapping[str, Any]) -> None:
    """The repository's params.yaml in `folder`; `changes` has dotted keys, like train.vit.seed."""
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
    """A JPEG in the quantity's colour, a little different for each seed, darker on one side."""
    chance = np.random.default_rng([quantity, seed])
    pixels = np.empty((SIZE, SIZE, 3))
    pixels[:] = COLORS[(quantity - 1) % len(COLORS)] + chance.uniform(-35, 35, 3)
    pixels[:, : SIZE // 2] *= 0.7
    pixels += chance.uniform(-12, 12, pixels.shape)
    return as_jpeg(pixels.clip(0, 255).astype(np.uint8))


def as_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pillow_pixels(data: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def bin_rows(quantities: Sequence[int]) -> list[dict[str, Any]]:
    """A bin of each quantity, with the ids 00001 and up."""
    return [
        {"id": f"{number:05d}", "quantity": quantity, "image": square(quantity, number)}
        for number, quantity in enumerate(quantities, start=1)
    ]


def write_resized(folder: Path, rows: Sequence[dict[str, Any]], shard_bins: int = 5) -> None:
    """The rows as the shards of data/resized."""
    for number, start in enumerate(range(0, len(rows), shard_bins)):
        table = pa.Table.from_pylist(list(rows[start : start + shard_bins]), IMAGES)
        write_table(folder / shard_name(number), table)


def write_split(path: Path, sets: Mapping[str, str]) -> None:
    """data/split.csv; `sets` has the set of each id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"id": list(sets), "set": list(sets.values())}).to_csv(path, index=False)


def make_bins(folder: Path, quantities: Sequence[int]) -> Bins:
    """Bins of coloured squares, through files in `folder`."""
    rows = bin_rows(quantities)
    write_resized(folder / "resized", rows)
    write_split(folder / "split.csv", {row["id"]: "train" for row in rows})
    return load_bins(folder / "resized", folder / "split.csv", "train")


def tiny_network(labels: int) -> nn.Module:
    """One convolution whose output keeps left and right apart, so that a flip changes it."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(64, labels)
    )


def tiny_classifier(labels: list[int]) -> Classifier:
    network = tiny_network(len(labels))
    return Classifier(network, labels, SIZE, [0.53, 0.45, 0.36], [0.17, 0.15, 0.11])
