"""dvc.yaml compared with the code and params.yaml, and the results of the whole pipeline."""

import ast
import json
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import transformers
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from ruamel.yaml import YAML

from stages.formats.tables import read_csv
from stages.scoring.ensemble import average
from stages.scoring.scored import Scored
from tests.project import ROOT, Project, copy_working_tree

# DVC's own.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")

yaml = YAML(typ="safe", pure=True)
PARAMS = yaml.load(ROOT / "params.yaml")
MODELS = list(PARAMS["train"])
STAGES = {
    name: stage.get("do", stage) for name, stage in yaml.load(ROOT / "dvc.yaml")["stages"].items()
}
CODE = ROOT / "stages"
RUNTIME = CODE / "runtime"


def imports_of(source: Path) -> set[Path]:
    """The files below stages/ that this file imports, also inside functions."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    paths = [ROOT / module.replace(".", "/") for module in modules if module.startswith("stages.")]
    files = [path.with_suffix(".py") for path in paths] + [path / "__init__.py" for path in paths]
    return {file for file in files if file.exists()}


def imported_files(source: Path) -> set[Path]:
    """The file itself, and all files that it imports directly or indirectly."""
    found: set[Path] = set()
    new = {source}
    while new:
        found |= new
        new = {file for source in new for file in imports_of(source)} - found
    return found


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_the_stage_and_the_packages_that_it_imports_from(name: str) -> None:
    files = imported_files(CODE / f"{name}.py")
    packages = {file if file.parent == CODE else file.parent for file in files} - {RUNTIME}
    code = {ROOT / dep for dep in STAGES[name]["deps"] if dep.startswith("stages/")}
    assert code == packages


def test_the_stages_that_read_lists_depend_on_their_folder() -> None:
    reading = {
        name for name in STAGES if CODE / "sampling/lists.py" in imported_files(CODE / f"{name}.py")
    }
    assert reading == {name for name in STAGES if "lists" in STAGES[name]["deps"]}
    assert (ROOT / "lists/README.md").exists(), "DVC needs the folder in every clone"


def test_packages_import_in_one_direction() -> None:
    imported: dict[Path, set[Path]] = {}
    for source in CODE.glob("*/*.py"):
        packages = {file.parent for file in imports_of(source)} - {source.parent}
        imported.setdefault(source.parent, set()).update(packages)
    assert imported[RUNTIME] == set()
    order = list(TopologicalSorter(imported).static_order())  # raises if there is a cycle
    assert CODE not in order, "a package imports a stage"


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_describes_itself_and_its_knobs_exist(name: str) -> None:
    assert STAGES[name]["desc"]
    for model in MODELS:
        for key in STAGES[name].get("params", []):
            params_value(key.replace("${key}", model))


@pytest.mark.parametrize("name", STAGES)
def test_no_knob_has_a_name_that_dvcs_run_cache_ignores(name: str) -> None:
    """It ignores every key `size` or `nfiles` inside a value when it compares (dvc#10296)."""
    for model in MODELS:
        for key in STAGES[name].get("params", []):
            value = params_value(key.replace("${key}", model))
            assert not {"size", "nfiles"} & set(nested_keys(value)), f"list the keys of {key}"


def params_value(key: str) -> Any:
    value = PARAMS
    for part in key.split("."):
        value = value[part]
    return value


def nested_keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from nested_keys(part)


def reports_of(*stages: str) -> list[str]:
    """The outputs of these stages in reports/."""
    paths = [
        path if isinstance(path, str) else next(iter(path))
        for name in stages
        for kind in ("outs", "metrics", "plots")
        for path in STAGES[name].get(kind, [])
    ]
    return sorted(path for path in paths if path.startswith("reports/"))


def test_the_report_depends_on_all_reports_of_each_model() -> None:
    templates = reports_of("train", "evaluate")
    assert [dep for dep in STAGES["report"]["deps"] if dep.startswith("reports/")] == [
        *reports_of("baseline"),
        *reports_of("ensemble"),
        *(path.replace("${key}", model) for model in MODELS for path in templates),
        *reports_of("witness"),
    ]
    of_models = [key for key in STAGES["report"]["params"] if key.startswith("train.")]
    assert of_models == [f"train.{model}" for model in MODELS]
    assert len(templates) + 1 <= 8, "the lines of a third model in the report's deps and params"


def test_the_ensemble_depends_on_the_tables_of_each_model() -> None:
    assert [dep for dep in STAGES["ensemble"]["deps"] if dep.startswith("reports/")] == [
        f"reports/{model}/{name}" for model in MODELS for name in ("metrics.json", "tables")
    ]


FROM_INDEX = "index subset fetch resize split train evaluate baseline ensemble witness report"
FROM_SUBSET = "subset fetch resize split train evaluate baseline ensemble witness report"
FROM_FETCH = "fetch resize split train evaluate baseline ensemble witness report"
FROM_RESIZE = "resize split train evaluate baseline ensemble witness report"
FROM_SPLIT = "split train evaluate baseline ensemble witness report"
FROM_PRETRAINED = "pretrained train evaluate ensemble witness report"
FROM_TRAIN = "train evaluate ensemble witness report"
FROM_EVALUATE = "evaluate baseline ensemble witness report"
FROM_BATCH_SIZE = "evaluate ensemble witness report"
NOTHING = ""
# The stages that DVC runs if a key of params.yaml changes: those that depend on it, and later ones
# if their inputs change. A knob of one model runs only that model.
RUNS = {
    "bucket": FROM_INDEX,
    "index": FROM_INDEX,
    "subset": FROM_SUBSET,
    "fetch": FROM_FETCH,
    "resize": FROM_RESIZE,
    "split": FROM_SPLIT,
    "train.MODEL": FROM_TRAIN,
    "train.MODEL.library": FROM_PRETRAINED,
    "train.MODEL.name": FROM_PRETRAINED,
    "train.MODEL.revision": FROM_PRETRAINED,
    "train.MODEL.pretrained": FROM_PRETRAINED,
    "run": NOTHING,
    "run.deterministic": FROM_TRAIN,
    "evaluate": FROM_EVALUATE,
    # It only affects speed, as DVC cannot know.
    "evaluate.batch_size": FROM_BATCH_SIZE,
}


def settings() -> Iterator[tuple[str, str]]:
    """Each key of params.yaml, and the most precise row of RUNS for it."""
    keys = [f"{block}.{key}" for block in PARAMS for key in PARAMS[block] if block != "train"]
    keys += [f"train.{model}.{key}" for model in MODELS for key in PARAMS["train"][model]]
    for key in keys:
        block, name, *rest = key.split(".")
        full = f"train.MODEL.{rest[0]}" if block == "train" else f"{block}.{name}"
        yield key, full if full in RUNS else full.rpartition(".")[0]


class Graph:
    """The graph of stages, as DVC reads dvc.yaml."""

    def __init__(self, graph: Any) -> None:
        self.after = {stage.addressing: later_stages(graph, stage) for stage in graph}
        self.params = {
            stage.addressing: [
                param
                for dep in stage.deps
                if isinstance(dep, ParamsDependency)
                for param in dep.params
            ]
            for stage in graph
        }

    def run_by(self, knob: str) -> set[str]:
        first = {
            stage
            for stage, params in self.params.items()
            if any(f"{knob}.".startswith(f"{param}.") for param in params)
        }
        return first.union(*(self.after[stage] for stage in first))


def later_stages(graph: Any, stage: Any) -> set[str]:
    nearest = list(graph.predecessors(stage))
    return {later.addressing for later in nearest}.union(
        *(later_stages(graph, later) for later in nearest)
    )


@pytest.fixture(scope="module")
def graph() -> Graph:
    with Repo(str(ROOT)) as repo:
        return Graph(repo.index.graph)


@pytest.mark.parametrize(("knob", "row"), list(settings()))
def test_a_knob_runs_the_stages_that_it_changes(knob: str, row: str, graph: Graph) -> None:
    models = [model for model in MODELS if knob.startswith(f"train.{model}.")] or MODELS
    expected = set()
    for name in RUNS[row].split():
        of_models = {f"{name}@{model}" for model in models}
        expected |= of_models if of_models & graph.after.keys() else {name}
    assert graph.run_by(knob) == expected


def test_a_project_has_the_working_tree_without_outputs_and_settings(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    files = {
        ".gitignore": "/data",
        ".dvc/.gitignore": "/config.local",
        ".dvc/config.local": "[core]",
        "data/index.json": "{}",
        "dvc.lock": "schema: '2.0'",
        "committed.py": "before",
        "deleted.py": "",
    }
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=source, check=True)
    (source / "committed.py").write_text("changed")
    (source / "deleted.py").unlink()
    (source / "new é.py").write_text("")
    copy_working_tree(source, target)
    copied = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert copied == {".gitignore", ".dvc/.gitignore", "committed.py", "new é.py"}
    assert (target / "committed.py").read_text() == "changed"


def test_a_clone_that_converts_line_endings_has_the_same_bytes(tmp_path: Path) -> None:
    """Otherwise DVC, which compares the bytes of code too, would run every stage again."""
    source, clone = tmp_path / "source", tmp_path / "clone"
    copy_working_tree(ROOT, source)
    identity = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "All"]):
        subprocess.run(["git", *identity, *command], cwd=source, check=True)
    converting = ["-c", "core.autocrlf=true", "-c", "core.eol=crlf"]

    command = ["git", "clone", "--quiet", *converting, str(source), str(clone)]
    subprocess.run(command, check=True)

    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    tracked = [path for path in files if path.parts[0] != ".git"]
    assert len(tracked) > 100
    for path in tracked:
        assert (clone / path).read_bytes() == (source / path).read_bytes(), path


