"""What README promises of DVC: which stages a knob runs, queues, sharing, and reading from outside.

The tests work in clones of the session's one project, whose pipeline has run.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dvc.api
import pandas as pd
import pytest
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from ruamel.yaml import YAML

from tests.project import ROOT, Clone, fresh_environment

# DVC's own.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")

yaml = YAML(typ="safe", pure=True)
PARAMS = yaml.load(ROOT / "params.yaml")
MODELS = [name for name, value in PARAMS["train"].items() if isinstance(value, dict)]

FROM_INDEX = "index subset fetch resize split train evaluate report"
FROM_SUBSET = "subset fetch resize split train evaluate report"
FROM_FETCH = "fetch resize split train evaluate report"
FROM_RESIZE = "resize split train evaluate report"
FROM_SPLIT = "split train evaluate report"
FROM_PRETRAINED = "pretrained train evaluate report"
FROM_TRAIN = "train evaluate report"
FROM_EVALUATE = "evaluate report"
NOTHING = ""
# Each key of params.yaml, with the stages that DVC runs when it changes: one that depends on it,
# and those after it, as long as what they read changes. A knob of one model runs that model only.
RUNS = {
    "executor": NOTHING,
    "bucket.url": FROM_INDEX,
    "bucket.region": FROM_INDEX,
    "bucket.endpoint": FROM_INDEX,
    "bucket.anonymous": FROM_INDEX,
    "index.max_rejects": FROM_INDEX,
    "subset.quantities": FROM_SUBSET,
    "subset.bins": FROM_SUBSET,
    "subset.seed": FROM_SUBSET,
    "fetch.shard_bins": FROM_FETCH,
    "fetch.max_rejects": FROM_FETCH,
    "resize.size": FROM_RESIZE,
    "resize.fit": FROM_RESIZE,
    "resize.quality": FROM_RESIZE,
    "resize.max_rejects": FROM_RESIZE,
    "split.train": FROM_SPLIT,
    "split.test": FROM_SPLIT,
    "split.validation": FROM_SPLIT,
    "split.by": FROM_SPLIT,
    "split.seed": FROM_SPLIT,
    "run.processes": NOTHING,
    "run.checkpoint_minutes": NOTHING,
    "run.deterministic": FROM_TRAIN,
    "train.MODEL.library": FROM_PRETRAINED,
    "train.MODEL.name": FROM_PRETRAINED,
    "train.MODEL.revision": FROM_PRETRAINED,
    "train.MODEL.pretrained": FROM_PRETRAINED,
    "train.MODEL.config": FROM_TRAIN,
    "train.MODEL.freeze_backbone": FROM_TRAIN,
    "train.MODEL.loss": FROM_TRAIN,
    "train.MODEL.label_smoothing": FROM_TRAIN,
    "train.MODEL.optimizer": FROM_TRAIN,
    "train.MODEL.learning_rate": FROM_TRAIN,
    "train.MODEL.weight_decay": FROM_TRAIN,
    "train.MODEL.schedule": FROM_TRAIN,
    "train.MODEL.warmup_steps": FROM_TRAIN,
    "train.MODEL.clip_norm": FROM_TRAIN,
    "train.MODEL.ema_decay": FROM_TRAIN,
    "train.MODEL.batch_size": FROM_TRAIN,
    "train.MODEL.accumulation": FROM_TRAIN,
    "train.MODEL.epochs": FROM_TRAIN,
    "train.MODEL.mean": FROM_TRAIN,
    "train.MODEL.std": FROM_TRAIN,
    "train.MODEL.horizontal_flip": FROM_TRAIN,
    "train.MODEL.color_jitter": FROM_TRAIN,
    "train.MODEL.compile": FROM_TRAIN,
    "train.MODEL.seed": FROM_TRAIN,
    # For speed only, but nothing tells DVC so.
    "evaluate.batch_size": FROM_EVALUATE,
    "evaluate.false_alarm": FROM_EVALUATE,
}


def knobs() -> Iterator[tuple[str, str]]:
    """Each key of params.yaml and its row in RUNS."""
    for block, values in PARAMS.items():
        if not isinstance(values, dict):
            yield block, block
            continue
        for key, value in values.items():
            if key in MODELS:
                yield from ((f"{block}.{key}.{knob}", f"{block}.MODEL.{knob}") for knob in value)
            else:
                yield f"{block}.{key}", f"{block}.{key}"


class Pipeline:
    """The stages as DVC understands dvc.yaml."""

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

    def depending_on(self, knob: str) -> set[str]:
        return {
            stage
            for stage, params in self.params.items()
            if any(f"{knob}.".startswith(f"{param}.") for param in params)
        }

    def run_by(self, knob: str) -> set[str]:
        first = self.depending_on(knob)
        return first.union(*(self.after[stage] for stage in first))


def later_stages(graph: Any, stage: Any) -> set[str]:
    nearest = list(graph.predecessors(stage))
    return {later.addressing for later in nearest}.union(
        *(later_stages(graph, later) for later in nearest)
    )


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    with Repo(str(ROOT)) as repo:
        return Pipeline(repo.index.graph)


@pytest.mark.parametrize(("knob", "row"), list(knobs()))
def test_a_knob_runs_the_stages_that_it_changes(knob: str, row: str, pipeline: Pipeline) -> None:
    assert row in RUNS, "a new knob wants a row in RUNS"
    models = [model for model in MODELS if knob.startswith(f"train.{model}.")] or MODELS
    expected = set()
    for name in RUNS[row].split():
        of_models = {f"{name}@{model}" for model in models}
        expected |= of_models if of_models & pipeline.after.keys() else {name}
    assert pipeline.run_by(knob) == expected


def test_no_row_is_of_a_knob_that_is_gone() -> None:
    assert RUNS.keys() == {row for _, row in knobs()}


@pytest.fixture(scope="module")
def workplace(project: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone at the project's first run, with its cache, pushed to the remote."""
    place = project.clone(tmp_path_factory.mktemp("workflows") / "workplace")
    place.run("git", "checkout", "--quiet", "-B", "main", "first-run")
    place.run("dvc", "cache", "dir", "--local", str(project.folder / ".dvc/cache"))
    place.run("dvc", "checkout", "--quiet")
    place.run("dvc", "push", "--quiet")
    return place


