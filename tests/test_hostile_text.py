"""Hostile text in pages, tables and terminals: it is shown, but never executed."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages import index
from stages.networks.release import save_release
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.params import Resize, load_params
from tests.browser import Browser, running_browser
from tests.builders import SIZE, TINY_VIT, model_params, one_torch_thread, random_classifier, square
from tests.conftest import bucket_params, folder_bucket, write_params
from tests.test_plots_page import MODELS, Repository, new_repository, open_plots, write_reports
from tests.test_report import Page
from tools import plots_page
from tools.audit import __main__ as audit
from tools.audit.page import describe_item

# Each leaves a trace if it is executed.
RUN = "document.documentElement.dataset.run=1"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f'"><img src=x onerror="{RUN}">',
    f"'><svg onload='{RUN}'>",
    f"</style><script>{RUN}</script>",
    f"</title></script></textarea><script>{RUN}</script>",
    f"--><iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"javascript:{RUN}",
    f"{{{{ {RUN} }}}}${{{RUN}}}",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<base href='http://127.0.0.1:9/'><link rel=stylesheet href=x.css>",
]
KNOBS = model_params("vit", pretrained=False, config=TINY_VIT)
ESCAPES = "\u001b]0;title\u0007\u001b[2J\u009b31m\u202e\r"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


def write_model(name: str) -> Path:
    """A trained model, in the current directory."""
    folder = Path("models") / name
    # So sure that every other count is an alarm.
    sure = np.array([[1.0, 0, 0, 0, 0]])
    bins = pd.DataFrame({"id": ["1"], "group": ["1"], "actual": [1]})
    form = Resize(size=SIZE, fit="pad", quality=90, max_rejects=0.0)
    save_release(folder, random_classifier(KNOBS), KNOBS, form, bins, sure, epoch=1)
    return folder


def write_bins(folder: Path) -> None:
    """A bin for each payload, in its items' names and numbers, and in names of files."""
    for inner in ("bin-images", "metadata"):
        (folder / inner).mkdir(parents=True)
    for number, payload in enumerate(PAYLOADS):
        items = {
            payload: {"asin": payload, "name": payload, "quantity": 2, "normalizedName": payload},
            "second": {"name": None, "quantity": 1, "asin": payload},
        }
        record = {"BIN_FCSKU_DATA": items, "EXPECTED_QUANTITY": 1 + number % 5}
        (folder / f"bin-images/{number}.jpg").write_bytes(square(1 + (number + 1) % 5, number))
        (folder / f"metadata/{number}.json").write_text(json.dumps(record))
        name = payload.replace("/", "|")
        (folder / f"bin-images/{name}.jpg").write_bytes(b"")
        (folder / f"metadata/{name}.json").write_text("{}")
    (folder / "bin-images/100.jpg").write_bytes(b"<script>")
    (folder / "metadata/100.json").write_text(json.dumps({"EXPECTED_QUANTITY": PAYLOADS[0]}))


def run_audit(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["audit", *words])
        with pytest.raises(SystemExit) as ended:
            audit.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def audited(workspace: Path, capsys: pytest.CaptureFixture[str]) -> Page:
    """The page of an audit of hostile bins in a hostile folder, by a hostile model."""
    folder = workspace / "<script>x<" / PAYLOADS[1]
    write_bins(folder)
    model = write_model("<svg onload='x'>")
    code = run_audit(str(folder), "--model", str(model), "--false-alarm", "0")
    assert code == 1
    assert capsys.readouterr().out.isascii()
    return Page(Path("audit/index.html").read_text("utf-8"))


def test_an_audits_page_shows_what_strangers_wrote(audited: Page) -> None:
    for payload in PAYLOADS:
        assert describe_item({"name": payload, "quantity": 2}) in audited.text
        assert describe_item({"name": None, "asin": payload, "quantity": 1}) in audited.text
    words = audited.words()
    assert "<script>x<" in words
    assert "<svg onload='x'>" in words
    active = {"iframe", "base", "link", "object", "form", "a"}
    assert not active & {tag for tag, _ in audited.tags}
    # The page's own, and the two that hold its data.
    assert [tag for tag, _ in audited.tags].count("script") == 3
    handlers = {name for _, attributes in audited.tags for name in attributes if name[:2] == "on"}
    assert handlers == set()
    assert [tag for tag, _ in audited.tags].count("meta") == 3
    assert all(source.startswith("data:image/jpeg;") for source in audited.attributes("img", "src"))


@pytest.mark.slow
@pytest.mark.usefixtures("audited")
def test_a_browser_runs_nothing_of_an_audits_page(browser: Browser) -> None:
    page = browser.open(Path("audit/index.html").absolute())

    assert page.problems == []
    assert page.evaluate("document.documentElement.dataset.run ?? null") is None
    assert {url.partition(":")[0] for url in page.requests} == {"file", "data"}