@pytest.mark.slow
def test_every_bin_is_accounted_for(project: Project) -> None:
    counts = json.loads((project.folder / "data/index.json").read_text("utf-8"))
    assert counts["rejected"] == {"not JSON": 1}
    assert counts["records"] == counts["indexed"] + 1
    subset = pd.read_parquet(project.folder / "data/subset.parquet")
    resized = pd.read_parquet(project.folder / "data/resized")
    quarantine = pd.read_csv(project.folder / "data/quarantine.csv", dtype=str)
    assert len(subset) == 70
    assert {*resized["id"], *quarantine["id"]} == set(subset["id"])
    assert len(resized) + len(quarantine) == 70


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_each_model_is_trained_evaluated_and_loads(project: Project, model: str) -> None:
    metrics = project.metrics(model)
    assert {"accuracy", "rmse", "auroc", "found", "validation_accuracy"} < metrics.keys()
    assert metrics["test_bins"] == 20
    curves = pd.read_csv(project.folder / f"reports/{model}/curves.csv")
    assert curves["epoch"].tolist() == list(range(1, len(curves) + 1))
    assert (project.folder / f"models/{model}/model.safetensors").exists()
    assert f"# {model}" in (project.folder / f"models/{model}.md").read_text("utf-8")


@pytest.mark.slow
def test_the_ensemble_is_the_average_that_the_audit_uses(project: Project) -> None:
    assert project.metrics("ensemble")["test_bins"] == 20
    of_models = [Scored.from_table(predictions(project, model)) for model in MODELS]
    ensemble = predictions(project, "ensemble")
    mean = average(of_models)
    calibration = read_csv(project.folder / "reports/ensemble/tables/calibration.csv")
    expected = mean.with_temperature(calibration["temperature"].iloc[1]).table()
    pd.testing.assert_frame_equal(ensemble, expected, rtol=1e-5)


