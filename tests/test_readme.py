"""README's commands: each is run here, or by the test that is named beside it."""

import re
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from tests.project import ROOT, Project

README = (ROOT / "README.md").read_text("utf-8")
IN_A_PROJECT = [
    "dvc metrics diff",
    "dvc plots diff HEAD workspace",
    "dvc exp show --only-changed",
    "dvc exp show --drop '.*' --keep 'Exp|.*:(accuracy|found)$|train.vit.learning_rate'",
    "dvc exp show --no-pager --hide-workspace --sort-by reports/vit/metrics.json:rmse --drop '.*'"
    " --keep 'Exp|.*vit/metrics.json:rmse|train.vit.learning_rate|train.vit.seed'",
]
#: What takes a whole pipeline or a machine of one's own, with smaller values or other places.
ELSEWHERE = {
    "make demo": "test_pipeline.py::test_each_model_is_trained_evaluated_and_loads",
    "make setup && . .venv/bin/activate": "../.ci/run",
    "make test": "../.ci/run",
    "make check": "../.ci/run",
    "make test-slow": "../.ci/run",
    "make test-all": "../.ci/run",
    "make soak": "kills.py::main",
    "make lock": "test_readme.py::test_make_has_the_targets_that_are_named",
    "dvc repro": "test_pipeline.py::test_nothing_is_left_to_do_and_nothing_unfinished_is_left",
    "dvc exp run -S bucket.url=": "test_workflows.py::test_another_clone_makes_the_same_bytes",
    "dvc exp run -S train.vit.": "test_workflows.py::test_a_knob_of_one_model_runs_that_model_only",
    "dvc exp run -S '+train.": "test_workflows.py::test_a_third_model_is_a_block_of_params_yaml",
    "dvc exp run -S train.": "test_workflows.py::test_a_third_model_is_a_block_of_params_yaml",
    "dvc remote modify --local storage": "project.py::__init__",
    "dvc exp run --queue": "test_workflows.py::test_sweeps_run_in_the_queue",
    "dvc exp run --run-all": "test_workflows.py::test_sweeps_run_in_the_queue",
    "python -m tools.queue_workers": "test_workflows.py::test_each_of_our_workers_has_its_own_gpu",
    "dvc push --run-cache": "test_workflows.py::shared",
    "dvc exp run --pull": (
        "test_workflows.py::test_a_colleague_goes_back_to_an_earlier_value_without_training"
    ),
    "dvc exp push origin": "test_workflows.py::test_a_colleague_takes_an_experiment",
    "dvc get": "test_workflows.py::test_a_model_is_fetched_from_outside",
    "dvc artifacts get": "test_workflows.py::test_a_model_is_fetched_from_outside",
    "dvc pull train@vit evaluate@vit": (
        "test_workflows.py::test_a_colleague_pulls_one_evaluation_with_its_model"
    ),
    "dvc push": "test_workflows.py::workplace",
    "dvc pull models/vit": "test_workflows.py::test_a_colleague_pulls_one_model_then_all",
    "torchrun --nnodes 2": "test_nodes.py::start_machines",
    "python -m tools.audit photographs": (
        "test_audit.py::test_wrong_records_come_first_and_are_alarms"
    ),
    "python -m tools.audit s3://": (
        "test_audit.py::test_a_bucket_and_a_folder_of_the_same_bins_are_audited_alike"
    ),
    "audit-bins": "test_readme.py::test_the_audit_is_a_command",
    "dvc commit --force train@vit": "test_readme.py::test_what_was_trained_by_hand_is_committed",
}


def commands() -> list[str]:
    """Of README's shell blocks, one each, without comments."""
    found = []
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        found += [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [command.replace("'&&'", "&&") for command in found if command]


@pytest.mark.parametrize("command", commands())
def test_a_command_is_run_by_a_test(command: str) -> None:
    if command in IN_A_PROJECT:
        return
    file, _, test = next(
        place for start, place in ELSEWHERE.items() if command.startswith(start)
    ).partition("::")
    assert f"def {test}(" in (Path(__file__).parent / file).read_text("utf-8") or not test


@pytest.mark.parametrize("command", IN_A_PROJECT)
def test_a_command_runs_in_a_project(command: str, project: Project) -> None:
    assert command in commands()
    project.run(*shlex.split(command))


def test_make_has_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", README)) - {"it"}
    assert named
    assert {name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)} == set()


def test_every_knob_is_in_the_table() -> None:
    params = (ROOT / "params.yaml").read_text("utf-8")
    table = README[README.index("## Every knob") :]
    settings = re.findall(r"^ +([a-z_]+):", params, re.MULTILINE)
    models = {"resnet34", "vit"}
    assert {knob for knob in settings if not re.search(rf"[`.]{knob}`", table)} <= models


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
def test_what_was_trained_by_hand_is_committed(project: Project, tmp_path: Path) -> None:
    place = project.copy(tmp_path / "place")
    params = place.folder / "params.yaml"
    block = r"(vit:.*?learning_rate: )\S+"
    text = re.sub(block, r"\g<1>1.3e-4", params.read_text("utf-8"), flags=re.DOTALL)
    params.write_text(text, "utf-8")
    place.run("python", "-m", "stages.train", "vit")
    place.run("dvc", "commit", "--force", "train@vit")
    ran = place.run("dvc", "repro", "evaluate@vit")
    assert place.stages_run(ran) == ["evaluate@vit"]
