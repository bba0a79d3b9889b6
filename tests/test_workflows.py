"""The README's promises about DVC: settings, queues, a third model, sharing, outside access.

The tests work in copies and clones of the session's one project, whose pipeline has run.
"""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dvc.api
import pandas as pd
import pytest
import torch
import torchvision
from dvc.repo import Repo
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from stages.runtime.files import sha256_file
from tests.project import ROOT, SETTINGS, Clone, Project, fresh_environment

pytestmark = [
    pytest.mark.slow,
    # DVC's own.
    pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning"),
]

yaml = YAML(typ="safe", pure=True)
MODELS = list(yaml.load(ROOT / "params.yaml")["train"])
LEARNING_RATE = "train.vit.learning_rate"


def change_params(clone: Clone, changes: dict[str, Any]) -> None:
    """Edit params.yaml as a user would; `changes` has dotted keys."""
    path = clone.folder / "params.yaml"
    values = yaml.load(path)
    for key, value in changes.items():
        *blocks, last = key.split(".")
        block = values
        for name in blocks:
            block = block[name]
        block[last] = value
    yaml.dump(values, path)


@pytest.fixture
def clone(project: Project, tmp_path: Path) -> Clone:
    """The project after its first run, for one test."""
    return project.copy(tmp_path / "clone")


def test_another_clone_makes_the_same_bytes(
    project: Project, endpoint: str, tmp_path: Path
) -> None:
    again = Project(tmp_path / "project", endpoint)
    again.experiment(*SETTINGS, f"bucket.endpoint={endpoint}")
    assert again.locked() == project.locked()


def test_a_knob_of_one_model_runs_that_model_only(clone: Clone) -> None:
    text = clone.experiment(f"{LEARNING_RATE}=1e-4")
    assert clone.stages_run(text) == ["train@vit", "evaluate@vit", "ensemble", "witness", "report"]


def test_dvc_status_names_the_stages_that_changed_knobs_run(clone: Clone) -> None:
    change_params(clone, {"resize.quality": 89, "run.processes": 1, "train.vit.seed": 1})
    status = json.loads(clone.run("dvc", "status", "--json"))
    trained = {f"train@{model}" for model in MODELS}
    assert status.keys() == {"resize", *trained, "evaluate@vit", "report", "witness"}


