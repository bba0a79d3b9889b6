"""Synthetic bins: a bucket in the real layout, with rendered photographs and known counts."""

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFilter

# The real bucket's percentages of bins with 0, 1, ... 6 items, and with 7 or more.
QUANTITY_WEIGHTS = [2, 8, 14, 17, 15, 12, 9, 23]
SIBLING_SHARE = 0.35
WALLS = [(222, 176, 58), (214, 168, 66), (205, 160, 52)]
PAPER = [(168, 44, 50), (36, 74, 138), (28, 112, 74), (236, 232, 222), (110, 62, 132), (52, 52, 58)]
NAMES = ["Oil Filter", "Paperback", "Phone Case", "Tea, 20 bags", "Sun Catcher", "HDMI Cable"]


class SyntheticBin(NamedTuple):
    """One bin of the bucket: bin-images/<id>.jpg and metadata/<id>.json."""

    id: str
    quantity: int
    photograph: bytes
    record: bytes


@dataclass(frozen=True)
class Item:
    """An item in the bin. Its position and size are shares of the bin's width and height."""

    asin: str
    x: float
    y: float
    width: float
    height: float
    color: tuple[int, int, int]
    shape: str


def synthetic_bins(count: int, seed: int) -> Iterator[SyntheticBin]:
    """Bins 00001 to `count`. Some are siblings: consecutive ids that differ by one item.

    Every hundredth id has an un-padded twin, which is an independent bin.
    """
    chance = random.Random(seed)
    items: list[Item] = []
    for number in range(1, count + 1):
        if items and chance.random() < SIBLING_SHARE:
            items = _pick_or_stow(items, chance)
        else:
            items = _fill(_quantity(chance), chance)
        yield _render(f"{number:05d}", items, chance)
        if number % 100 == 0 and number < 10_000:
            yield _render(str(number), _fill(_quantity(chance), chance), chance)


def _quantity(chance: random.Random) -> int:
    return chance.choices(range(len(QUANTITY_WEIGHTS)), QUANTITY_WEIGHTS)[0]


def _pick_or_stow(items: list[Item], chance: random.Random) -> list[Item]:
    """The same bin a moment later. At least one item stays, so that both records share an ASIN."""
    if len(items) > 1 and chance.random() < 0.5:
        gone = chance.randrange(len(items))
        return items[:gone] + items[gone + 1 :]
    return [*items, _new_item(chance, items)]


def _fill(quantity: int, chance: random.Random) -> list[Item]:
    items: list[Item] = []
    for _ in range(quantity):
        items.append(_new_item(chance, items))
    if len(items) > 1 and chance.random() < 0.2:  # two of one kind
        twin = replace(items[0], x=items[1].x, y=items[1].y)
        items[1] = twin
    return items


def _new_item(chance: random.Random, others: list[Item]) -> Item:
    """An item at the one of twelve random positions where it hides the others least."""
    width, height = chance.uniform(0.17, 0.24), chance.uniform(0.24, 0.34)
    item = Item(
        asin=f"B{chance.randrange(10**9):09d}",
        x=0,
        y=0,
        width=width,
        height=height,
        color=chance.choice(PAPER),
        shape=chance.choice(["box", "book", "bottle"]),
    )
    positions = [
        (chance.uniform(0.08, 0.92 - width), chance.uniform(0.1, 0.9 - height)) for _ in range(12)
    ]
    x, y = min(positions, key=lambda at: sum(_overlap(at, item, other) for other in others))
    return replace(item, x=x, y=y)


def _overlap(at: tuple[float, float], item: Item, other: Item) -> float:
    across = min(at[0] + item.width, other.x + other.width) - max(at[0], other.x)
    down = min(at[1] + item.height, other.y + other.height) - max(at[1], other.y)
    return max(0.0, across) * max(0.0, down)


