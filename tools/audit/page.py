"""The page of an audit: the flagged bins with their photographs, the most suspicious first."""

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from stages.imaging import jpeg
from stages.networks.calibration import probability_columns
from stages.reporting.page import embedded, render
from tools.audit.photographs import Content

TEMPLATE = Path(__file__).with_suffix(".html")
# The longer side in pixels, and the JPEG quality: about 12 kB each.
THUMBNAIL = 320
QUALITY = 75
_NAME_LETTERS = 70
_ITEMS = 5
_EXAMPLES = 5

Items = Mapping[str, list[dict[str, Any]]]


class Facts(NamedTuple):
    """What the page says about the audit as a whole."""

    photographs: str
    expected: str
    models: list[str]
    validation_bins: int
    false_alarm: float
    #: Bins of the training set: those left out, and those that were audited all the same.
    left_out: int = 0
    trained_on: int = 0
    warning: str = ""
    #: The rows of rates_by_count for the validation bins.
    by_count: Sequence[Mapping[Any, Any]] = ()


def render_page(
    facts: Facts,
    table: pd.DataFrame,
    labels: Sequence[int],
    top: int,
    thumbnails: Mapping[str, str],
    items: Items,
) -> str:
    """`table` is that of audit_table; `thumbnails` (URLs) and `items` (as parsed) are by id."""
    judged = table[table["alarm"] != ""]
    alarms = table[table["alarm"] == "yes"]
    return render(
        TEMPLATE,
        percent=percent,
        facts=facts,
        judged=len(judged),
        alarms=len(alarms),
        expected_false=round(facts.false_alarm * len(judged)),
        unjudged=unjudged(table),
        bins=[card(row, labels, items) for row in alarms[:top].to_dict("records")],
        thumbnails=thumbnails,
    )


def card(row: Mapping[Any, Any], labels: Sequence[int], items: Items) -> dict[str, Any]:
    ordered = sorted(labels)
    shares = [row[column] for column in probability_columns(ordered)]
    listed = items.get(row["id"], [])
    return {
        "id": row["id"],
        "expected": row["expected"],
        "seen": row["seen"],
        "probabilities": dict(zip(ordered, shares, strict=True)),
        "items": [describe_item(item) for item in listed[:_ITEMS]],
        "more_items": max(0, len(listed) - _ITEMS),
    }


def describe_item(item: Mapping[str, Any]) -> str:
    """Like "2 x Tea, 20 bags", on one line and shortened."""
    name = " ".join((item["name"] or item["asin"]).split())
    if len(name) > _NAME_LETTERS:
        name = name[: _NAME_LETTERS - 1].rstrip() + "…"
    return name if item["quantity"] is None else f"{item['quantity']} x {name}"


def unjudged(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Each reason with its number of bins and a few examples, the most frequent first."""
    reasons = table[table["alarm"] == ""].groupby("reason")["id"].agg(list)
    rows = [
        {"reason": reason, "bins": len(ids), "examples": ids[:_EXAMPLES]}
        for reason, ids in reasons.items()
    ]
    return sorted(rows, key=lambda row: (-row["bins"], row["reason"]))


def percent(share: float) -> str:
    """In whole percent; 0% and 100% only if they are exact. A missing share is a dash."""
    if share != share:  # noqa: PLR0124 - NaN
        return "-"
    if 0 < share < 0.01:
        return "<1%"
    if 0.99 < share < 1:
        return ">99%"
    return f"{share:.0%}"


def make_thumbnails(contents: Iterable[Content]) -> dict[str, str]:
    """Small copies by id, as data URLs; photographs that can no longer be read are left out."""
    thumbnails = {}
    for content in contents:
        # The file may have changed since it was scored.
        with suppress(jpeg.ImageError):
            thumbnails[content.id] = embedded("image/jpeg", make_thumbnail(content.data))
    return thumbnails


def make_thumbnail(data: bytes) -> bytes:
    """Encoded again, so that nothing but the pixels of a file gets into the page."""
    image = Image.fromarray(jpeg.decode(data))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
