"""Deciding on the page of an audit, in a browser: by keys, through a reload, to the next audit."""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages.reporting.page import embedded
from tests.browser import Browser, Page, running_browser
from tests.conftest import jpeg_file
from tests.test_audit_page import page_of
from tools.audit.decisions import Decision, read_decisions
from tools.audit.expected import Expected
from tools.audit.page import Facts, Items, Picture, render_page
from tools.audit.table import audit_table
from tools.audit.work_list import WorkList, make_list
from tools.audit.worth import Estimate, Part, worth, worth_of

pytestmark = pytest.mark.slow

BINS = 60
FLAGGED = 12
FACTS = Facts("photographs", "counts.csv", ["vit"], 9900, 0.05)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


def table_of(bins: int, flagged: int) -> pd.DataFrame:
    """A table of bins 00001 and up, whose records say 2, and of which the first are flagged."""
    ids = [f"{number:05d}" for number in range(1, bins + 1)]
    scored = pd.DataFrame({"id": ids, "problem": ""})
    right = np.where(np.arange(bins) < flagged, 0.01, 0.9)
    scored[["p1", "p2"]] = np.stack([1 - right, right], axis=1)
    return audit_table(scored, Expected("", dict.fromkeys(ids, 2)), [1, 2], np.full(2, 0.03))


def list_of(
    sample: int, top: int = 200, settled: dict[str, Decision] | None = None
) -> tuple[pd.DataFrame, WorkList]:
    table = table_of(BINS, FLAGGED)
    shares = {f"{number:05d}": 0.01 if number < 4 else 0.05 for number in range(1, FLAGGED + 1)}
    return table, make_list(table, shares, settled or {}, top, sample, seed=0)


def write_page(
    folder: Path,
    sample: int = 0,
    top: int = 200,
    carried: Sequence[Decision] = (),
    items: Items | None = None,
) -> Path:
    """The page of these bins, without pictures."""
    table, work = list_of(sample, top)
    pictures = {bin_id: Picture("", f"sha256:{bin_id:0>16}") for bin_id in work.ids}
    path = folder / "index.html"
    text = render_page(FACTS, table, [1, 2], work, pictures, items or {}, carried)
    path.write_text(text, "utf-8")
    return path


def press(page: Page, *keys: str) -> None:
    """Press keys, as a person does, wherever the focus is."""
    for key in keys:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            pressed = {"key": key, "code": key, "text": text if kind == "keyDown" else ""}
            page.browser.call("Input.dispatchKeyEvent", page, type=kind, **pressed)


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll('{selector}')].map(one => one.textContent)"
    )
    return found


def visible(selector: str) -> str:
    """The elements that can be seen, as JavaScript."""
    everything = f"[...document.querySelectorAll('{selector}')]"
    return f"{everything}.filter(one => one.checkVisibility({{visibilityProperty: true}}))"


def progress(page: Page) -> str:
    (text,) = texts(page, "#progress")
    return text


def current(page: Page) -> str:
    """The bin with the focus."""
    label: str = page.evaluate(
        "document.activeElement.closest('.card').querySelector('h3').innerText"
    )
    return label


def saved(page: Page, folder: Path) -> Path:
    """Press S, and wait for the file."""
    page.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    path = folder / "decisions.csv"
    path.unlink(missing_ok=True)
    press(page, "s")
    page.wait_until("document.getElementById('save-state').textContent.startsWith('All are')")
    for _ in range(100):
        if path.exists() and path.read_text("utf-8").endswith("\n"):
            break
        page.evaluate("new Promise(done => setTimeout(done, 50))")
    return path


def reload(page: Page) -> None:
    page.browser.call("Page.navigate", page, url=page.evaluate("location.href"))
    page.wait_until("document.readyState === 'complete'")


def opened(browser: Browser, path: Path) -> Page:
    """The page in a browser that has not seen it before: files share what it keeps."""
    page = browser.open(path)
    page.evaluate("localStorage.clear()")
    reload(page)
    return page