def test_a_wrong_knob_stops_before_any_work(clone: Clone) -> None:
    done = subprocess.run(
        ["dvc", "exp", "run", "--set-param", "resize.fit=crop"],
        cwd=clone.folder,
        env=clone.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "resize.fit" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_another_size_resizes_and_so_does_the_previous_one(clone: Clone) -> None:
    for size in (48, 32):
        clone.run("dvc", "exp", "run", "--set-param", f"resize.size={size}", "resize")
        images = pd.read_parquet(clone.folder / "data/resized")["image"]
        sizes = {Image.open(io.BytesIO(image)).size for image in images}
        assert sizes == {(size, size)}


def test_empty_bins_and_an_open_class_go_through_everything(clone: Clone) -> None:
    text = clone.experiment("subset.quantities=[0,1,2,3,4,5,6+]")
    assert {"baseline", "ensemble", "witness", "report"} < set(clone.stages_run(text))
    tables = clone.folder / "reports/vit/tables"
    assert "p5,p6+" in (tables / "predictions.csv").read_text("utf-8").partition("\n")[0]
    page = (clone.folder / "reports/index.html").read_text("utf-8")
    assert "0, 1, 2, 3, 4, 5, 6+" in page
    assert "Bins with 6+ items have no known count" in page
    config = json.loads((clone.folder / "models/resnet34/config.json").read_text("utf-8"))
    assert list(config["id2label"].values()) == ["0", "1", "2", "3", "4", "5", "6+"]
    audited = [sys.executable, "-m", "tools.audit", "data/raw", "--all"]
    done = subprocess.run(
        audited,
        cwd=clone.folder,
        env=clone.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "70 photographs" in done.stdout, done.stderr
    assert "the models count only" not in (clone.folder / "audit/audit.csv").read_text("utf-8")


def test_a_third_model_is_a_block_of_params_yaml(clone: Clone) -> None:
    # A copy of a model's block, and then its differences.
    clone.run("dvc", "exp", "run", "-S", "+train.third=${train.vit}", "pretrained@third")
    words = ["-S", "train.third.learning_rate=1e-3", "train@third", "evaluate@third"]
    text = clone.run("dvc", "exp", "run", *words)
    assert clone.stages_run(text) == ["train@third", "evaluate@third"]
    assert clone.metrics("third")["test_bins"] == 20
    assert "reports/third/metrics.json" in clone.run("dvc", "metrics", "show", "--md")
    clone.run("dvc", "plots", "show", "--out", "plots")
    page = (clone.folder / "plots/index.html").read_text("utf-8")
    for name in ("curves", "confusion", "per_quantity", "reliability", "roc"):
        assert f"vegaEmbed('#reports_third_{name}_csv'" in page
    assert clone.run("git", "diff", "--name-only", "first-run", "--", "dvc.yaml") == ""


def test_weights_on_a_disk_are_taken_by_queued_experiments_and_needed_only_once(
    clone: Clone,
) -> None:
    # Git ignores this folder, so a temporary copy of the repository lacks it.
    weights = clone.folder / "weights/net.safetensors"
    weights.parent.mkdir()
    torch.manual_seed(0)
    save_file(torchvision.models.squeezenet1_1(num_classes=7).state_dict(), weights)
    model = "train.resnet34"
    start = [f"{model}.pretrained=./weights/net.safetensors"]
    start += [f"{model}.revision={sha256_file(weights)[:16]}"]
    words = [word for setting in start for word in ("--set-param", setting)]

    text = clone.run("dvc", "exp", "run", "--temp", *words, "train@resnet34")

    assert clone.stages_run(text) == ["pretrained@resnet34", "train@resnet34"]
    kept = weights.read_bytes()
    weights.unlink()
    text = clone.run("dvc", "exp", "run", *words, "train@resnet34")
    assert clone.stages_run(text) == []
    folder = clone.folder / "models/pretrained/resnet34"
    assert (folder / "model.safetensors").read_bytes() == kept
    assert clone.run("git", "status", "--porcelain", "weights") == ""


@pytest.fixture(scope="module")
def workplace(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy of the project, pushed to the remote."""
    clone = project.copy(tmp_path_factory.mktemp("workflows") / "workplace")
    clone.run("dvc", "push", "--quiet")
    return clone


def experiments(clone: Clone) -> dict[str, dict[str, Any]]:
    """The data of `dvc exp show` for each experiment of HEAD, by name."""
    _, head = json.loads(clone.run("dvc", "exp", "show", "--json"))
    revisions = [experiment["revs"][0] for experiment in head["experiments"] or []]
    return {revision["name"]: revision["data"] for revision in revisions}


def param(data: dict[str, Any], key: str) -> Any:
    value = data["params"]["params.yaml"]["data"]
    for part in key.split("."):
        value = value[part]
    return value


def queue(clone: Clone, name: str, setting: str) -> None:
    clone.run("dvc", "exp", "run", "--queue", "--name", name, "--set-param", setting)


def test_a_list_of_bins_runs_its_stages_when_it_changes(clone: Clone) -> None:
    subset = pd.read_parquet(clone.folder / "data/subset.parquet")
    ids = subset["id"].tolist()
    path = clone.folder / "lists/mine.csv"
    settings = ["subset.ids=mine.csv", "split.by=file", "split.file=mine.csv"]
    command = ["dvc", "exp", "run", *(word for one in settings for word in ("-S", one)), "split"]

    def write(tests: int) -> None:
        sets = ["test"] * tests + ["train"] * (len(ids) - tests)
        pd.DataFrame({"id": ids, "set": sets}).to_csv(path, index=False)

    write(20)
    assert "split" in clone.stages_run(clone.run(*command))
    write(30)
    assert clone.stages_run(clone.run("dvc", "repro", "split"))[-2:] == ["subset", "split"]

    sets = pd.read_csv(clone.folder / "data/split.csv", dtype=str)
    usable = set(sets["id"])
    assert set(sets.loc[sets["set"] == "test", "id"]) == set(ids[:30]) & usable
    clone.run("git", "checkout", "--quiet", "params.yaml")
    done = subprocess.run(
        [*command, "--temp"],
        cwd=clone.folder,
        env=clone.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "there is no file lists/mine.csv" in done.stdout
    assert "`git add lists/mine.csv`" in done.stdout


def test_sweeps_run_in_the_queue(clone: Clone) -> None:
    queue(clone, "rejects", "fetch.max_rejects=choice(0.06,0.07)")
    queue(clone, "minutes", "run.checkpoint_minutes=range(11,13)")
    text = clone.run("dvc", "exp", "run", "--run-all")
    assert clone.stages_run(text) == ["fetch", "fetch"]
    found = experiments(clone)
    values = [param(found[f"rejects-{number}"], "fetch.max_rejects") for number in (1, 2)]
    assert values == [0.06, 0.07]
    values = [param(found[f"minutes-{number}"], "run.checkpoint_minutes") for number in (1, 2)]
    assert values == [11, 12]
    assert set(found["rejects-1"]["metrics"]) == {
        f"reports/{name}/metrics.json" for name in [*MODELS, "baseline", "ensemble", "witness"]
    }
    assert clone.run("git", "status", "--porcelain") == ""


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
    assert workplace.stages_run(text) == ["train@vit"]
    assert workplace.run("git", "status", "--porcelain") == ""
    workplace.run("dvc", "exp", "push", "shared", "fast")
    workplace.run("dvc", "exp", "branch", "fast", "faster")
    # A version of a model is a tag, which must be annotated.
    workplace.run("git", "tag", "--annotate", "vit@v1.0.0", "--message", "The first", "main")
    workplace.run("git", "push", "--quiet", "shared", "main", "faster", "vit@v1.0.0")
    workplace.run("dvc", "push", "--quiet", "--run-cache")
    return bare


@pytest.fixture
def colleague(shared: Path, workplace: Clone, tmp_path: Path) -> Clone:
    """A fresh clone with an empty DVC cache."""
    return workplace.clone(tmp_path / "colleague", shared)


def pulled(clone: Clone) -> set[str]:
    """The DVC outputs that exist, without those in git."""
    in_git = clone.run("git", "ls-files").splitlines()
    return {path for path in clone.locked() if (clone.folder / path).exists()} - set(in_git)


def test_a_colleague_pulls_one_model_then_all(colleague: Clone) -> None:
    colleague.run("dvc", "pull", "models/vit")
    assert pulled(colleague) == {"models/vit"}
    colleague.run("dvc", "pull")
    assert pulled(colleague) == set(colleague.locked()) - {
        f"reports/{name}/metrics.json" for name in [*MODELS, "baseline", "ensemble", "witness"]
    }


def test_a_colleague_pulls_one_evaluation_with_its_model(colleague: Clone) -> None:
    colleague.run("dvc", "pull", "train@vit", "evaluate@vit")
    stages = yaml.load(colleague.folder / "dvc.lock")["stages"]
    outs = {out["path"] for name in ("train", "evaluate") for out in stages[f"{name}@vit"]["outs"]}
    assert pulled(colleague) == outs - {"reports/vit/metrics.json"}
    assert {"models/vit", "reports/vit/tables"} < outs


def test_a_colleague_evaluates_again_with_only_the_needed_data(colleague: Clone) -> None:
    words = ["--pull", "--allow-missing", "--set-param", "evaluate.false_alarm=0.1"]
    text = colleague.run("dvc", "exp", "run", *words)
    ran = ["baseline", "ensemble", "evaluate@resnet34", "evaluate@vit", "report", "witness"]
    assert sorted(colleague.stages_run(text)) == ran
    there = pulled(colleague)
    assert {"data/resized", "models/vit", "reports/vit/curves.csv", "reports/index.html"} < there
    # 13 GB that are not needed for this.
    assert "data/raw" not in there


def test_a_colleague_goes_back_to_an_earlier_value_without_training(
    colleague: Clone, workplace: Clone
) -> None:
    colleague.run("git", "checkout", "--quiet", "faster")
    rate = yaml.load(workplace.folder / "params.yaml")["train"]["vit"]["learning_rate"]
    assert yaml.load(colleague.folder / "params.yaml")["train"]["vit"]["learning_rate"] != rate
    words = ["--pull", "--allow-missing", "--set-param", f"{LEARNING_RATE}={rate}"]
    text = colleague.run("dvc", "exp", "run", *words)
    assert "Stage 'train@vit' is cached - skipping run, checking out outputs" in text
    assert "train@vit" not in colleague.stages_run(text)
    assert colleague.locked()["models/vit"] == workplace.locked()["models/vit"]
    assert (colleague.folder / "models/vit/model.safetensors").exists()


def test_a_colleague_takes_an_experiment(colleague: Clone, workplace: Clone) -> None:
    assert "fast" in colleague.run("dvc", "exp", "list", "origin")
    colleague.run("dvc", "exp", "pull", "origin", "fast")
    colleague.run("dvc", "exp", "apply", "fast")
    assert yaml.load(colleague.folder / "params.yaml")["train"]["vit"]["learning_rate"] == 1e-3
    assert colleague.locked()["models/vit"] != workplace.locked()["models/vit"]
    assert (colleague.folder / "models/vit/model.safetensors").exists()


def test_a_model_is_fetched_from_outside(shared: Path, workplace: Clone, tmp_path: Path) -> None:
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


# The two experiments wait for each other, so that no worker runs both.
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
    clone = Clone(folder, fresh_environment(tmp_path / "home") | more)
    clone.run("git", "init", "--quiet")
    clone.identify()
    clone.run("dvc", "init", "--quiet")
    (folder / "dvc.yaml").write_text(SEE_GPU)
    (folder / "params.yaml").write_text("number: 0\n")
    clone.run("git", "add", ".")
    clone.run("git", "commit", "--quiet", "--message", "Everything")
    return clone


# The workers end by themselves after ten seconds without work. `dvc queue stop` would also stop the
# next workers if these had just ended.
def test_each_of_our_workers_has_its_own_gpu(tiny: Clone, tmp_path: Path) -> None:
    queue(tiny, "see", "number=range(1,3)")
    tiny.run(sys.executable, "-m", "tools.queue_workers", "7", "9")
    deadline = time.monotonic() + 300
    while tiny.run("git", "for-each-ref", "refs/exps").count("/see-") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    meeting = tmp_path / "meeting"
    assert sorted((meeting / number).read_text().strip() for number in ("1", "2")) == ["7", "9"]


def test_without_a_gpu_no_worker_starts(tiny: Clone) -> None:
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
    local = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert {"check", "test", *local, "lock"} <= made <= set(targets)


def run_ci_step(clone: Clone, name: str) -> tuple[int, str]:
    """Run a step of the CI. Returns its exit code, and its addition to the summary."""
    (script,) = (step["run"] for step in CI_STEPS if step.get("name") == name)
    summary = clone.folder.with_name(f"{clone.folder.name}-summary.md")
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=clone.folder,
        env=clone.environment | {"GITHUB_STEP_SUMMARY": str(summary)},
        check=False,
    )
    return done.returncode, summary.read_text() if summary.exists() else ""


def test_the_ci_detects_a_lock_of_other_params(colleague: Clone) -> None:
    lock_step = "Check that dvc.lock matches the code and params"
    # As the CI has it: without data, and without the settings of anybody.
    (colleague.folder / ".dvc/config.local").unlink()
    assert run_ci_step(colleague, lock_step) == (0, "")
    change_params(colleague, {"resize.quality": 89})
    code, summary = run_ci_step(colleague, lock_step)
    assert code == 1
    assert summary.startswith("dvc.lock does not match the code and params")


def test_the_ci_shows_params_and_metrics(colleague: Clone) -> None:
    colleague.run("git", "checkout", "--quiet", "faster")
    code, summary = run_ci_step(colleague, "Metrics and params")
    assert code == 0
    assert "| params.yaml | train.vit.learning_rate |" in summary
