"""The pages of `dvc plots`, made by DVC in a small repository and opened in a browser."""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from ruamel.yaml import YAML

from stages.formats.tables import write_csv
from stages.reporting.plots import LEARNED
from stages.scoring.claims import make_claims, uniform_errors
from stages.scoring.evaluation import confusion_table, per_quantity_table
from stages.scoring.metrics import confusion_matrix, reliability_table
from stages.scoring.verification import roc_table
from tests.browser import DESKTOP, PHONE, Browser, Page, running_browser
from tests.conftest import REPOSITORY
from tools import plots_page

# The tests need Chromium, and DVC takes some seconds for each page.
pytestmark = pytest.mark.slow

PIPELINE = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
MODELS = ["resnet34", "vit"]
# DVC's settings of each plot by its path; pictures are in reports/figures.
PLOTS: dict[str, dict[str, str]] = {
    path.replace("${key}", model): {
        name: value.replace("${key}", model) for name, value in plot.items()
    }
    for model in MODELS
    for stage in ("train", "evaluate")
    for entry in PIPELINE[stage]["do"]["plots"]
    for path, plot in entry.items()
}
# The tags of the repository, and the epochs of their curves.
REVISIONS = {"three": 3, "two": 2, "one": 1}
LABELS = [1, 2, 3, 10]
CURVES = [f"{name}_{value}" for value in ("loss", "accuracy") for name in LEARNED]


@dataclass(frozen=True)
class Repository:
    """A repository of git and DVC in a new folder."""

    folder: Path

    def run(self, *command: str) -> str:
        """Run a command without the user's configuration, and return its output."""
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={"PATH": programs, "HOME": str(self.folder.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command} failed:\n{done.stdout}"
        return done.stdout

    def commit(self, tag: str) -> None:
        self.run("git", "add", ".")
        self.run("git", "commit", "--quiet", "--message", tag)
        self.run("git", "tag", tag)

    def plots(self, *arguments: str) -> Path:
        """Run `dvc plots`, and return the path of its page."""
        out = Path(tempfile.mkdtemp(dir=self.folder.parent))
        self.run("dvc", "plots", *arguments, "--out", str(out))
        return out / "index.html"


def new_repository(folder: Path) -> Repository:
    """A repository with the DVC settings and plots of this project, all tracked by git."""
    repository = Repository(folder)
    settings = ["config", "plots", ".gitignore"]
    (folder / ".dvc").mkdir(parents=True)
    for name in settings:
        source = REPOSITORY / ".dvc" / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / ".dvc" / name)
    plots = [{path: plot | {"cache": False}} for path, plot in PLOTS.items()]
    plots += [{path: {"cache": False}} for path in PIPELINE["report"]["plots"]]
    YAML().dump({"stages": {"all": {"cmd": "true", "plots": plots}}}, folder / "dvc.yaml")
    repository.run("git", "init", "--quiet")
    repository.run("git", "config", "user.name", "Test")
    repository.run("git", "config", "user.email", "test@localhost")
    return repository


def write_reports(folder: Path, seed: int, epochs: int) -> None:
    """Write the files that the train, evaluate and report stages write for plots."""
    for number, model in enumerate(MODELS):
        chance = np.random.default_rng([seed, number])
        actual, guess = chance.choice(LABELS, (2, 300))
        predicted = np.where(chance.random(300) < 0.6, actual, guess)
        confusion = confusion_matrix(actual, predicted, LABELS)
        confidence = chance.uniform(0.3, 1, 300)
        curves = {"epoch": range(1, epochs + 1)} | {name: chance.random(epochs) for name in CURVES}
        probabilities = chance.dirichlet(np.ones(len(LABELS)), 300)
        claims = make_claims(probabilities, actual, LABELS, uniform_errors(actual, LABELS))
        for name, table in {
            "curves": pd.DataFrame(curves),
            "confusion": confusion_table(confusion, LABELS),
            "per_quantity": per_quantity_table(confusion, LABELS),
            "reliability": reliability_table(predicted == actual, confidence),
            "roc": roc_table(claims),
        }.items():
            write_csv(folder / model / f"{name}.csv", table)
    (folder / "figures").mkdir(exist_ok=True)
    Image.new("RGB", (1200, 500), (seed, 90, 150)).save(folder / "figures/quantities.png")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository with a commit for each of REVISIONS, the last one checked out."""
    repository = new_repository(tmp_path_factory.mktemp("plots") / "repository")
    repository.commit("empty")
    for seed, (tag, epochs) in enumerate(REVISIONS.items()):
        write_reports(repository.folder / "reports", seed, epochs)
        repository.commit(tag)
    plots_page.install(repository.folder)
    return repository


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(repository: Repository) -> Path:
    """The page of one revision, after one epoch."""
    return repository.plots("show")


@pytest.fixture(scope="module")
def compared(repository: Repository) -> Path:
    """The page of three revisions."""
    return repository.plots("diff", *REVISIONS)


def open_plots(browser: Browser, path: Path, width: int = DESKTOP) -> Page:
    """Open a page of plots, and wait until each plot or its error message is shown."""
    page = browser.open(path, width)
    page.wait_until(
        "![...document.querySelectorAll('main > div')].some(c => c.querySelector('script'))"
    )
    return page


def card(path: str) -> str:
    """The id of a plot's element."""
    return re.sub(r"\W", "_", path)