def test_decisions_made_by_keys_outlive_a_reload_and_are_saved(
    browser: Browser, tmp_path: Path
) -> None:
    page = opened(browser, write_page(tmp_path))

    press(page, "j")
    assert current(page) == "Bin 00001"
    press(page, "r", "1", "2", "Enter", "x")
    assert current(page) == "Bin 00004"
    press(page, "j", "ArrowRight", "k")
    assert current(page) == "Bin 00005"
    # The number of the record means that it is right.
    press(page, "2", "Enter")

    assert progress(page) == "4 of 12 checked, 1 record wrong"
    assert texts(page, ".decided .verdict") == [
        "Record is right",
        "Record is wrong: counted 12",
        "Cannot tell",
        "Record is right",
    ]
    reload(page)
    assert progress(page) == "4 of 12 checked, 1 record wrong"
    assert texts(page, "#save-state") == ["4 not in a saved file yet"]

    decisions = read_decisions([saved(page, tmp_path)], []).by_id

    assert {bin_id: (one.decision, one.counted) for bin_id, one in decisions.items()} == {
        "00001": ("right", 2),
        "00002": ("wrong", 12),
        "00003": ("unclear", None),
        "00005": ("right", 2),
    }
    assert decisions["00002"].photograph == "sha256:0000000000000002"
    assert {one.expected for one in decisions.values()} == {2}
    reload(page)
    assert texts(page, "#save-state") == ["All are in the saved file"]
    assert page.problems == []


def test_a_decision_is_undone_and_changed(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, write_page(tmp_path))
    press(page, "j", "r", "5", "Enter")
    assert progress(page) == "2 of 12 checked, 1 record wrong"

    press(page, "u")
    assert (progress(page), current(page)) == ("1 of 12 checked, 0 records wrong", "Bin 00002")
    press(page, "k", "7", "Enter")
    assert progress(page) == "1 of 12 checked, 0 records wrong", "it is decided: undo it first"
    press(page, "u", "7", "Enter")
    assert progress(page) == "1 of 12 checked, 1 record wrong"
    reload(page)
    assert progress(page) == "1 of 12 checked, 1 record wrong"


def test_decisions_are_made_by_mouse(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, write_page(tmp_path))
    click = "document.querySelectorAll('.card')[{}].querySelector('[data-action={}]').click()"
    for place, action in ((0, "right"), (1, "unclear"), (0, "undo"), (2, "count")):
        page.evaluate(click.format(place, action))
    assert progress(page) == "1 of 12 checked, 0 records wrong", "no count was typed"
    assert page.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"
    press(page, "1")
    page.evaluate(click.format(2, "count"))
    assert progress(page) == "2 of 12 checked, 1 record wrong"
    # A click makes a bin the one that keys are about.
    page.evaluate(click.format(8, "right"))
    assert current(page) == "Bin 00010"


def test_a_record_may_list_other_items_than_the_bin_has(browser: Browser, tmp_path: Path) -> None:
    tea = {"00002": [{"name": "Tea", "asin": "B1", "quantity": 2}]}
    page = opened(browser, write_page(tmp_path, items=tea))
    press(page, "j", "i")
    assert progress(page) == "0 of 12 checked, 0 records wrong", "this record lists no items"
    press(page, "j", "i")
    assert progress(page) == "1 of 12 checked, 1 record wrong"
    assert texts(page, ".decided .verdict") == ["Record is wrong: 2 other items"]
    assert texts(page, "#worth-alarms") == ["1 of 1"]
    reload(page)

    (decision,) = read_decisions([saved(page, tmp_path)], []).by_id.values()

    assert (decision.id, decision.decision, decision.counted) == ("00002", "other_items", 2)
    assert (decision.expected, decision.is_wrong) == (2, True)


def test_only_undecided_bins_are_shown_if_wanted(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, write_page(tmp_path))
    shown = visible(".card") + ".length"
    press(page, "j", "r", "j", "r", "o")
    assert page.evaluate(shown) == 10
    assert current(page) == "Bin 00004"
    press(page, "k")
    assert current(page) == "Bin 00002", "the decided one is skipped"
    for _ in range(10):
        press(page, "r")
    assert page.evaluate(shown) == 0
    assert progress(page) == "12 of 12 checked, 0 records wrong"
    assert page.evaluate("document.activeElement.id") == "progress"
    press(page, "o")
    assert page.evaluate(shown) == 12


