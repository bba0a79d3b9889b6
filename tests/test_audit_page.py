"""The page of an audit, also in a browser."""

import base64
import hashlib
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.browser import DESKTOP, PHONE, Browser, running_browser
from tests.conftest import image_file, picture
from tests.test_report import Page
from tools.audit.decisions import Decision
from tools.audit.expected import Expected
from tools.audit.page import (
    SCRIPT,
    Facts,
    Items,
    describe_item,
    make_pictures,
    percent,
    render_page,
)
from tools.audit.photographs import Content
from tools.audit.table import audit_table
from tools.audit.work_list import WorkList, make_list
from tools.synthetic import synthetic_bins

LABELS = [1, 2, 3, 4, 5]
THRESHOLD = 0.03217
BY_COUNT = [
    {"quantity": label, "threshold": THRESHOLD, "false_alarms": 0.05, "found": 0.2}
    for label in LABELS
]
FACTS = Facts("s3://bins", "counts.csv", ["resnet34", "vit"], 9900, 0.05, by_count=BY_COUNT)


def item(name: str | None, quantity: int | None = 1, asin: str = "B000") -> dict[str, Any]:
    return {"name": name, "quantity": quantity, "asin": asin}


def audited() -> pd.DataFrame:
    """A table with three alarms, one correct bin, and three bins that were not judged."""
    scores: dict[str, list[float]] = {
        "00002": [0.0001, 0.0001, 0.0004, 0.0001, 0.9993],
        "00012": [0.123, 0.03, 0.6, 0.123, 0.124],
        "100": [0.5, 0.2, 0.14, 0.01, 0.15],
        "00100": [0.1, 0.1, 0.05, 0.7, 0.05],
        "00007": [np.nan] * 5,
        "00009": [0.15, 0.15, 0.15, 0.4, 0.15],
    }
    scored = pd.DataFrame({"id": list(scores)})
    scored[[f"p{label}" for label in LABELS]] = list(scores.values())
    scored["problem"] = ["", "", "", "", "unreadable photograph: not an image", ""]
    counts = {"00002": 3, "00012": 2, "100": 4, "00100": 4, "00007": 1, "00009": 12, "00013": 13}
    return audit_table(scored, Expected("", counts), LABELS, np.full(5, THRESHOLD))


def photographs() -> list[Content]:
    synthetic = list(synthetic_bins(3, seed=5))
    ids = ["00002", "00012", "100"]
    return [Content(bin_id, one.photograph) for bin_id, one in zip(ids, synthetic, strict=True)]


def listed(
    table: pd.DataFrame,
    top: int = 200,
    sample: int = 0,
    settled: Mapping[str, Decision] | None = None,
) -> WorkList:
    """The list of bins to check; half of the alarms are so already at a false-alarm share of 1%."""
    alarms = table.loc[table["alarm"] == "yes", "id"]
    shares = {bin_id: 0.05 if n % 2 else 0.01 for n, bin_id in enumerate(alarms)}
    return make_list(table, shares, settled or {}, top, sample, seed=0)


def page_of(
    facts: Facts = FACTS,
    work: WorkList | None = None,
    contents: Sequence[Content] | None = None,
    items: Items | None = None,
) -> str:
    pictures = make_pictures(photographs() if contents is None else contents)
    return render_page(facts, audited(), LABELS, work or listed(audited()), pictures, items or {})


def rendered(facts: Facts = FACTS, items: Items | None = None) -> Page:
    return Page(page_of(facts, items=items))


def test_the_page_says_what_was_found_and_how_reliable_it_is() -> None:
    words = rendered(FACTS._replace(trained_on=1234, left_out=1)).words()

    for text in (
        "3 of 4 bins flagged (75.0%).",
        "when its recorded count has a probability below 3.22%, judging by its photograph.",
        "the recorded counts of about 95% of the 9,900 validation photographs.",
        "Even if all 4 records here were correct, about 0 would be flagged.",
        "1,234 of these bins are in the training set (data/split.csv), judging by their ids: bins",
        "1 more bin is left out, because the models were trained on them (data/split.csv)",
        "Photographs: s3://bins. Expected counts: counts.csv.",
        "Models (averaged): resnet34, vit.",
    ):
        assert text in words
    assert "training set" not in rendered().words()


def test_the_page_says_how_often_each_count_is_flagged() -> None:
    rows = [
        {"quantity": 1, "threshold": 0.05, "false_alarms": 0.04, "found": 0.996},
        {"quantity": 2, "threshold": 0.08, "false_alarms": float("nan"), "found": 0.002},
    ]
    words = rendered(FACTS._replace(by_count=rows)).words()
    assert "Correct records flaggedWrong records flagged 15%4%>99% 28%-<1%" in words
    assert "has a probability below the threshold of that count (see below)" in words


def test_a_warning_about_the_alarms_stands_above_them() -> None:
    page = rendered(FACTS._replace(warning="Check <ten> by hand."))

    assert page.words().index("Check <ten> by hand.") < page.words().index("A bin is flagged")
    assert "warning" not in [attributes.get("class") for _, attributes in rendered().tags]


def test_the_alarms_come_in_order_each_with_its_photograph() -> None:
    page = rendered()

    found = re.findall(r"(\d+) Record says (\d+), photo looks like (\d+)", page.words())
    assert found == [("00002", "3", "5"), ("100", "4", "1"), ("00012", "2", "3")]
    sources = {content.id: content.data for content in photographs()}
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    for (bin_id, _, _), attributes in zip(found, images, strict=True):
        assert attributes["alt"] == f"Photograph of bin {bin_id}"
        small, large = (
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64)), float)
            for data in (embedded(attributes["src"]), sources[bin_id])
        )
        assert np.abs(small - large).mean() < 4


