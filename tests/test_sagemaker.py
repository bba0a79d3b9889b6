"""Training in a SageMaker job: the files and requests sent, the job itself, and its outputs."""

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from moto import mock_aws
from moto.sagemaker.models import FakeTrainingJob, sagemaker_backends
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cloud import sagemaker, sagemaker_entry, sagemaker_files
from cloud.sagemaker_files import FILES, collect_inputs, unpack
from stages.runtime.errors import UserError
from tests.project import ROOT
from tests.test_train import SECONDS, Workspace

if TYPE_CHECKING:
    from mypy_boto3_logs.type_defs import InputLogEventTypeDef

pytestmark = pytest.mark.slow

ROLE = "arn:aws:iam::123456789012:role/sagemaker"
BUCKET = "s3://jobs/bins"
START = ["vit", "--bucket", BUCKET, "--role", ROLE]
MODEL = {name: name.encode() for name in FILES}
OUTPUTS = {
    Path(f"{'reports' if name == 'curves.csv' else 'models'}/vit/{name}"): content
    for name, content in MODEL.items()
}


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account at moto's, which is empty, and whose jobs don't end before the test ends them."""
    create = FakeTrainingJob.__init__

    def create_in_progress(self: FakeTrainingJob, *arguments: Any, **named: Any) -> None:
        create(self, *arguments, **named)
        self.training_job_status, self.secondary_status = "InProgress", "Training"

    monkeypatch.setattr(FakeTrainingJob, "__init__", create_in_progress)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    with mock_aws():
        boto3.resource("s3").create_bucket(
            Bucket="jobs", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
        )
        yield


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The current directory, with the code and the inputs of the train stage."""
    workspace = Workspace(tmp_path / "here", train__vit__epochs=2)
    for folder in ("stages", "cloud"):
        shutil.copytree(ROOT / folder, workspace.folder / folder)
    shutil.copy(ROOT / "requirements.txt", workspace.folder)
    monkeypatch.chdir(workspace.folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return workspace


def on_wait(monkeypatch: pytest.MonkeyPatch, *happenings: Callable[[], None]) -> None:
    """Call these functions, one each time the launcher waits."""
    remaining, really_sleep = list(happenings), time.sleep

    def sleep(seconds: float) -> None:
        if seconds == sagemaker.POLL_SECONDS:
            remaining.pop(0)()
        else:
            really_sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)


def the_job() -> FakeTrainingJob:
    (job,) = sagemaker_backends["123456789012"]["eu-west-1"].training_jobs.values()
    return job


def end(status: str = "Completed", secondary: str = "Completed", reason: str | None = None) -> None:
    job = the_job()
    job.training_job_status, job.secondary_status = status, secondary
    vars(job)["failure_reason"] = reason


def log(stream: str, *lines: str) -> None:
    """Put lines into the job's log, as SageMaker does."""
    logs, group = boto3.client("logs"), sagemaker.LOG_GROUP
    name = f"{the_job().training_job_name}/{stream}"
    with suppress(logs.exceptions.ResourceAlreadyExistsException):
        logs.create_log_group(logGroupName=group)
    with suppress(logs.exceptions.ResourceAlreadyExistsException):
        logs.create_log_stream(logGroupName=group, logStreamName=name)
    now = int(time.time() * 1000)
    events: list[InputLogEventTypeDef] = [{"timestamp": now, "message": line} for line in lines]
    logs.put_log_events(logGroupName=group, logStreamName=name, logEvents=events)


def packed(members: Mapping[str, bytes], *special: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in special:
            archive.addfile(member)
    return buffer.getvalue()


def put_model(content: bytes) -> None:
    bucket, key = sagemaker_files.split_url(the_job().model_artifacts["S3ModelArtifacts"])
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=content)


def finish() -> None:
    end()
    put_model(packed(MODEL))


def nothing() -> None:
    pass


def interrupt() -> None:
    raise KeyboardInterrupt