def test_the_photograph_fills_the_window_at_a_key_and_deciding_goes_on(
    browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "index.html"
    path.write_text(page_of(), "utf-8")
    page = opened(browser, path)
    width = "document.querySelector('.current .photograph').getBoundingClientRect().width"
    press(page, "j")
    small = page.evaluate(width)
    press(page, "l")
    assert page.evaluate(width) > 1.8 * small
    press(page, "1", "Enter")
    assert page.evaluate(width) > 1.8 * small
    inside = visible("button") + ".every(one => one.closest('.current'))"
    assert page.evaluate(inside), "Tab stays inside"
    press(page, "Escape")
    assert page.evaluate(width) == pytest.approx(small, abs=1)
    assert progress(page) == "1 of 3 checked, 1 record wrong"


def test_keys_can_be_turned_off(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, write_page(tmp_path))
    page.evaluate("document.querySelector('.help').open = true")
    page.evaluate("document.getElementById('use-keys').click()")
    press(page, "j", "r", "x", "s")
    assert progress(page) == "0 of 12 checked, 0 records wrong"


def test_two_windows_keep_each_others_decisions(browser: Browser, tmp_path: Path) -> None:
    path = write_page(tmp_path)
    one, other = opened(browser, path), browser.open(path)
    press(one, "j", "r")
    press(other, "j", "j", "j", "x")
    for page in (one, other):
        page.wait_until("document.getElementById('progress').textContent.startsWith('2 of')")
    reload(one)
    assert progress(one) == "2 of 12 checked, 0 records wrong"


def test_another_list_starts_undecided(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, write_page(tmp_path))
    press(page, "j", "r")
    page = browser.open(write_page(tmp_path, top=11))
    assert progress(page) == "0 of 11 checked, 0 records wrong"


def test_a_browser_that_keeps_nothing_says_so_and_asks_before_the_page_closes(
    browser: Browser, tmp_path: Path
) -> None:
    page = opened(browser, write_page(tmp_path))
    refuse = "() => { throw new Error('full') }"
    page.evaluate(f"Object.defineProperty(Storage.prototype, 'setItem', {{value: {refuse}}}); 1")
    asks = "!window.dispatchEvent(new Event('beforeunload', {cancelable: true}))"
    press(page, "j")
    assert not page.evaluate(asks)
    press(page, "r")
    assert texts(page, "#save-state.alarming") == [
        "This browser keeps nothing: save before you close the page."
    ]
    assert page.evaluate(asks)
    saved(page, tmp_path)
    assert not page.evaluate(asks)


def test_the_file_has_the_earlier_decisions_too_and_the_later_ones_hold(
    browser: Browser, tmp_path: Path
) -> None:
    earlier = Decision(
        "00001",
        2,
        3,
        "wrong",
        "2026-01-01T08:00:00.000Z",
        "",
        "audit-" + "0" * 12,
        "other",
        9,
        None,
    )
    carried = [earlier, earlier._replace(id="-77", counted=2, decision="right")]
    page = opened(browser, write_page(tmp_path, carried=carried))
    press(page, "j", "x")

    path = saved(page, tmp_path)
    found = read_decisions([path], []).by_id

    assert found["-77"] == carried[1]
    assert found["00001"].decision == "unclear"
    assert len(found) == 2
    # Only an id may begin with a minus, and an id has no bracket.
    assert not re.search(r'(^|,)[=+@"\t]', path.read_text("utf-8"), re.MULTILINE)


def test_a_list_with_a_sample_does_not_tell_what_was_flagged_before_it_is_decided(
    browser: Browser, tmp_path: Path
) -> None:
    page = opened(browser, write_page(tmp_path, sample=20))
    seen = visible(".model") + ".length"
    assert page.evaluate(seen) == 0
    press(page, "j", "r")
    assert page.evaluate(seen) == 2


def test_the_page_and_the_next_audit_say_the_same_about_what_it_was_worth(
    browser: Browser, tmp_path: Path
) -> None:
    page = opened(browser, write_page(tmp_path, sample=20))
    press(page, "j")
    for step, part in enumerate(page.evaluate("page.bins.map(one => one.part)")[:26]):
        wrong = step % 3 > 0 if part == "flagged" else step % 9 == 0
        press(page, *(["1", "Enter"] if wrong else "x" if step == 7 else "r"))
    shown = page.evaluate("worthOfDecisions()")

    found = worth_of(read_decisions([saved(page, tmp_path)], []).by_id.values())

    assert found is not None
    assert found.wrong_records
    assert found.found
    assert found.best_share
    assert as_numbers(shown) == pytest.approx(as_numbers(found._asdict()))
    assert texts(page, "#worth-records") == [f"about {found.wrong_records.value:.0f}"]
    low, high = found.wrong_records.low, found.wrong_records.high
    assert texts(page, "#worth-records-interval") == [f"{low:.0f} to {high:.0f} records"]


def as_numbers(found: dict[str, Any]) -> list[float]:
    """All numbers of what a list was worth, in one order; nothing for what is not known."""
    numbers: list[float] = []
    for name in ("checked", "wrong", "right_alarms", "wrong_records", "found", "best_share"):
        value = found.get(name)
        if isinstance(value, list | Estimate):
            numbers += value
        elif value is not None:
            numbers.append(value)
    return numbers


def test_the_two_implementations_agree_on_many_lists(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, write_page(tmp_path, sample=20))
    chance = random.Random(0)
    for _ in range(150):
        parts = []
        for most in (400, 20_000):
            bins = chance.randint(0, most)
            checked = chance.randint(0, min(bins, 300))
            parts.append(Part(bins, checked, chance.randint(0, checked)))
        alarms = [
            (chance.choice([0.01, 0.02, 0.05]), number < parts[0].wrong)
            for number in range(parts[0].checked)
        ]
        arguments = ", ".join(
            f"{{bins: {part.bins}, checked: {part.checked}, wrong: {part.wrong}}}" for part in parts
        )
        pairs = [[share, str(wrong).lower()] for share, wrong in alarms]
        listed_alarms = f"[{', '.join(f'[{share}, {wrong}]' for share, wrong in pairs)}]"
        shown = page.evaluate(f"worth({arguments}, {listed_alarms})")
        assert as_numbers(shown) == pytest.approx(
            as_numbers(worth(parts[0], parts[1], alarms)._asdict())
        )


def test_two_thousand_alarms_are_decided_on_before_their_pictures_have_arrived(
    browser: Browser, tmp_path: Path
) -> None:
    table = table_of(2000, 2000)
    ids = table["id"].tolist()
    work = make_list(table, dict.fromkeys(ids, 0.05), {}, 2000, 0, 0)
    pictures = pictures_of(ids)
    path = tmp_path / "index.html"
    path.write_text(render_page(FACTS, table, [1, 2], work, pictures, {}), "utf-8")
    text = path.read_text("utf-8")
    assert text.index("if (cards.length) begin();") < 0.3 * len(text)

    page = opened(browser, path)

    loaded = "[...document.images].filter(one => one.complete && one.naturalWidth > 0).length"
    assert page.evaluate("document.images.length") == 2000
    assert 3 <= page.evaluate(loaded) < 300, "only those in sight"
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_until("document.images[1999].naturalWidth > 0")
    assert page.evaluate(loaded) < 600
    press(page, "j", "r")
    assert progress(page) == "1 of 2,000 checked, 0 records wrong"


def pictures_of(ids: Sequence[str]) -> dict[str, Picture]:
    """A picture of 10 kB for each: the same one, but the browser cannot know that."""
    data = jpeg_file(400, 300)
    return {
        bin_id: Picture(embedded("image/jpeg", data + bin_id.encode()), bin_id) for bin_id in ids
    }


def test_the_printed_page_is_a_list_with_an_empty_box_for_each_bin(
    browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "index.html"
    path.write_text(page_of(), "utf-8")
    page = opened(browser, path)
    press(page, "j", "1", "Enter")
    browser.call("Emulation.setEmulatedMedia", page, media="print")
    lines = page.evaluate("document.body.innerText").split("\n")
    words = [line.strip() for line in lines if line.strip()]
    assert words[0] == "Flagged bins, most suspicious first"
    assert words[2:] == [
        "Bin 00002", "Record says 3", "1",
        "Bin 100", "Record says 4",
        "Bin 00012", "Record says 2",
    ]  # fmt: skip
    boxes = "[...document.querySelectorAll('.box')].map(one => one.getBoundingClientRect().width)"
    assert all(width > 40 for width in page.evaluate(boxes))