@pytest.mark.usefixtures("audited")
def test_no_cell_of_an_audits_table_is_a_formula() -> None:
    """Only an id may begin with a minus, and an id has no bracket."""
    table = pd.read_csv("audit/audit.csv", dtype=str, keep_default_na=False)

    assert len(table) == len(PAYLOADS) + 1
    for cell in table.to_numpy().ravel():
        assert not re.match(r"[=+\-@\t\r]", cell)
    assert set(table["reason"]) == {
        "",
        "unreadable photograph: of a format that is not read (a web page or XML): save it as JPEG",
    }


@pytest.fixture(scope="module")
def plotted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two branches with hostile names, tables and pictures."""
    repository = new_repository(tmp_path_factory.mktemp("plots") / "repository")
    plots_page.install(repository.folder)
    write_reports(repository.folder / "reports", seed=1, epochs=2)
    write_hostile_tables(repository)
    repository.commit("x")
    branches = [payload for payload in PAYLOADS if is_branch(repository, payload)]
    assert len(branches) >= 2
    for branch in branches:
        repository.run("git", "branch", branch)
    return repository.plots("diff", *branches)


def is_branch(repository: Repository, name: str) -> bool:
    try:
        repository.run("git", "check-ref-format", "--branch", name)
    except AssertionError:
        return False
    return True


def write_hostile_tables(repository: Repository) -> None:
    for model in MODELS:
        path = repository.folder / "reports" / model / "curves.csv"
        table = pd.read_csv(path).astype(str)
        for column in table:
            table[column] = PAYLOADS[: len(table)]
        table.to_csv(path, index=False)
    figures = repository.folder / "reports/figures"
    shutil.copy(figures / "quantities.png", figures / '" onerror="document.title=1.png')


def test_a_browser_runs_nothing_of_a_page_of_plots(plotted: Path, browser: Browser) -> None:
    text = plotted.read_text("utf-8")
    assert text.count(f"<script>{RUN}</script>") > 4

    page = open_plots(browser, plotted)

    assert page.evaluate("document.documentElement.dataset.run ?? null") is None
    assert page.evaluate("document.title") == "Warehouse classifier: plots"
    assert page.evaluate("location.protocol") == "file:"
    assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}
    assert page.evaluate("document.querySelectorAll('main script, main iframe, base').length") == 0
    shown = page.evaluate("document.querySelector('main').textContent")
    assert PAYLOADS[0] in shown


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Collects the output, and finally checks that it has no control characters."""
    texts: list[str] = []
    yield texts
    out, err = capsys.readouterr()
    texts += [out, err]
    assert [text for text in texts if not text.replace("\n", "").isprintable()] == []


@pytest.mark.usefixtures("workspace")
def test_a_stages_error_is_plain_text(terminal: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    objects = {f"metadata/{ESCAPES}{n}.json": b"{}" for n in range(3)}
    objects |= {"metadata/7.json": b"{}", "bin-images/7.jpg": b""}
    write_params(bucket_params(folder_bucket(Path("bucket"), objects)))
    monkeypatch.setattr(sys, "argv", ["index"])

    with pytest.raises(SystemExit) as ended:
        run_stage("index", index.main)

    terminal.append(str(ended.value.code))
    assert "whose key is not a path" in terminal[0]
    assert r"\x1b[2J" in terminal[0]
    assert "\n" not in terminal[0]


def test_errors_show_control_characters_as_their_escapes() -> None:
    text = str(UserError(f"{ESCAPES}\n\ud800 ä € ✓ 1"))

    assert text == r"\x1b]0;title\x07\x1b[2J\x9b31m\u202e\r\n\ud800 ä € ✓ 1"


@pytest.mark.usefixtures("workspace")
def test_an_audits_words_are_plain_text(terminal: list[str]) -> None:
    folder = Path("bins") / "photographs"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(square(1, 1))
    odd = folder / f"2{ESCAPES}.jpg"
    odd.touch()
    Path("counts.csv").write_text(f"id,expected,{ESCAPES}\n1,1,x\n")
    Path("wrong.csv").write_text(f"id,{ESCAPES}\n1,1\n")
    model = write_model("vit")

    codes = [run_audit(str(folder), "--expected", "counts.csv", "--model", str(model))]
    odd.unlink()
    codes += [
        run_audit(str(folder), "--expected", "wrong.csv", "--model", str(model)),
        run_audit(f"bins/{ESCAPES}", "--expected", "counts.csv", "--model", str(model)),
    ]
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": ESCAPES}))
    codes.append(run_audit(str(folder), "--expected", "counts.csv", "--model", str(model)))

    assert codes == [2, 2, 2, 2]
    assert terminal == []


@pytest.mark.usefixtures("workspace")
def test_a_key_of_params_is_named_in_plain_text() -> None:
    write_params({"resize.size": SIZE})
    text = Path("params.yaml").read_text("utf-8")
    Path("params.yaml").write_text(text + '"key\\e[2J": 1\n', "utf-8")

    with pytest.raises(UserError, match="there is no such key") as caught:
        load_params()

    assert str(caught.value).isprintable()
