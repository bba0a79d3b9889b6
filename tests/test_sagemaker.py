"""Training in a SageMaker job: what is sent and asked, the job itself, and what comes back."""

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
from contextlib import contextmanager, suppress
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
from cloud.sagemaker import METRICS, training_request
from cloud.sagemaker_files import FILES, collect_inputs, pack_code, unpack
from stages import train
from stages.runtime.errors import UserError
from stages.training.engine import Epoch
from tests.project import ROOT
from tests.test_train import SECONDS, Workspace

if TYPE_CHECKING:
    from mypy_boto3_logs.type_defs import InputLogEventTypeDef

ROLE = "arn:aws:iam::123456789012:role/sagemaker"
BUCKET = "s3://jobs/bins"
START = ["vit", "--bucket", BUCKET, "--role", ROLE]
MODEL = {name: name.encode() for name in FILES}


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty account at moto's."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The current directory, with the train stage's code, which git tracks, and its inputs."""
    workspace = Workspace(tmp_path / "here", vit__epochs=2)
    shutil.copytree(ROOT / "stages", workspace.folder / "stages")
    shutil.copy(ROOT / "requirements.txt", workspace.folder)
    (workspace.folder / ".gitignore").write_text("__pycache__/\n", "utf-8")
    monkeypatch.chdir(workspace.folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for command in (["init", "--quiet"], ["add", "stages", "params.yaml", "requirements.txt"]):
        subprocess.run(["git", *command], check=True)
    return workspace


@pytest.fixture
def bucket() -> Any:
    bucket = boto3.resource("s3").Bucket("jobs")
    bucket.create()
    return bucket


def on_wait(monkeypatch: pytest.MonkeyPatch, *happenings: Callable[[], None]) -> None:
    """Let these happen, one each time the launcher waits."""
    remaining, really_sleep = list(happenings), time.sleep

    def sleep(seconds: float) -> None:
        if seconds == sagemaker.POLL_SECONDS:
            remaining.pop(0)()
        else:
            really_sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)


def the_job() -> FakeTrainingJob:
    (job,) = sagemaker_backends["123456789012"]["us-east-1"].training_jobs.values()
    return job


def set_state(status: str, secondary: str) -> None:
    the_job().training_job_status, the_job().secondary_status = status, secondary


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
    set_state("Completed", "Completed")
    put_model(packed(MODEL))


def nothing() -> None:
    pass


class Machine:
    """What SageMaker does with a job: its folders, its process, and the archive of its model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> "subprocess.Popen[str]":
        """Of a new machine, but for the checkpoints."""
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


def in_progress(create: Callable[..., None]) -> Callable[..., None]:
    """Moto's jobs are done at once; so they are not."""

    def create_in_progress(self: FakeTrainingJob, *arguments: Any, **named: Any) -> None:
        create(self, *arguments, **named)
        self.training_job_status, self.secondary_status = "InProgress", "Training"

    return create_in_progress


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTrainingJob, "__init__", in_progress(FakeTrainingJob.__init__))


