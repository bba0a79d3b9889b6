"""The pipeline as DVC runs it: its graph, and all of it, end to end, on an S3 server."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import transformers
from ruamel.yaml import YAML

from tools.drawing import drawn_bins
from tools.s3 import CLIENT_ENVIRONMENT, serving

ROOT = Path(__file__).parent.parent
STAGES = {
    name: stage.get("do", stage)
    for name, stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items()
}
DRAWN_BINS = 160
SETTINGS = [
    "bucket.url=s3://bins",
    "index.max_rejects=0.05",
    "subset.bins=70",
    "fetch.shard_bins=30",
    "resize.size=32",
    "resize.max_rejects=0.05",
    "split.train=48",
    "split.test=20",
    "train.resnet34.pretrained=false",
    "train.resnet34.batch_size=16",
    "train.resnet34.epochs=1",
    "train.vit.pretrained=false",
    "+train.vit.config.hidden_size=32",
    "+train.vit.config.intermediate_size=32",
    "+train.vit.config.num_hidden_layers=1",
    "+train.vit.config.num_attention_heads=2",
    "+train.vit.config.patch_size=8",
    "train.vit.batch_size=16",
    "train.vit.epochs=2",
    "train.vit.warmup_steps=1",
]
DATA_OUTPUTS = [
    "data/index.parquet",
    "data/index.json",
    "data/subset.parquet",
    "data/raw",
    "data/unfetched.csv",
    "data/resized",
    "data/quarantine.csv",
    "data/split.csv",
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


class Project:
    """A clone of the working tree, with the DVC remote in a bucket of the server."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns(
            ".git", ".venv", ".cache", "demo", "cache", "tmp", "*.lock"
        )
        shutil.copytree(ROOT, folder, ignore=ignored)
        # As on a fresh machine: no configuration of the user's, no credentials.
        home = folder.with_name(f"{folder.name}-home")
        home.mkdir()
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            **CLIENT_ENVIRONMENT,
        }
        self.run("git", "init", "--quiet", "--initial-branch=main")
        self.run("git", "config", "user.name", "Test")
        self.run("git", "config", "user.email", "test@localhost")
        self.run("git", "add", ".")
        self.run("git", "commit", "--quiet", "--message", "Everything")
        for key, value in {
            "url": "s3://storage",
            "endpointurl": endpoint,
            "access_key_id": "test",
            "secret_access_key": "test",
        }.items():
            self.run("dvc", "remote", "modify", "--local", "storage", key, value)

    def run(self, *command: str) -> str:
        """The command's output; a failure shows it."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command} failed:\n{done.stdout}"
        return done.stdout

    def experiment(self, *settings: str) -> str:
        words = [word for setting in settings for word in ("--set-param", setting)]
        return self.run("dvc", "exp", "run", *words)

    def locked(self) -> dict[str, str]:
        """The MD5 of every output by its path, from dvc.lock."""
        lock = YAML(typ="safe").load(self.folder / "dvc.lock")
        return {
            out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]
        }

    def metrics(self, model: str) -> dict[str, Any]:
        text = (self.folder / f"reports/{model}/metrics.json").read_text("utf-8")
        values: dict[str, Any] = json.loads(text)
        return values


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server with drawn bins, a truncated photograph and a garbled record."""
    buckets = tmp_path_factory.mktemp("server") / "s3"
    for folder in ("storage", "bins/bin-images", "bins/metadata"):
        (buckets / folder).mkdir(parents=True)
    for drawn in drawn_bins(DRAWN_BINS, seed=3):
        photograph, record = drawn.photograph, drawn.record
        if drawn.id == "00040":
            record = b"not a record"
        if drawn.id == "00007":
            photograph = photograph[:2000]
        (buckets / f"bins/bin-images/{drawn.id}.jpg").write_bytes(photograph)
        (buckets / f"bins/metadata/{drawn.id}.json").write_bytes(record)
    with serving(buckets) as url:
        yield url


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Project:
    """A project in which the whole pipeline has run once, and is committed."""
    project = Project(tmp_path_factory.mktemp("first") / "project", endpoint)
    project.experiment(*SETTINGS, f"bucket.endpoint={endpoint}")
    project.run("git", "add", ".")
    project.run("git", "commit", "--quiet", "--message", "A run")
    return project


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
    names = ["accuracy", "majority_accuracy", "rmse", "mae", "within_one", "macro_f1"]
    assert list(metrics) == [*names, "test_bins"]
    assert metrics["test_bins"] == 20
    curves = pd.read_csv(project.folder / f"reports/{model}/curves.csv")
    assert curves["epoch"].tolist() == list(range(1, len(curves) + 1))
    assert (project.folder / f"models/{model}/model.safetensors").exists()


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