def _render(bin_id: str, items: list[Item], chance: random.Random) -> SyntheticBin:
    width, height = chance.randint(260, 380), chance.randint(230, 320)
    image = Image.new("RGB", (width, height), (92, 74, 52))
    draw = ImageDraw.Draw(image)
    _draw_walls(draw, width, height, chance.choice(WALLS))
    for item in sorted(items, key=lambda item: item.y):
        _draw_item(draw, item, width, height)
    image = Image.alpha_composite(image.convert("RGBA"), _tape(width, height, chance))
    image = image.convert("RGB").filter(ImageFilter.GaussianBlur(chance.uniform(0.3, 0.9)))
    light = chance.uniform(0.75, 1.0)
    image = image.point([round(value * light) for value in range(256)] * 3)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    record = json.dumps(_record(bin_id, items), indent=4, sort_keys=True).encode()
    return SyntheticBin(bin_id, len(items), buffer.getvalue(), record)


def _draw_walls(
    draw: ImageDraw.ImageDraw, width: int, height: int, color: tuple[int, int, int]
) -> None:
    side, top = width * 0.07, height * 0.08
    shade = tuple(value * 3 // 4 for value in color)
    draw.polygon([(0, 0), (side, top), (side, height - top), (0, height)], fill=color)
    draw.polygon(
        [(width, 0), (width - side, top), (width - side, height - top), (width, height)], fill=color
    )
    draw.polygon(
        [(0, height), (side, height - top), (width - side, height - top), (width, height)],
        fill=shade,
    )
    draw.polygon([(0, 0), (side, top), (width - side, top), (width, 0)], fill=shade)


def _draw_item(draw: ImageDraw.ImageDraw, item: Item, width: int, height: int) -> None:
    left, top = item.x * width, item.y * height
    right, bottom = left + item.width * width, top + item.height * height
    edge = tuple(value // 2 for value in item.color)
    across, down = right - left, bottom - top
    if item.shape == "bottle":
        draw.rectangle(
            (left + across * 0.35, top, right - across * 0.35, top + down * 0.25), fill=edge
        )
        draw.rounded_rectangle(
            (left, top + down * 0.2, right, bottom),
            across * 0.25,
            fill=item.color,
            outline=edge,
            width=2,
        )
    else:
        draw.rectangle((left, top, right, bottom), fill=item.color, outline=edge, width=2)
    label = (left + across * 0.2, top + down * 0.45, right - across * 0.2, top + down * 0.7)
    draw.rectangle(label, fill=(245, 243, 236))
    if item.shape == "book":
        draw.line((left + across * 0.1, top, left + across * 0.1, bottom), fill=edge, width=2)
    for line in range(3):
        y = label[1] + (line + 1) * (label[3] - label[1]) / 4
        draw.line((label[0] + 3, y, label[2] - 3, y), fill=(90, 90, 90), width=1)


def _tape(width: int, height: int, chance: random.Random) -> Image.Image:
    """Translucent strips, like the elastic bands and the tape that hold items in a pod."""
    layer = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for _ in range(chance.randint(1, 3)):
        y, slope, thick = (
            chance.uniform(0.2, 0.9) * height,
            chance.uniform(-15, 15),
            chance.randint(5, 12),
        )
        draw.line((0, y, width, y + slope), fill=(235, 238, 240, 110), width=thick)
    return layer


def _record(bin_id: str, items: list[Item]) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    for item in items:
        if item.asin in contents:
            contents[item.asin]["quantity"] += 1
            continue
        name = f"{item.shape.title()}, {NAMES[int(item.asin[-2:]) % len(NAMES)]}"
        contents[item.asin] = {
            "asin": item.asin,
            "height": {"unit": "IN", "value": round(10 * item.height, 3)},
            "length": {"unit": "IN", "value": round(10 * item.width, 3)},
            "name": name,
            "normalizedName": name,
            "quantity": 1,
            "weight": None if item.shape == "bottle" else {"unit": "pounds", "value": 0.5},
            "width": {"unit": "IN", "value": 1.0},
        }
    record: dict[str, Any] = {"BIN_FCSKU_DATA": contents, "EXPECTED_QUANTITY": len(items)}
    if len(bin_id) < 5:
        record["image_fname"] = f"{bin_id}.jpg"
    return record