@pytest.mark.usefixtures("bucket", "slow")
def test_a_job_that_was_stopped_and_went_on_brings_back_what_the_stage_makes_here(
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

    def go_on_to_the_end() -> None:
        process = machine.start()
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output
        log("algo-1-2", *output.splitlines())
        put_model(machine.archive())
        set_state("Completed", "Completed")

    on_wait(monkeypatch, stop_after_some_steps, go_on_to_the_end, nothing)
    sagemaker.main(START)

    printed = capsys.readouterr().out
    assert "vit: going on after epoch" in printed
    assert "vit epoch 2/2: train loss" in printed
    assert "`dvc commit --force train@vit`" in printed
    # Nothing was missing, and pip had only packages for other systems to look at.
    assert list((machine.folder / "site").glob("*")) == []
    brought = here.outputs()
    here.finish()
    assert here.outputs() == brought
    assert {path.name for path in Path("models/vit").iterdir()} == FILES - {"curves.csv"}


@contextmanager
def no_credentials(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, str(folder / "none"))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


def error_of(*arguments: str) -> str:
    """How the launcher ends."""
    with pytest.raises(SystemExit) as ended:
        sagemaker.main([*arguments])
    assert isinstance(ended.value.code, str)
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.mark.usefixtures("here", "bucket", "slow")
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

    job = the_job().training_job_name
    assert said == [
        ["sagemaker: 8 of 8 files to send", f"sagemaker: {job}", "sagemaker: Training"],
        ["one", "two"],
        ["three", "restarted"],
        ["sagemaker: Completed"],
    ]
    assert capsys.readouterr().out.splitlines()[0] == "late"
    for path, content in outputs().items():
        assert path.read_bytes() == content


def outputs() -> dict[Path, bytes]:
    model = {Path("models/vit") / name: content for name, content in MODEL.items()}
    curves = model.pop(Path("models/vit/curves.csv"))
    return model | {Path("reports/vit/curves.csv"): curves}


@pytest.mark.usefixtures("here", "bucket", "slow")
def test_ctrl_c_leaves_the_job_and_says_how_to_go_on_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_wait(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        sagemaker.main(START)

    assert ended.value.code == 130
    job = the_job().training_job_name
    assert the_job().training_job_status == "InProgress"
    advice = capsys.readouterr().err
    assert f"stop-training-job --training-job-name {job}" in advice
    (command,) = re.findall(r"python -m cloud\.sagemaker (.*)", advice)
    finish()
    on_wait(monkeypatch, nothing)
    sagemaker.main(command.split())
    assert {path: path.read_bytes() for path in outputs()} == outputs()


@pytest.mark.usefixtures("here", "bucket")
@pytest.mark.parametrize(
    ("status", "secondary", "reason", "said"),
    [
        ("Failed", "Failed", "AlgorithmError:\n train vit: error: so it is", "failed (Algorithm"),
        ("Stopped", "MaxRuntimeExceeded", None, "stopped (MaxRuntimeExceeded); a job with"),
    ],
)
def test_a_job_that_fails_is_an_error_with_its_reason(
    status: str,
    secondary: str,
    reason: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: FakeTrainingJob, *arguments: Any, **named: Any) -> None:
        create(self, *arguments, **named)
        self.training_job_status, self.secondary_status = status, secondary
        vars(self)["failure_reason"] = reason

    create = FakeTrainingJob.__init__
    monkeypatch.setattr(FakeTrainingJob, "__init__", fail)
    on_wait(monkeypatch, nothing)

    assert f"{said}" in error_of(*START)
    assert not Path("models/vit").exists()


@pytest.mark.usefixtures("here", "bucket")
def test_a_job_of_other_inputs_is_not_taken_for_one_of_these(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_wait(monkeypatch, finish, nothing, nothing)
    sagemaker.main(START)
    attach = ["vit", "--bucket", BUCKET, "--attach", the_job().training_job_name]
    shutil.rmtree("models/vit")
    params = Path("params.yaml")
    params.write_text(params.read_text("utf-8") + "# other\n", "utf-8")

    assert "trained on other code, params or data than are here" in error_of(*attach)
    assert not Path("models/vit").exists()


@pytest.mark.usefixtures("here", "bucket")
def test_what_the_bucket_has_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_wait(monkeypatch, *[finish_all] * 4)
    told: list[str] = []
    for change in ("", "params.yaml", "data/split.csv", ""):
        if change:
            path = Path(change)
            path.write_bytes(path.read_bytes() + b"\n")
        monkeypatch.setattr(sagemaker, "training_request", named(f"job-{len(told)}"))
        sagemaker.main(START)
        told.append(capsys.readouterr().out.splitlines()[0])

    assert [line.removeprefix("sagemaker: ") for line in told] == [
        "8 of 8 files to send",
        "2 of 8 files to send",
        "6 of 8 files to send",
        "0 of 8 files to send",
    ]


def named(job: str) -> Callable[..., dict[str, Any]]:
    """Two in one second would have one name."""

    def request(*arguments: Any) -> dict[str, Any]:
        return training_request(*arguments) | {"TrainingJobName": job}

    return request


def finish_all() -> None:
    for job in sagemaker_backends["123456789012"]["us-east-1"].training_jobs.values():
        bucket, key = sagemaker_files.split_url(job.model_artifacts["S3ModelArtifacts"])
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=packed(MODEL))


@pytest.mark.usefixtures("here")
def test_a_dry_run_prints_the_request_and_sends_nothing(
    bucket: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--dry-run", "--spot", "--hours", "3", "--instance-type", "ml.p5.4xlarge"]
    with no_credentials(tmp_path):
        sagemaker.main([*START, *words])

    request = json.loads(capsys.readouterr().out)
    inputs = collect_inputs("vit", BUCKET)
    assert re.fullmatch(r"bins-vit-\d{8}-\d{6}", request.pop("TrainingJobName"))
    asked = request.pop("AlgorithmSpecification")
    assert request == {
        "RoleArn": ROLE,
        "InputDataConfig": [
            sagemaker.channel("code", inputs.code),
            sagemaker.channel("data", inputs.data),
        ],
        "OutputDataConfig": {"S3OutputPath": f"{BUCKET}/jobs"},
        "ResourceConfig": {
            "InstanceType": "ml.p5.4xlarge",
            "InstanceCount": 1,
            "VolumeSizeInGB": sagemaker.VOLUME_GB,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": 10800, "MaxWaitTimeInSeconds": 21600},
        "EnableManagedSpotTraining": True,
        "CheckpointConfig": {
            "S3Uri": inputs.checkpoints,
            "LocalPath": "/opt/ml/checkpoints",
        },
    }
    assert asked["ContainerArguments"] == ["vit"]
    assert list(bucket.objects.all()) == []


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("region", "words", "expected"),
    [
        ("eu-west-1", [], sagemaker.IMAGE.format(region="eu-west-1")),
        ("ap-east-1", ["--image", "mine"], "mine"),
        ("ap-east-1", [], None),
    ],
)
def test_the_image_is_the_regions_or_ones_own(
    region: str,
    words: list[str],
    expected: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    arguments = [*START, "--dry-run", *words]
    if expected is None:
        assert "ap-east-1 is not known here: add --image" in error_of(*arguments)
        return
    sagemaker.main(arguments)
    request = json.loads(capsys.readouterr().out)
    assert request["AlgorithmSpecification"]["TrainingImage"] == expected


def test_the_metrics_are_found_in_the_lines_that_training_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    epoch = Epoch(
        epoch=3,
        train_loss=0.1,
        train_accuracy=0.2,
        validation_loss=0.3,
        validation_accuracy=0.4,
        test_loss=0.5,
        test_accuracy=0.6,
    )
    train.report_epoch("vit", epoch, 12, 7.0)
    line = capsys.readouterr().out

    found = {name: float(*re.findall(pattern, line)) for name, pattern in METRICS.items()}
    assert found == {
        "epoch": 3,
        "train:loss": 0.1,
        "train:accuracy": 0.2,
        "validation:loss": 0.3,
        "validation:accuracy": 0.4,
        "test:loss": 0.5,
        "test:accuracy": 0.6,
    }
    other = "vit: 160 bins on 2 x cpu, 12 epochs of 10 steps"
    assert not any(re.search(pattern, other) for pattern in METRICS.values())


def test_the_code_is_packed_to_the_same_bytes_whatever_its_times_and_rights(
    here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pack_code()
    monkeypatch.setattr(time, "time", lambda: 10**9)
    for path in Path("stages").rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o700)

    assert pack_code() == before
    with tarfile.open(fileobj=io.BytesIO(before)) as archive:
        names = archive.getnames()
    # No data, no settings and no secrets, though they lie beside it.
    kept = {path.as_posix() for path in Path("stages").rglob("*.*") if path.suffix != ".pyc"}
    assert set(names) == kept | {"params.yaml", "requirements.txt"}
    assert (here.folder / "data/split.csv").exists()


@pytest.mark.usefixtures("here")
def test_what_git_does_not_track_is_no_silent_gap() -> None:
    Path("stages/core/new.py").touch()
    assert "git does not track stages/core/new.py" in error_of(*START)
    Path("stages/core/new.py").unlink()

    # Deleted, but not yet for git.
    Path("stages/report.py").unlink()
    with tarfile.open(fileobj=io.BytesIO(pack_code())) as archive:
        assert "stages/report.py" not in archive.getnames()

    shutil.rmtree(".git")
    assert "git cannot tell what to send" in error_of(*START)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet50", *START[1:]], "resnet50"),
        (["vit", "--bucket", "jobs", "--role", ROLE], "--bucket jobs: write s3://bucket/folder"),
        (["resnet34", *START[1:]], "models/pretrained/resnet34 is missing: `dvc pull"),
        (START, "the bucket jobs cannot be reached"),
        (["vit", "--bucket", BUCKET, "--attach", "none"], "(ValidationException)"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    assert said in error_of(*arguments)


@pytest.mark.usefixtures("here", "bucket")
def test_a_missing_region_or_key_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with no_credentials(tmp_path):
        assert "there are no AWS credentials" in error_of(*START)
        monkeypatch.delenv("AWS_DEFAULT_REGION")
        assert "there is no AWS region" in error_of(*START)


def test_a_role_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sagemaker.main(["vit", "--bucket", BUCKET])
    assert ended.value.code == 2
    assert "--role is needed" in capsys.readouterr().err


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


WITHOUT_CONFIG = {name: content for name, content in MODEL.items() if name != "config.json"}


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (packed(MODEL | {"../config.json": b""}), "'../config.json'"),
        (packed(MODEL | {"/config.json": b""}), "'/config.json'"),
        (packed(MODEL | {"sub/config.json": b""}), "'sub/config.json'"),
        (packed(MODEL | {"pytorch_model.bin": b""}), "'pytorch_model.bin'"),
        (packed(WITHOUT_CONFIG, link("config.json", tarfile.SYMTYPE)), "'config.json'"),
        (packed(WITHOUT_CONFIG, link("config.json", tarfile.LNKTYPE)), "'config.json'"),
        (packed(WITHOUT_CONFIG, link("config.json", tarfile.FIFOTYPE)), "'config.json'"),
        (packed(WITHOUT_CONFIG), "lacks config.json"),
        (packed(MODEL)[:-40], "is damaged"),
        (b"no archive", "is damaged"),
    ],
)
def test_an_archive_with_anything_but_a_model_is_refused(
    archive: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.tar.gz"
    path.write_bytes(archive)

    with pytest.raises(UserError, match=re.escape(said)):
        unpack(path, tmp_path / "model")
    assert {found.name for found in tmp_path.rglob("*")} <= FILES | {"model.tar.gz", "model"}
    assert not any(found.is_symlink() for found in tmp_path.rglob("*"))


def imported_packages(path: Path) -> set[str]:
    """The packages that a module and this project's modules that it imports take."""
    found = set()
    seen, waiting = set[Path](), [path]
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

    assert packages == sagemaker_entry.PACKAGES | {"torch", "torchvision"}


def test_a_job_installs_what_those_need_but_no_torch() -> None:
    lock = (ROOT / "requirements.txt").read_text("utf-8")
    needed = {name: text for name, _, text in sagemaker_entry.needed_packages(lock)}

    for name in needed:
        # Some are for other systems.
        for line in (metadata.requires(name) or []) if sagemaker_entry.installed(name) else []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in needed, name
    assert not needed.keys() & {"torch", "torchvision", "triton", "dvc"}
    assert all("--hash=sha256:" in text for text in needed.values())


def test_a_job_installs_only_what_the_image_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = (ROOT / "requirements.txt").read_text("utf-8")
    ran: list[list[str]] = []
    monkeypatch.setattr(sagemaker_entry, "ML", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command))
    there = {name: version for name, version, _ in sagemaker_entry.needed_packages(lock)}
    del there["simplejpeg"]
    there["filelock"] = "0.1"
    monkeypatch.setattr(sagemaker_entry, "installed", there.get)

    sagemaker_entry.install_missing(lock)

    asked = (tmp_path / "requirements.txt").read_text("utf-8")
    # Of some the lock has a version for older Pythons too.
    assert {"simplejpeg", "filelock"} <= set(re.findall(r"^([a-z0-9-]+)==", asked, re.MULTILINE))
    assert "transformers==" not in asked
    (command,) = ran
    assert {"--require-hashes", "--no-deps"} < set(command)
