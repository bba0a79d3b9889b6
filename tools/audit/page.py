"""The page of an audit: the bins to check, with their photographs, and what people decide."""

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup
from PIL import Image

from stages.imaging import jpeg
from stages.networks.calibration import probability_columns
from stages.reporting.page import embedded, render
from stages.runtime.counts import AndMore
from stages.runtime.files import digest
from tools.audit.decisions import COLUMNS, Decision, fingerprint
from tools.audit.photographs import Content
from tools.audit.work_list import WorkList

TEMPLATE = Path(__file__).with_suffix(".html")
SCRIPT = Path(__file__).with_suffix(".js")
# The longer side in pixels, at which real photographs keep their details, and the JPEG quality:
# about 21 kB each.
LONGER_SIDE = 640
QUALITY = 75
# As many as are in sight when the page opens.
FIRST_PICTURES = 12
_NAME_LETTERS = 70
_ITEMS = 5
_EXAMPLES = 5
_VERDICTS = {
    "right": "record is right",
    "wrong": "record is wrong",
    "other_items": "record lists other items",
    "unclear": "cannot tell",
}

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
    #: Whether the items of records were judged too.
    items: bool = False
    #: The rows of rates_by_count for the validation bins.
    by_count: Sequence[Mapping[Any, Any]] = ()


class Picture(NamedTuple):
    """A small copy of a photograph as a data URL ("" if it cannot be read), and its fingerprint."""

    url: str
    fingerprint: str


def render_page(
    facts: Facts,
    table: pd.DataFrame,
    labels: Sequence[int],
    work: WorkList,
    pictures: Mapping[str, Picture],
    items: Items,
    carried: Sequence[Decision] = (),
) -> str:
    """The page that lists the bins of `work`.

    `table` is that of audit_table; `pictures` and `items` (as parsed) are by id. `carried` are
    earlier decisions that the page saves together with its own.
    """
    judged = table[table["alarm"] != ""]
    alarms = judged[judged["alarm"] == "yes"]
    rows = table.set_index("id", drop=False).loc[work.ids].to_dict("records")
    script = SCRIPT.read_text("utf-8")
    return render(
        TEMPLATE,
        percent=percent,
        facts=facts,
        judged=len(judged),
        alarms=len(alarms),
        expected_false=round(facts.false_alarm * len(judged)),
        open_alarms=int((~alarms["id"].isin(work.settled.keys())).sum()),
        unjudged=unjudged(table),
        work=work,
        drawn=len(work.ids) - len(work.flagged),
        bins=[card(row, labels, items, pictures) for row in rows],
        first_pictures=FIRST_PICTURES,
        verdicts=_VERDICTS,
        data=page_data(rows, work, pictures, carried),
        script=Markup(script),  # noqa: S704 - our own file
        script_hash=content_hash(script),
    )


def content_hash(script: str) -> str:
    """By which the page's Content-Security-Policy allows this script, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def page_data(
    rows: Sequence[Mapping[Any, Any]],
    work: WorkList,
    pictures: Mapping[str, Picture],
    carried: Sequence[Decision],
) -> dict[str, Any]:
    """What the page's script needs, in the words of decisions.csv."""
    parts = {"flagged": len(work.flagged), "other": work.others}
    bins = []
    for row in rows:
        bin_id = row["id"]
        part = "flagged" if bin_id in work.flagged else "other"
        bins.append(
            {
                "id": bin_id,
                "expected": int(row["expected"]),
                "photograph": pictures[bin_id].fingerprint if bin_id in pictures else "",
                "part": part,
                "part_bins": parts[part] if work.sampled else None,
                "flagged_at": work.flagged.get(bin_id),
            }
        )
    return {
        # The browser keeps decisions by it: another list must not show those about this one.
        "audit": f"audit-{digest(bins)[:12]}",
        "bins": bins,
        "parts": parts,
        "sampled": work.sampled,
        "first_pictures": FIRST_PICTURES,
        "columns": COLUMNS,
        "earlier": [decision._asdict() for decision in carried],
    }


def card(
    row: Mapping[Any, Any], labels: Sequence[int], items: Items, pictures: Mapping[str, Picture]
) -> dict[str, Any]:
    ordered = sorted(labels)
    shares = [row[column] for column in probability_columns(ordered)]
    listed = items.get(row["id"], [])
    return {
        "id": row["id"],
        "expected": row["expected"],
        "expected_label": label_of(row["expected"], ordered),
        "seen": next(label for label in ordered if label == row["seen"]),
        "probabilities": dict(zip(ordered, shares, strict=True)),
        "reason": row["reason"],
        "picture": pictures[row["id"]].url if row["id"] in pictures else "",
        "items": [describe_item(item) for item in listed[:_ITEMS]],
        "more_items": max(0, len(listed) - _ITEMS),
    }


def label_of(count: int, labels: Sequence[int]) -> int:
    """The label that a count belongs to, which is its own unless one stands for all above it."""
    return next(one for one in labels if one == count or (isinstance(one, AndMore) and count > one))


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


def make_pictures(contents: Iterable[Content]) -> dict[str, Picture]:
    """By id; photographs that can no longer be read are left out."""
    pictures = {}
    for content in contents:
        url = ""
        # The file may have changed since it was scored.
        with suppress(jpeg.ImageError):
            url = embedded("image/jpeg", make_copy(content.data))
        if not content.problem:
            pictures[content.id] = Picture(url, fingerprint(content.data))
    return pictures


def make_copy(data: bytes) -> bytes:
    """A copy that is encoded again, so that only the pixels of a file get into the page."""
    image = Image.fromarray(jpeg.decode(data))
    image.thumbnail((LONGER_SIDE, LONGER_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