def texts(page: Page, path: str, selector: str) -> list[str]:
    """The texts of the elements in a plot."""
    elements = f"[...document.querySelectorAll('#{card(path)} {selector}')]"
    found: list[str] = page.evaluate(f"{elements}.map(element => element.textContent)")
    return found


def marks(page: Page, path: str, kind: str) -> list[dict[str, str]]:
    """The visible marks of a kind in a plot: the fields of their descriptions, and their fill."""
    elements = f"[...document.querySelectorAll('#{card(path)} .mark-{kind}.role-mark > *')]"
    visible = "mark => mark.getBoundingClientRect().width > 0"
    fields = "mark => [mark.getAttribute('aria-label'), mark.getAttribute('fill')]"
    found = page.evaluate(f"{elements}.filter({visible}).map({fields})")
    return [
        dict(part.split(": ", 1) for part in (label or "").split("; ") if part) | {"fill": fill}
        for label, fill in found
    ]


def of_kind(kind: str) -> list[str]:
    """The paths of the plots with this template."""
    return [path for path, plot in PLOTS.items() if plot["template"] == kind]


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["shown", "compared"])
def test_a_page_is_drawn_without_a_network(
    name: str, width: int, browser: Browser, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = open_plots(browser, request.getfixturevalue(name), width)

    assert page.problems == []
    assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}
    assert page.sideways() == 0
    for path, plot in PLOTS.items():
        assert plot["title"] in texts(page, path, ".role-title-text text")
        assert len(texts(page, path, "svg.marks")) == 1
        # Only a row of confusion matrices may scroll, within its card.
        inside = f"(card => card.scrollWidth <= card.clientWidth)({card(path)})"
        assert page.evaluate(inside) or plot["template"] == "confusion_counts"
    page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width == width
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_curves_have_a_point_per_epoch_also_of_one(compared: Path, browser: Browser) -> None:
    page = open_plots(browser, compared)

    for path in of_kind("curves"):
        points = marks(page, path, "symbol")
        plotted = [(point["rev"], point["column"], point["epoch"]) for point in points]
        assert sorted(plotted) == sorted(
            (revision, column, str(1 + place))
            for revision, epochs in REVISIONS.items()
            for column in CURVES
            for place in range(epochs)
        )
        assert len({(point["rev"], point["fill"]) for point in points}) == len(REVISIONS)
        # Every revision but the one with a single epoch has a line for each column.
        assert len(marks(page, path, "line")) == 2 * len(CURVES)
        headers = texts(page, path, ".row_header .role-title-text text")
        assert headers == ["loss (lower is better)", "accuracy (higher is better)"]
        # Both axes begin at 0, so that a difference of two revisions is shown in proportion.
        ticks = texts(page, path, ".cell .role-axis-label text")
        assert [float(tick) for tick in ticks].count(0) == 2
        assert texts(page, path, ".column_footer .role-axis-label text") == ["1", "2", "3"]
        assert texts(page, path, ".role-legend-label text") == [*REVISIONS, *LEARNED]


def test_one_epoch_of_one_revision_shows_all_sets(shown: Path, browser: Browser) -> None:
    page = open_plots(browser, shown)

    for path in of_kind("curves"):
        assert sorted(point["column"] for point in marks(page, path, "symbol")) == sorted(CURVES)