def predictions(project: Project, model: str) -> pd.DataFrame:
    return read_csv(project.folder / f"reports/{model}/tables/predictions.csv")


@pytest.mark.slow
def test_transformers_loads_the_vit_by_its_folder(project: Project) -> None:
    network = transformers.AutoModelForImageClassification.from_pretrained(
        project.folder / "models/vit"
    )
    assert network.config.id2label == {position: str(position + 1) for position in range(5)}


@pytest.mark.slow
def test_nothing_is_left_to_do_and_nothing_unfinished_is_left(project: Project) -> None:
    assert (project.folder / "stages/reporting/__pycache__").exists()
    text = project.run("dvc", "repro")
    assert "Data and pipelines are up to date" in text
    assert "Running stage" not in text
    assert not list((project.folder / ".cache").iterdir())
    assert project.run("git", "status", "--porcelain") == ""
    outputs = project.run("git", "ls-files", "data", "models", "reports").split()
    assert {path for path in outputs if not path.endswith(".gitignore")} == {
        f"reports/{model}/metrics.json" for model in [*MODELS, "baseline", "ensemble", "witness"]
    }


@pytest.mark.slow
def test_data_takes_space_only_once(project: Project) -> None:
    cached = {path.stat().st_ino for path in (project.folder / ".dvc/cache").rglob("*")}
    for path in ("data/resized/00000.parquet", "data/split.csv", "models/vit/model.safetensors"):
        assert (project.folder / path).stat().st_ino in cached


@pytest.mark.slow
def test_a_comment_runs_the_stages_whose_outputs_the_code_decides(
    project: Project, tmp_path: Path
) -> None:
    copy = project.copy(tmp_path / "copy")
    for package, stages in [("runtime", []), ("reporting", ["report"])]:
        for source in (copy.folder / "stages" / package).glob("*.py"):
            source.write_text(source.read_text("utf-8") + "# A comment.\n", "utf-8")
        text = copy.run("dvc", "repro", "--dry")
        assert ("Data and pipelines are up to date" in text) == (stages == [])
        assert copy.stages_run(text) == stages