def test_dvc_agrees_about_what_a_knob_changes(workplace: Clone, pipeline: Pipeline) -> None:
    path = workplace.folder / "params.yaml"
    changed = yaml.load(path)
    changed["resize"]["quality"] -= 1
    changed["train"]["processes"] = 1
    changed["train"]["vit"]["seed"] += 1
    yaml.dump(changed, path)
    try:
        status = json.loads(workplace.run("dvc", "status", "--json"))
    finally:
        workplace.run("git", "checkout", "--quiet", "params.yaml")
    assert status.keys() == {
        *pipeline.depending_on("resize.quality"),
        *pipeline.depending_on("train.vit.seed"),
    }


def experiments(place: Clone) -> dict[str, dict[str, Any]]:
    """What `dvc exp show` knows of each experiment of HEAD, by its name."""
    _, head = json.loads(place.run("dvc", "exp", "show", "--json"))
    revisions = [experiment["revs"][0] for experiment in head["experiments"] or []]
    return {revision["name"]: revision["data"] for revision in revisions}


def param(data: dict[str, Any], key: str) -> Any:
    value = data["params"]["params.yaml"]["data"]
    for part in key.split("."):
        value = value[part]
    return value


def queue(place: Clone, name: str, setting: str) -> None:
    place.run("dvc", "exp", "run", "--queue", "--name", name, "--set-param", setting)


def test_sweeps_run_in_the_queue(workplace: Clone) -> None:
    cache = workplace.folder / ".cache"
    shutil.rmtree(cache, ignore_errors=True)
    queue(workplace, "rejects", "fetch.max_rejects=choice(0.06,0.07)")
    queue(workplace, "minutes", "run.checkpoint_minutes=range(11,13)")
    text = workplace.run("dvc", "exp", "run", "--run-all")
    assert stages_run(text) == ["fetch", "fetch"]
    found = experiments(workplace)
    values = [param(found[f"rejects-{number}"], "fetch.max_rejects") for number in (1, 2)]
    assert values == [0.06, 0.07]
    values = [param(found[f"minutes-{number}"], "run.checkpoint_minutes") for number in (1, 2)]
    assert values == [11, 12]
    assert set(found["rejects-1"]["metrics"]) == {
        f"reports/{model}/metrics.json" for model in MODELS
    }
    # The stage worked in the repository's, not in that of the queue's temporary copy, and its work
    # stays until a next stage finds that DVC has its outputs.
    assert {path.name.partition("-")[0] for path in cache.iterdir()} == {"fetch"}
    workplace.run("dvc", "repro", "--force", "--single-item", "subset")
    assert list(cache.iterdir()) == []
    assert workplace.run("git", "status", "--porcelain") == ""


LEARNING_RATE = "train.vit.learning_rate"