def test_confusions_have_each_revisions_own_numbers(
    compared: Path, browser: Browser, repository: Repository
) -> None:
    page = open_plots(browser, compared)

    for path in of_kind("confusion_counts"):
        headers = texts(page, path, ".role-column-header .role-title-text text")
        panels = page.evaluate(
            f"[...document.querySelectorAll('#{card(path)} .cell > g')].map(panel =>"
            " [...panel.querySelectorAll('.mark-text.role-mark text')].map(text =>"
            " [text.getAttribute('aria-label'), text.lastChild.textContent]))"
        )
        assert headers == list(REVISIONS)
        for revision, cells in zip(headers, panels, strict=True):
            table = pd.read_csv(io.StringIO(repository.run("git", "show", f"{revision}:{path}")))
            assert {label.partition("; share")[0]: number for label, number in cells} == {
                f"predicted items: {row.predicted}; items in the record: {row.actual}": (
                    f"{row.test_bins}"
                )
                for row in table.itertuples()
            }
        # The labels are sorted as numbers: 10 is not between 1 and 2.
        assert texts(page, path, ".row_header .role-axis-label text") == ["1", "2", "3", "10"]


def test_each_revision_has_its_bars_points_and_curve(compared: Path, browser: Browser) -> None:
    page = open_plots(browser, compared)

    for path in of_kind("per_quantity"):
        bars = marks(page, path, "rect")
        assert [(bar["rev"], bar["quantity"]) for bar in bars] == [
            (revision, str(label)) for revision in REVISIONS for label in LABELS
        ]
        assert len({bar["fill"] for bar in bars}) == len(REVISIONS)
    for path in of_kind("reliability"):
        points = marks(page, path, "symbol")
        assert [point["rev"] for point in points] == [name for name in REVISIONS for _ in range(7)]
    for path in of_kind("reliability") + of_kind("roc"):
        # One of the lines is the diagonal.
        assert len(marks(page, path, "line")) == 1 + len(REVISIONS)
        assert texts(page, path, ".role-legend-label text") == list(REVISIONS)


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_pictures_fit_and_say_what_they_are(compared: Path, browser: Browser, width: int) -> None:
    page = open_plots(browser, compared, width)

    pictures = page.evaluate(
        "[...document.images].map(i => [i.alt, i.naturalWidth, i.width <= innerWidth])"
    )
    assert pictures == [["reports/figures/quantities.png", 1200, True]] * len(REVISIONS)


def test_a_revision_without_data_gives_no_empty_chart(
    browser: Browser, repository: Repository
) -> None:
    page = open_plots(browser, repository.plots("diff", "empty", "empty"))

    for path in PLOTS:
        text = page.evaluate(f"{card(path)}.textContent").strip()
        name = card(path).replace("_", " ")
        assert text == f"{name}: no data. Make it with dvc repro, or get it with dvc pull."
    assert page.problems == []


def test_dvcs_own_templates_are_drawn_too(browser: Browser, repository: Repository) -> None:
    arguments = ["--template", "confusion", "-x", "predicted", "-y", "actual"]
    path = repository.plots("show", "reports/vit/confusion.csv", *arguments)

    page = open_plots(browser, path)

    assert page.evaluate("document.querySelectorAll('svg .mark-rect.role-mark path').length") > 0


def test_setup_leaves_nothing_for_git_and_keeps_other_settings(tmp_path: Path) -> None:
    repository = new_repository(tmp_path / "repository")
    repository.commit("new")
    repository.run("dvc", "config", "--local", "core.autostage", "false")

    plots_page.install(repository.folder)
    first = (repository.folder / plots_page.PAGE).read_bytes()
    plots_page.install(repository.folder)

    assert (repository.folder / plots_page.PAGE).read_bytes() == first
    assert repository.run("git", "status", "--porcelain") == ""
    assert repository.run("dvc", "config", "--local", "core.autostage").strip() == "false"


def test_without_setup_dvc_takes_its_own_page(tmp_path: Path) -> None:
    repository = new_repository(tmp_path / "repository")
    write_reports(repository.folder / "reports", seed=0, epochs=2)
    repository.commit("new")

    text = repository.plots("show").read_text("utf-8")

    assert "https://cdn." in text
    assert text.count("vegaEmbed(") == len(PLOTS)


def test_the_page_has_dvcs_placeholders_once_and_no_place_for_its_scripts() -> None:
    text = plots_page.plots_page()

    assert text.count("{plot_divs}") == text.count("{refresh_tag}") == 1
    assert "{scripts}" not in text
    assert "{vega}" not in text
    # Only the page's own scripts are ended.
    assert text.count("</script") == text.count("<script>\n") == 2
