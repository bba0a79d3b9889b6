"""The report stage: its figures and its page."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from stages import report
from stages.core import plots
from stages.core.files import write_csv, write_json
from stages.core.shards import Reject, write_rejects, write_table
from tests.made import bin_rows, write_params, write_resized, write_split

FIGURES = ["confusions.png", "curves.png", "quantities.png", "sheet.png"]
HOSTILE = "<script>alert('1')</script>"
QUANTITIES = [1, 2, 3, 4, 5] * 3 + [1]
TEST = range(10, 16)
RESULTS = {
    "resnet34": {
        "accuracy": 0.6251,
        "majority_accuracy": 0.2104,
        "rmse": 0.9012,
        "mae": 0.4503,
        "within_one": 0.9155,
        "macro_f1": 0.6049,
        "test_bins": 6,
    },
    "vit": {
        "accuracy": 0.7112,
        "majority_accuracy": 0.2104,
        "rmse": 0.8123,
        "mae": 0.3344,
        "within_one": 0.9466,
        "macro_f1": 0.6988,
        "test_bins": 6,
    },
}
SHOWN = {
    "resnet34": ["62.5%", "91.5%", "0.901", "0.450", "0.605"],
    "vit": ["71.1%", "94.7%", "0.812", "0.334", "0.699"],
}


class Page(HTMLParser):
    """The texts of a page's cells and its tags' attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with all that the stage reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    write_project()
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the stage has run."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        write_project()
        report.main()
    return folder


@pytest.fixture
def page(made: Path) -> Page:
    return Page((made / "reports/index.html").read_text("utf-8"))


def write_project() -> None:
    """What the stage reads, for both models of params.yaml, after two epochs."""
    write_params(Path(), {})
    rows = bin_rows(QUANTITIES)
    write_inputs(rows)
    for model in RESULTS:
        write_results(model, rows, epochs=2)


def write_inputs(rows: list[dict[str, Any]]) -> None:
    write_json(
        Path("data/index.json"),
        {"records": 1234, "indexed": 1229, "rejected": {"no photograph": 5}, "examples": []},
    )
    write_rejects(Path("data/quarantine.csv"), [Reject("77777", "not an image")])
    subset = [*rows, {"id": "77777", "quantity": 2}]
    write_table(
        Path("data/subset.parquet"),
        pa.table({name: [row[name] for row in subset] for name in ("id", "quantity")}),
    )
    write_resized(Path("data/resized"), rows)
    sets = ["test" if place in TEST else "train" for place in range(len(rows))]
    ids = [row["id"] for row in rows]
    write_split(Path("data/split.csv"), dict(zip(ids, sets, strict=True)))


def write_results(model: str, rows: list[dict[str, Any]], epochs: int) -> None:
    folder = Path("reports", model)
    write_json(folder / "metrics.json", RESULTS[model])
    curve = {"epoch": range(1, epochs + 1)} | {
        name: np.linspace(0.3, 0.6, epochs)
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    }
    write_csv(folder / "curves.csv", pd.DataFrame(curve))
    write_csv(
        folder / "per_quantity.csv",
        pd.DataFrame(
            {
                "quantity": [1, 2],
                "recall": [0.1239, 0.5],
                "precision": [0.4567, 0],
                "test_bins": [4321, 2],
            }
        ),
    )
    tested = [rows[place] for place in TEST]
    actual = [row["quantity"] for row in tested]
    predictions = pd.DataFrame(
        {"id": [row["id"] for row in tested], "actual": actual, "predicted": actual[::-1]}
    )
    write_csv(folder / "predictions.csv", predictions)


def made_page() -> Page:
    report.main()
    return Page(Path("reports/index.html").read_text("utf-8"))


def test_the_page_has_both_models_numbers(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows[:4]}

    assert rows["resnet34"] == SHOWN["resnet34"]
    assert rows["vit"] == SHOWN["vit"]
    assert rows["majority class"][0] == "21.0%"


