"""The pipeline as DVC runs it: its graph, and all of it, end to end, on an S3 server."""

import ast
import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import transformers
from ruamel.yaml import YAML

from stages import report
from tests.project import ROOT, SETTINGS, Project, copy_working_tree

PIPELINE = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES = {name: stage.get("do", stage) for name, stage in PIPELINE["stages"].items()}
DATA_OUTPUTS = [
    "data/index.parquet",
    "data/index.json",
    "data/subset.parquet",
    "data/raw",
    "data/unfetched.csv",
    "data/resized",
    "data/quarantine.csv",
    "data/split.csv",
    "data/split.json",
]


def imported_files(source: Path) -> set[str]:
    """The project's own modules that this one imports, and theirs, as paths from the root."""
    found = {source.relative_to(ROOT).as_posix()}
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            path = ROOT / (module.replace(".", "/") + ".py")
            if module.startswith("stages.") and path.exists():
                found |= imported_files(path)
    return found


@pytest.mark.parametrize("name", STAGES)
def test_deps_cover_every_import(name: str) -> None:
    listed = {dep for dep in STAGES[name]["deps"] if dep.startswith("stages/")}
    code = {dep for dep in listed if dep.endswith(".py")}
    assert code == imported_files(ROOT / "stages" / f"{name}.py")


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_describes_itself_and_its_knobs_exist(name: str) -> None:
    assert STAGES[name]["desc"]
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    for key in STAGES[name].get("params", []):
        values = params
        for part in key.replace("${item.model}", "vit").split("."):
            values = values[part]


def test_the_report_depends_on_what_it_reads_of_each_model() -> None:
    (models,) = (block["models"] for block in PIPELINE["vars"])
    names = sorted(["metrics.json", *(f"{name}.csv" for name in report.TABLES)])
    stage = STAGES["report"]
    assert [dep for dep in stage["deps"] if dep.startswith("reports/")] == [
        f"reports/{model}/{name}" for model in models for name in names
    ]
    assert stage["params"][-2:] == [f"train.{model}" for model in models]


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


@pytest.mark.parametrize("model", ["resnet34", "vit"])
def test_each_model_is_trained_evaluated_and_loads(project: Project, model: str) -> None:
    metrics = project.metrics(model)
    assert {"accuracy", "rmse", "auroc", "found", "validation_accuracy"} < metrics.keys()
    assert metrics["test_bins"] == 20
    curves = pd.read_csv(project.folder / f"reports/{model}/curves.csv")
    assert curves["epoch"].tolist() == list(range(1, len(curves) + 1))
    assert (project.folder / f"models/{model}/model.safetensors").exists()
    assert f"# {model}" in (project.folder / f"models/{model}.md").read_text("utf-8")


def test_transformers_loads_the_vit_by_its_folder(project: Project) -> None:
    network = transformers.AutoModelForImageClassification.from_pretrained(
        project.folder / "models/vit"
    )
    assert network.config.id2label == {place: str(place + 1) for place in range(5)}


def test_nothing_is_left_to_do_and_nothing_unfinished_is_left(project: Project) -> None:
    assert "Data and pipelines are up to date" in project.run("dvc", "status")
    assert "is cached" not in project.run("dvc", "repro")
    assert "Running stage" not in project.run("dvc", "repro")
    assert not list((project.folder / ".cache").iterdir())
    assert project.run("git", "status", "--porcelain") == ""
    outputs = project.run("git", "ls-files", "data", "models", "reports").split()
    assert {path for path in outputs if not path.endswith(".gitignore")} == {
        "reports/resnet34/metrics.json",
        "reports/vit/metrics.json",
    }


def test_data_takes_its_space_once(project: Project) -> None:
    for path in ("data/resized/00000.parquet", "data/split.csv", "models/vit/model.safetensors"):
        assert (project.folder / path).stat().st_nlink == 2


def test_another_clone_makes_the_same_bytes(
    project: Project, endpoint: str, tmp_path: Path
) -> None:
    again = Project(tmp_path / "project", endpoint)
    again.experiment(*SETTINGS, f"bucket.endpoint={endpoint}")
    first, second = project.locked(), again.locked()
    assert {path: second[path] for path in DATA_OUTPUTS} == {
        path: first[path] for path in DATA_OUTPUTS
    }
    assert second == first


def test_a_knob_of_one_model_runs_that_model_only(project: Project) -> None:
    output = project.experiment("train.vit.learning_rate=1e-4")
    ran = [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
    assert ran == ["train@vit", "evaluate@vit", "report"]


def test_a_wrong_knob_stops_before_any_work(project: Project) -> None:
    command = ["dvc", "exp", "run", "--set-param", "resize.fit=crop"]
    done = subprocess.run(
        command,
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "resize.fit" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    project.run("git", "checkout", "--quiet", "params.yaml")


def test_a_colleague_pulls_what_was_pushed(project: Project, tmp_path: Path) -> None:
    project.run("git", "add", ".")
    project.run("git", "commit", "--quiet", "--allow-empty", "--message", "What is shared")
    project.run("dvc", "push")
    colleague = tmp_path / "colleague"
    project.run("git", "clone", "--quiet", str(project.folder), str(colleague))
    shutil.copy(project.folder / ".dvc/config.local", colleague / ".dvc/config.local")
    project.run("dvc", "--cd", str(colleague), "pull", "models/vit")
    assert (colleague / "models/vit/model.safetensors").exists()
    assert not (colleague / "models/resnet34").exists()
    project.run("dvc", "--cd", str(colleague), "pull")
    for path in ("models/resnet34/model.safetensors", "data/resized", "reports/index.html"):
        assert (colleague / path).exists()