def embedded(url: str) -> bytes:
    return base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))


def test_each_card_has_the_probability_of_each_count() -> None:
    page = rendered()

    charts = [" ".join(label.split()) for label in page.attributes("svg", "aria-label")]
    assert charts[0] == "Probability of each count: 1: <1%, 2: <1%, 3: <1%, 4: <1%, 5: >99%"
    assert charts[2] == "Probability of each count: 1: 12%, 2: 3%, 3: 60%, 4: 12%, 5: 12%"
    bars = [attributes for tag, attributes in page.tags if tag == "rect"][10:]
    assert [bar.get("class") for bar in bars] == [None, "expected", "seen", None, None]
    heights = [float(bar["height"]) - 1 for bar in bars]
    expected = [48 * share for share in (0.123, 0.03, 0.6, 0.123, 0.124)]
    assert heights == pytest.approx(expected, abs=0.1)
    feet = {float(bar["y"]) + float(bar["height"]) for bar in bars}
    assert max(feet) - min(feet) < 0.11


def test_a_photograph_that_can_no_longer_be_read_leaves_its_card() -> None:
    gone = [Content("00002", b"damaged"), Content("00012", b"", "not found")]

    page = Page(page_of(contents=gone))

    assert page.words().count("photograph no longer available") == 3


def test_pictures_are_small_upright_and_encoded_again() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    comment = b"<script>alert(1)</script>"
    data = image_file(Image.fromarray(picture(2000, 1000)), exif=turned, comment=comment)

    copy = embedded(make_pictures([Content("1", data)])["1"].url)

    assert Image.open(io.BytesIO(copy)).size == (320, 640)
    assert comment in data
    assert comment not in copy
    assert b"Exif" not in copy


def test_bins_that_were_not_judged_are_counted_by_reason() -> None:
    assert rendered().rows[:4] == [
        ["Reason", "Bins", "Ids"],
        ["photograph missing", "1", "00013"],
        ["the models count only 1 to 5 items", "1", "00009"],
        ["unreadable photograph: not an image", "1", "00007"],
    ]


def test_an_audit_without_alarms_has_a_page_too() -> None:
    table = audited()
    table = table[table["alarm"] == "no"]

    words = Page(render_page(FACTS, table, LABELS, listed(table), {}, {})).words()

    assert "0 of 1 bin flagged (0.0%)." in words
    assert "Flagged bins, most suspicious first None." in words
    assert "could not be judged" not in words


def test_the_items_of_the_record_are_listed_shortened() -> None:
    things = [item(f"Thing {number}", 2) for number in range(8)]
    items = {"00002": [item("A " + "very " * 40 + "long name"), item(None, None, "B00X"), *things]}

    words = rendered(items=items).words()

    assert "very ve… B00X 2 x Thing 0 2 x Thing 1 2 x Thing 2 and 5 more" in words
    assert len(words.partition("1 x ")[2].partition("…")[0]) == 69
    assert describe_item(item(" Tea,\n\t20 bags ", 3)) == "3 x Tea, 20 bags"
    assert describe_item(item("", None, "B1")) == "B1"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (1e-9, "<1%"), (0.0149, "1%"), (0.5, "50%"), (0.9949, ">99%"), (1.0, "100%")],
)
def test_only_exact_shares_are_shown_as_0_or_100_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_the_page_is_self_contained_and_accessible() -> None:
    page = rendered(items={"00002": [item("Tea")]})

    tags = {tag for tag, _ in page.tags}
    assert not {"link", "iframe", "object", "base", "a", "form"} & tags
    assert all(src.startswith("data:image/jpeg;") for src in page.attributes("img", "src"))
    assert set(page.attributes("th", "scope")) == {"col", "row"}
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    (policy,) = (a["content"] for tag, a in page.tags if "http-equiv" in a)
    script = base64.b64encode(hashlib.sha256(SCRIPT.read_bytes()).digest()).decode()
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
    )


# Of each text and the background that it stands on.
CONTRASTS = """(() => {
const shade = color => color.match(/[0-9.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
const behind = element => {
    for (; element; element = element.parentElement) {
        const color = shade(getComputedStyle(element).backgroundColor);
        if (color[3] !== 0) return color;
    }
    return [255, 255, 255];
};
const texts = [...document.body.querySelectorAll("*")].filter(element =>
    element.checkVisibility() && [...element.childNodes].some(
        node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
return texts.map(element => {
    const style = getComputedStyle(element);
    const color = element.tagName === "text" ? style.fill : style.color;
    const [one, other] = [light(shade(color)), light(behind(element))];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
});
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_browser_shows_the_page_without_a_network(
    tmp_path: Path, browser: Browser, width: int
) -> None:
    items = {"00002": [item("Tea, 20 bags", 2), item("x" * 500)]}
    facts = FACTS._replace(warning="Far more than expected. " * 9)
    text = page_of(facts, contents=photographs()[:2], items=items)
    (tmp_path / "index.html").write_text(text, "utf-8")

    page = browser.open(tmp_path / "index.html", width)

    assert page.problems == []
    assert {url.partition(":")[0] for url in page.requests} == {"file", "data"}
    assert page.sideways() == 0
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    charts = "[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect())"
    assert page.evaluate(f"{charts}.every(box => box.width > 200 && box.height > 40)")
    ratios = page.evaluate(CONTRASTS)
    assert len(set(ratios)) >= 4
    assert min(ratios) >= 4.5, "WCAG 2 requires this contrast"
    page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width == width
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100