def test_the_page_says_what_went_in_and_how_each_model_was_trained(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "10 photographs of bins to train, 6 to test, split by group." in text
    assert "1234 records, 1229 of them usable (left out: 5 no photograph)." in text
    assert "17 bins were drawn with 1, 2, 3, 4, 5 items" in text
    assert "1 of their photographs could not be used" in text
    assert ["1", "4321", "12.4%", "45.7%"] in page.rows
    assert ["trained with", "resnet34", "vit"] in page.rows
    assert ["learning_rate", "0.001", "2e-05"] in page.rows
    assert ["optimizer", "adam", "adamw"] in page.rows


def test_the_page_warns_where_siblings_may_be_in_both_sets(project: Path) -> None:
    write_params(project, {"split.by": "image"})

    assert "siblings of test bins may be in train" in made_page().text


def test_the_page_needs_nothing_but_itself(made: Path, page: Page) -> None:
    links = [
        value
        for name, value in page.attributes
        if name in ("src", "srcset", "href", "data", "action", "poster")
    ]
    assert len(links) == len(FIGURES)
    assert all(link is not None and link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    text = (made / "reports/index.html").read_text("utf-8")
    assert "@import" not in text
    assert "url(" not in text


def test_the_page_holds_the_figures_of_the_folder(made: Path, page: Page) -> None:
    files = {path.name: path.read_bytes() for path in (made / "reports/figures").iterdir()}
    assert sorted(files) == FIGURES
    for data in files.values():
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
            assert image.format == "PNG"
            assert min(image.size) > 200
    embedded = [
        base64.b64decode((value or "").partition(",")[2])
        for name, value in page.attributes
        if name == "src"
    ]
    assert sorted(embedded) == sorted(files.values())


@pytest.mark.usefixtures("project")
def test_a_second_run_gives_the_same_bytes() -> None:
    def outputs() -> dict[str, bytes]:
        report.main()
        paths = [*Path("reports/figures").iterdir(), Path("reports/index.html")]
        return {path.name: path.read_bytes() for path in paths}

    assert outputs() == outputs()


@pytest.mark.usefixtures("project")
def test_the_figures_show_their_data(made: Path) -> None:
    for name, column, value in (
        ("predictions.csv", "predicted", 5),
        ("curves.csv", "test_loss", 1.25),
    ):
        path = Path("reports/vit", name)
        table = pd.read_csv(path, dtype={"id": str})
        table.loc[0, column] = value
        write_csv(path, table)

    report.main()

    changed = {
        name
        for name in FIGURES
        if Path("reports/figures", name).read_bytes()
        != (made / "reports/figures" / name).read_bytes()
    }
    assert changed == {"confusions.png", "curves.png", "sheet.png"}


@pytest.mark.usefixtures("project")
def test_one_epoch_is_drawn_too() -> None:
    for model in RESULTS:
        write_results(model, bin_rows(QUANTITIES), epochs=1)

    report.main()

    with Image.open("reports/figures/curves.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 2
    figure = plots.curves_figure({"vit": pd.read_csv("reports/vit/curves.csv")})
    # A line of one point shows nothing without a marker.
    for axes in figure.axes:
        assert [line.get_marker() for line in axes.get_lines()] == ["o", "o"]


@pytest.mark.usefixtures("project")
def test_a_model_without_results_is_left_out() -> None:
    Path("reports/vit/metrics.json").unlink()

    page = made_page()

    assert ["trained with", "resnet34"] in page.rows
    assert not any(row[:1] == ["vit"] for row in page.rows)


def test_hostile_strings_are_shown_and_not_run(project: Path) -> None:
    write_params(project, {"train.vit.config": {"model_type": HOSTILE}})
    rows = bin_rows(QUANTITIES)
    rows[TEST[0]]["id"] = HOSTILE
    write_inputs(rows)
    for model in RESULTS:
        write_results(model, rows, epochs=2)
    path = Path("data/index.json")
    write_json(path, json.loads(path.read_text()) | {"rejected": {HOSTILE: 5}})

    page = made_page()

    assert f"left out: 5 {HOSTILE}" in page.text
    assert page.text.count(HOSTILE) == 2  # the reason and the knob
    assert "script" not in page.tags


def test_the_sheet_names_each_bin_with_the_records_count_and_the_predictions(
    project: Path,
) -> None:
    rows = bin_rows(QUANTITIES)
    ids = [rows[place]["id"] for place in TEST]
    predictions = {
        model: pd.read_csv(project / "reports" / model / "predictions.csv", dtype={"id": str})
        for model in RESULTS
    }

    figure = report.sheet(predictions, seed=0)

    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [
        f"{bin_id}: {rows[place]['quantity']} items"
        for bin_id, place in zip(ids, TEST, strict=True)
    ]
    first = [text.get_text() for text in figure.axes[0].texts]
    assert first == ["resnet34 1 ✓", "vit 1 ✓"]
    second = [text.get_text() for text in figure.axes[1].texts]
    assert second == ["resnet34 5 ✗", "vit 5 ✗"]


@pytest.mark.usefixtures("project")
def test_the_sheet_draws_24_bins_by_seed() -> None:
    rows = bin_rows([1, 2, 3, 4, 5] * 6)
    write_resized(Path("data/resized"), rows)
    table = pd.DataFrame(
        {"id": [row["id"] for row in rows], "actual": [row["quantity"] for row in rows]}
    ).assign(predicted=1)

    def drawn(seed: int) -> list[str]:
        figure = report.sheet({"vit": table}, seed)
        return [axes.get_title() for axes in figure.axes if axes.get_title()]

    assert len(drawn(0)) == 24
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