@pytest.fixture(scope="module")
def shared(workplace: Clone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare git repository with an experiment, a branch made of it, and a version of the model.

    The experiment has another learning rate, and trained in a temporary folder.
    """
    bare = tmp_path_factory.mktemp("shared") / "project.git"
    workplace.run("git", "clone", "--quiet", "--bare", str(workplace.folder), str(bare))
    workplace.run("git", "remote", "add", "shared", str(bare))
    words = ["--temp", "--name", "fast", "--set-param", f"{LEARNING_RATE}=1e-3", "train@vit"]
    text = workplace.run("dvc", "exp", "run", *words)
    assert stages_run(text) == ["train@vit"]
    assert workplace.run("git", "status", "--porcelain") == ""
    workplace.run("dvc", "exp", "push", "shared", "fast")
    workplace.run("dvc", "exp", "branch", "fast", "faster")
    # A version of a model is a tag, which must be annotated.
    workplace.run("git", "tag", "--annotate", "vit@v1.0.0", "--message", "The first", "main")
    workplace.run("git", "push", "--quiet", "shared", "main", "faster", "vit@v1.0.0")
    workplace.run("dvc", "push", "--quiet", "--run-cache")
    return bare


def stages_run(text: str) -> list[str]:
    return [line.split("'")[1] for line in text.splitlines() if line.startswith("Running stage")]


def outputs(place: Clone) -> set[str]:
    """The outputs of DVC's that are there."""
    return {path for path in place.locked() if (place.folder / path).exists()}


def test_a_colleague_pulls_one_model_and_one_evaluation(shared: Path, workplace: Clone) -> None:
    colleague = workplace.clone(shared.with_name("pulling"), shared)
    in_git = outputs(colleague)
    colleague.run("dvc", "pull", "models/vit")
    assert outputs(colleague) - in_git == {"models/vit"}
    colleague.run("dvc", "pull", "evaluate@vit")
    evaluation = yaml.load(colleague.folder / "dvc.lock")["stages"]["evaluate@vit"]["outs"]
    wanted = {"models/vit"}.union(out["path"] for out in evaluation)
    assert outputs(colleague) - in_git == wanted - in_git


def test_a_colleague_goes_back_to_an_earlier_value_without_training(
    shared: Path, workplace: Clone
) -> None:
    colleague = workplace.clone(shared.with_name("going-back"), shared)
    colleague.run("git", "checkout", "--quiet", "faster")
    rate = yaml.load(workplace.folder / "params.yaml")["train"]["vit"]["learning_rate"]
    assert yaml.load(colleague.folder / "params.yaml")["train"]["vit"]["learning_rate"] != rate
    words = ["--pull", "--allow-missing", "--set-param", f"{LEARNING_RATE}={rate}"]
    text = colleague.run("dvc", "exp", "run", *words)
    assert "Stage 'train@vit' is cached - skipping run, checking out outputs" in text
    assert "train@vit" not in stages_run(text)
    assert colleague.locked()["models/vit"] == workplace.locked()["models/vit"]
    assert (colleague.folder / "models/vit/model.safetensors").exists()


def test_a_colleague_takes_an_experiment(shared: Path, workplace: Clone) -> None:
    colleague = workplace.clone(shared.with_name("taking"), shared)
    assert "fast" in colleague.run("dvc", "exp", "list", "origin")
    colleague.run("dvc", "exp", "pull", "origin", "fast")
    colleague.run("dvc", "exp", "apply", "fast")
    assert yaml.load(colleague.folder / "params.yaml")["train"]["vit"]["learning_rate"] == 1e-3
    assert colleague.locked()["models/vit"] != workplace.locked()["models/vit"]
    assert (colleague.folder / "models/vit/model.safetensors").exists()


def test_a_model_is_had_from_outside(shared: Path, workplace: Clone, tmp_path: Path) -> None:
    settings = ["--config", str(workplace.folder / ".dvc/config.local")]
    outside = ["dvc", "--cd", str(tmp_path)]
    workplace.run(*outside, "get", *settings, str(shared), "models/vit", "--out", "now")
    workplace.run(*outside, "artifacts", "get", *settings, str(shared), "vit", "--out", "v1")
    model = (workplace.folder / "models/vit/model.safetensors").read_bytes()
    for name in ("now", "v1"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == model


def test_a_shard_is_read_from_outside(shared: Path, workplace: Clone) -> None:
    with Repo(str(workplace.folder)) as repo:
        remote = dict(repo.config["remote"]["storage"])
    path = "data/resized/00000.parquet"
    with dvc.api.open(path, repo=str(shared), mode="rb", remote_config=remote) as file:
        shard = pd.read_parquet(file)
    pd.testing.assert_frame_equal(shard, pd.read_parquet(workplace.folder / path))
    split = dvc.api.read("data/split.csv", repo=str(shared), remote_config=remote)
    assert split == (workplace.folder / "data/split.csv").read_text("utf-8")


# Two of them meet, so that no worker gets both.
SEE_GPU = """\
stages:
  see:
    cmd: >-
      echo $CUDA_VISIBLE_DEVICES | tee seen.txt > $MEETING/${number};
      for i in $(seq 600); do test $(ls $MEETING | wc -l) = 2 && break; sleep 0.1; done
    params: [number]
    outs: [seen.txt]
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Clone:
    """A repository with a stage that writes which GPU it sees."""
    for name in ("tiny", "home", "meeting"):
        (tmp_path / name).mkdir()
    more = {"MEETING": str(tmp_path / "meeting"), "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "tiny"
    place = Clone(folder, fresh_environment(tmp_path / "home") | more)
    place.run("git", "init", "--quiet")
    place.identify()
    place.run("dvc", "init", "--quiet")
    (folder / "dvc.yaml").write_text(SEE_GPU)
    (folder / "params.yaml").write_text("number: 0\n")
    place.run("git", "add", ".")
    place.run("git", "commit", "--quiet", "--message", "Everything")
    return place


# The workers end by themselves, when they have seen no more work for ten seconds. `dvc queue stop`
# would end the next ones too, if these had just ended.
@pytest.mark.parametrize(
    ("start", "gpus"),
    [
        ([sys.executable, "-m", "tools.queue_workers", "7", "9"], ["7", "9"]),
        (["dvc", "queue", "start", "--jobs", "2"], ["3", "3"]),
    ],
)
def test_each_of_our_workers_has_its_own_gpu(
    tiny: Clone, tmp_path: Path, start: list[str], gpus: list[str]
) -> None:
    tiny.environment["CUDA_VISIBLE_DEVICES"] = "3"
    queue(tiny, "see", "number=range(1,3)")
    tiny.run(*start)
    deadline = time.monotonic() + 120
    while tiny.run("git", "for-each-ref", "refs/exps").count("/see-") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    meeting = tmp_path / "meeting"
    assert sorted((meeting / number).read_text().strip() for number in ("1", "2")) == gpus


def test_no_gpu_no_workers(tiny: Clone) -> None:
    tiny.environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "tools.queue_workers"],
        cwd=tiny.folder,
        env=tiny.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("queue_workers: error: no GPU")


CI = yaml.load(ROOT / ".github/workflows/ci.yml")
CI_STEPS = [step for job in CI["jobs"].values() for step in job["steps"]]


def test_the_ci_may_only_read_and_its_actions_are_pinned() -> None:
    assert CI["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and job["timeout-minutes"] for job in CI["jobs"].values())
    used = [step["uses"] for step in CI_STEPS if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", name) for name in used)


def test_the_ci_runs_what_the_makefile_has() -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    scripts = [step.get("run", "") for step in CI_STEPS]
    made = {name for script in scripts for name in re.findall(r"make ([a-z-]+)", script)}
    assert made == {"setup", "check", "test", "lock"}
    assert made <= set(targets)


def run_ci_step(place: Clone, name: str) -> tuple[int, str]:
    """The exit code of a step of the CI, and what it adds to the summary."""
    (script,) = (step["run"] for step in CI_STEPS if step.get("name") == name)
    summary = place.folder.with_name(f"{place.folder.name}-summary.md")
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=place.folder,
        env=place.environment | {"GITHUB_STEP_SUMMARY": str(summary)},
        check=False,
    )
    return done.returncode, summary.read_text() if summary.exists() else ""


def test_the_ci_finds_a_lock_of_other_params(shared: Path, workplace: Clone) -> None:
    lock_step = "dvc.lock is of this code and these params"
    # As the CI has it: without data, and without the settings of anybody.
    clone = workplace.clone(shared.with_name("checked-out"), shared)
    (clone.folder / ".dvc/config.local").unlink()
    assert run_ci_step(clone, lock_step) == (0, "")
    path = clone.folder / "params.yaml"
    params = yaml.load(path)
    params["resize"]["quality"] -= 1
    yaml.dump(params, path)
    code, summary = run_ci_step(clone, lock_step)
    assert code == 1
    assert summary.startswith("dvc.lock is of other code or params")


def test_the_ci_shows_params_and_metrics(shared: Path, workplace: Clone) -> None:
    clone = workplace.clone(shared.with_name("compared"), shared)
    clone.run("git", "checkout", "--quiet", "faster")
    code, summary = run_ci_step(clone, "Metrics and params")
    assert code == 0
    assert "| params.yaml | train.vit.learning_rate |" in summary