class Machine:
    """SageMaker's part in a job: the folders, the process, and the archive of the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> "subprocess.Popen[str]":
        """Run the job on a new machine, which has only the checkpoints of an earlier one."""
        for name in ("input", "repository", "model", "output"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for channel in the_job().input_data_config:
            url = channel["DataSource"]["S3DataSource"]["S3Uri"]
            bucket, prefix = sagemaker_files.split_url(url)
            for found in boto3.resource("s3").Bucket(bucket).objects.filter(Prefix=prefix):
                name = found.key.removeprefix(prefix)
                path = self.folder / "input/data" / channel["ChannelName"] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                found.Object().download_file(str(path))
        asked = the_job().algorithm_specification
        python, script = asked["ContainerEntrypoint"]
        assert python == "python3"
        script = script.replace("/opt/ml", str(self.folder))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.Popen(
            [sys.executable, script, *asked["ContainerArguments"]],
            env=environment | {"SAGEMAKER_BASE_DIR": str(self.folder)},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def archive(self) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            archive.add(self.folder / "model", arcname=".")
        return buffer.getvalue()


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_job_that_was_stopped_and_continued_brings_back_what_the_stage_makes_here(
    here: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = Machine(tmp_path / "ml")

    def stop_after_some_steps() -> None:
        process = machine.start()
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        assert "160 bins on 1 x" in lines[0]
        process.send_signal(signal.SIGTERM)
        lines += process.stdout.readlines()
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
        assert "stopped by SIGTERM" in (machine.folder / "output/failure").read_text("utf-8")
        log("algo-1-1", *lines)

    def continue_to_the_end() -> None:
        process = machine.start()
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output
        log("algo-1-2", *output.splitlines())
        put_model(machine.archive())
        end()

    on_wait(monkeypatch, stop_after_some_steps, continue_to_the_end, nothing)
    sagemaker.main(START)

    printed = capsys.readouterr().out
    assert "after epoch" in printed
    assert "vit epoch 2/2: train loss" in printed
    assert "`dvc commit --force train@vit`" in printed
    # Nothing was missing: pip was only asked for packages of other systems, which it skips.
    assert list((machine.folder / "site").glob("*")) == []
    brought = contents("models/vit") | contents("reports/vit")
    assert brought.keys() == FILES
    here.finish()
    assert contents("models/vit") | contents("reports/vit") == brought


def test_the_log_is_printed_as_it_comes_and_each_line_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []

    def listen(*happenings: Callable[[], None]) -> None:
        said.append(capsys.readouterr().out.splitlines())
        for happening in happenings:
            happening()

    on_wait(
        monkeypatch,
        lambda: listen(lambda: log("algo-1-1", "one", "two")),
        lambda: listen(lambda: log("algo-1-1", "three"), lambda: log("algo-1-2", "restarted")),
        lambda: listen(finish),
        lambda: listen(lambda: log("algo-1-2", "late")),
    )
    sagemaker.main(START)

    assert said[0][0].startswith("sagemaker: sending ")
    assert said[0][1:] == [f"sagemaker: {the_job().training_job_name}", "sagemaker: Training"]
    assert said[1:] == [["one", "two"], ["three", "restarted"], ["sagemaker: Completed"]]
    assert capsys.readouterr().out.splitlines()[0] == "late"
    assert {path: path.read_bytes() for path in OUTPUTS} == OUTPUTS


def test_ctrl_c_leaves_the_job_and_says_how_to_follow_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_wait(monkeypatch, interrupt)
    with pytest.raises(SystemExit) as ended:
        sagemaker.main(START)

    assert ended.value.code == 130
    assert the_job().training_job_status == "InProgress"
    advice = capsys.readouterr().err
    assert f"stop-training-job --training-job-name {the_job().training_job_name}" in advice
    (command,) = re.findall(r"python -m cloud\.sagemaker (.*)", advice)
    finish()
    on_wait(monkeypatch, nothing)
    sagemaker.main(command.split())
    assert {path: path.read_bytes() for path in OUTPUTS} == OUTPUTS


def error_of(*arguments: str) -> str:
    """The one-line message with which the launcher exits."""
    with pytest.raises(SystemExit) as ended:
        sagemaker.main([*arguments])
    assert isinstance(ended.value.code, str)
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (("Failed", "Failed", "AlgorithmError:\n train vit: error: x"), "failed (AlgorithmError"),
        (
            ("Stopped", "MaxRuntimeExceeded"),
            "has stopped (MaxRuntimeExceeded); another job with the same inputs continues",
        ),
    ],
)
def test_a_job_that_fails_is_an_error_with_its_reason(
    how: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_wait(monkeypatch, lambda: end(*how), nothing)
    assert said in error_of(*START)
    assert not Path("models/vit").exists()


def test_a_job_with_other_inputs_is_refused_and_only_what_changed_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = collect_inputs("vit", BUCKET).files
    of_data = [url for url in files if "/data/" in url.removeprefix(BUCKET)[:6]]
    on_wait(monkeypatch, finish, nothing, nothing)
    sagemaker.main(START)
    assert f"sending {len(files)} of {len(files)} files" in capsys.readouterr().out
    shutil.rmtree("models/vit")
    with Path("data/split.csv").open("a") as file:
        file.write("\n")
    attach = ["vit", "--bucket", BUCKET, "--attach", the_job().training_job_name]
    assert "trained with other code, params or data than this checkout has" in error_of(*attach)
    assert not Path("models/vit").exists()
    sagemaker_files.upload(collect_inputs("vit", BUCKET), boto3.resource("s3"))
    assert f"sending {len(of_data)} of {len(files)} files" in capsys.readouterr().out


def test_a_dry_run_prints_the_request_and_sends_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--spot", "--hours", "3", "--instance-type", "ml.p5.4xlarge"]
    sagemaker.main([*START, "--dry-run", *words])

    request = json.loads(capsys.readouterr().out)
    inputs = collect_inputs("vit", BUCKET)
    assert re.fullmatch(r"bins-vit-\d{8}-\d{6}", request["TrainingJobName"])
    assert request["RoleArn"] == ROLE
    assert request["AlgorithmSpecification"]["ContainerArguments"] == ["vit"]
    assert ".eu-west-1." in request["AlgorithmSpecification"]["TrainingImage"]
    channels = [sagemaker.channel("code", inputs.code), sagemaker.channel("data", inputs.data)]
    assert request["InputDataConfig"] == channels
    assert request["ResourceConfig"]["InstanceType"] == "ml.p5.4xlarge"
    assert request["StoppingCondition"]["MaxRuntimeInSeconds"] == 10800
    assert request["StoppingCondition"]["MaxWaitTimeInSeconds"] == 21600
    assert request["EnableManagedSpotTraining"] is True
    assert request["CheckpointConfig"]["S3Uri"] == inputs.checkpoints
    assert list(boto3.resource("s3").Bucket("jobs").objects.all()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet50", *START[1:]], "resnet50"),
        (
            ["vit", "--bucket", "jobs", "--role", ROLE],
            "--bucket is jobs, but should be like s3://bucket/folder",
        ),
        (["resnet34", *START[1:]], "models/pretrained/resnet34 is missing: run `dvc pull"),
        (["vit", "--bucket", "s3://other/bins", "--role", ROLE], "bucket does not exist"),
        (["vit", "--bucket", BUCKET, "--attach", "none"], "(ValidationException)"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    assert said in error_of(*arguments)


WITHOUT_CONFIG = {name: content for name, content in MODEL.items() if name != "config.json"}
LINK = tarfile.TarInfo("config.json")
LINK.type, LINK.linkname = tarfile.SYMTYPE, "model.safetensors"


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (packed(MODEL | {"../config.json": b""}), "'../config.json'"),
        (packed(MODEL | {"pytorch_model.bin": b""}), "'pytorch_model.bin'"),
        (packed(WITHOUT_CONFIG, LINK), "'config.json'"),
        (packed(WITHOUT_CONFIG), "lacks config.json"),
        (packed(MODEL)[:-40], "damaged"),
    ],
)
def test_an_archive_with_anything_but_a_model_is_refused(
    archive: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.tar.gz"
    path.write_bytes(archive)
    with pytest.raises(UserError, match=re.escape(said)):
        unpack(path, tmp_path / "unpacked/model")
    assert not (tmp_path / "unpacked/config.json").exists()


def imported_packages(path: Path) -> set[str]:
    """The packages that a module imports, directly or through modules of this project."""
    found, seen, waiting = set(), set[Path](), [path]
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                own = ROOT / (name.replace(".", "/") + ".py")
                if own.exists():
                    waiting.append(own)
                elif name.split(".")[0] not in {*sys.stdlib_module_names, "stages"}:
                    found.add(name.split(".")[0])
    return found


def test_a_job_installs_what_training_imports() -> None:
    modules = metadata.packages_distributions()
    imported = imported_packages(ROOT / "stages/train.py")
    packages = {canonicalize_name(name) for module in imported for name in modules[module]}
    assert packages == sagemaker_entry.PACKAGES | sagemaker_entry.OF_IMAGE


def test_a_job_installs_what_those_need_but_only_what_the_image_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = (ROOT / "requirements.txt").read_text("utf-8")
    needed = {name: text for name, _, text in sagemaker_entry.needed_packages(lock)}
    for name in needed:
        # Some packages are for other systems.
        for line in (metadata.requires(name) or []) if sagemaker_entry.installed(name) else []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                known = needed.keys() | sagemaker_entry.OF_IMAGE
                assert canonicalize_name(requirement.name) in known, name
    assert not needed.keys() & {"torch", "torchvision", "triton", "dvc"}

    ran: list[list[str]] = []
    there = {name: version for name, version, _ in sagemaker_entry.needed_packages(lock)}
    del there["simplejpeg"]
    there["filelock"] = "0.1"
    monkeypatch.setattr(sagemaker_entry, "ML", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command))
    monkeypatch.setattr(sagemaker_entry, "installed", there.get)
    sagemaker_entry.install_missing(lock)

    asked = (tmp_path / "requirements.txt").read_text("utf-8")
    assert {"simplejpeg", "filelock"} <= set(re.findall(r"^([a-z0-9-]+)==", asked, re.MULTILINE))
    assert "transformers==" not in asked
    assert "--hash=sha256:" in asked
    (command,) = ran
    assert {"--require-hashes", "--no-deps"} < set(command)
