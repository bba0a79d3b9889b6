"""Every stage on a disk that is too small, and then on one with room: nothing is lost."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure

from stages import fetch, index
from stages.collecting.records import INDEX
from stages.formats.shards import Reject, shard_paths, write_rejects, write_table
from stages.formats.tables import write_csv, write_json
from stages.imaging.loader import pack_bins
from stages.networks.classifier import save_classifier
from stages.reporting import plots
from stages.runtime.space import DiskFullError, readable
from stages.runtime.work import publish_folder
from stages.training.checkpoint import TrainingState, save_checkpoint
from tests.conftest import S3, bucket_params, objects_of
from tests.faults import FaultProxy, fault_proxy
from tests.forks import Modules
from tests.made import (
    TINY_VIT,
    bin_rows,
    model_knobs,
    random_classifier,
    tiny_classifier,
    tiny_network,
    write_params,
    write_resized,
    write_split,
)
from tests.project import Clone, Project
from tests.test_evaluate import OUTPUTS as EVALUATED
from tools.drawing import DrawnBin

PAGE = 4096
# Two files that say who runs.
LOCKS = 2 * PAGE
PLENTY = 2**29
KNOBS: dict[str, Any] = {
    "subset.bins": 60,
    "fetch.shard_bins": 10,
    "resize.size": 32,
    "split.train": 44,
    "split.test": 16,
    "split.validation": 0.25,
    # A checkpoint after each step.
    "run.checkpoint_minutes": 1e-9,
    "train.vit.pretrained": False,
    "train.vit.config": TINY_VIT,
    "train.vit.batch_size": 4,
    "train.vit.epochs": 3,
    "train.vit.warmup_steps": 1,
}
NO_ROOM = (
    r"no room for (?P<what>[^:(]+?)( \(about (?P<needed>[\d.]+ \w+)\))?: the disk of"
    r" (?P<folder>\S+) has (?P<free>[\d.]+ \w+) free; make room( for (?P<missing>[\d.]+ \w+))?, and"
    r" run again(\. What is left needs about (?P<left>[\d.]+ \w+))?"
)


@dataclass(frozen=True)
class Stage:
    """A module with its arguments, what it writes, and the exit codes of its errors and its end."""

    command: tuple[str, ...]
    outs: tuple[str, ...]
    fails: int = 1
    ends: int = 0

    @property
    def name(self) -> str:
        return self.command[0].rpartition(".")[2]


INDEX_STAGE = Stage(("stages.index",), ("data/index.parquet", "data/index.json"))
SUBSET = Stage(("stages.subset",), ("data/subset.parquet",))
FETCH = Stage(("stages.fetch",), ("data/raw", "data/unfetched.csv"))
RESIZE = Stage(("stages.resize",), ("data/resized", "data/quarantine.csv"))
SPLIT = Stage(("stages.split",), ("data/split.csv", "data/split.json"))
PRETRAINED = Stage(("stages.pretrained", "vit"), ("models/pretrained/vit",))
TRAIN = Stage(("stages.train", "vit"), ("models/vit", "reports/vit/curves.csv"))
EVALUATE = Stage(
    ("stages.evaluate", "vit"), ("models/vit.md", *(f"reports/vit/{name}" for name in EVALUATED))
)
REPORT = Stage(
    ("stages.report",), ("reports/comparison.csv", "reports/figures", "reports/index.html")
)
# With the counts of other bins, all are alarms.
AUDIT = Stage(("tools.audit", "data/resized"), ("audit",), fails=2, ends=1)
STAGES = [
    INDEX_STAGE,
    SUBSET,
    FETCH,
    RESIZE,
    SPLIT,
    PRETRAINED,
    TRAIN,
    EVALUATE,
    REPORT,
    AUDIT,
]


@dataclass(frozen=True)
class Disk:
    """A file system in memory."""

    folder: Path

    @property
    def used(self) -> int:
        status = os.statvfs(self.folder)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def leave(self, room: int) -> None:
        """Make it so large that so many bytes are free, in pages."""
        # While a process writes there, what is used may have become more.
        while self._resize(self.used + room):
            time.sleep(0.001)

    def _resize(self, size: int) -> int:
        command = ["mount", "-o", f"remount,size={max(PAGE, size)}", str(self.folder)]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[], Disk]]:
    disks: list[Disk] = []

    def make() -> Disk:
        disk = Disk(tmp_path / f"disk-{len(disks)}")
        disk.folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={PLENTY}", "tmpfs", str(disk.folder)]
        mounted = subprocess.run(command, check=False, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no disk of a size can be mounted here: {mounted.stderr.strip()}")
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        subprocess.run(["umount", "--lazy", str(disk.folder)], check=True)


@pytest.fixture
def disk(make_disk: Callable[[], Disk]) -> Disk:
    return make_disk()


@pytest.fixture(scope="module")
def proxy(s3: S3) -> Iterator[FaultProxy]:
    with fault_proxy(s3.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Modules:
    return Modules(tmp_path_factory.mktemp("python") / "output")


@pytest.fixture(scope="module")
def undisturbed(
    python: Modules,
    s3: S3,
    proxy: FaultProxy,
    drawn: list[DrawnBin],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder in which all stages have run, with as much room as they want."""
    folder = tmp_path_factory.mktemp("undisturbed")
    bucket = s3.make_bucket(objects_of(drawn)).model_copy(update={"endpoint": proxy.url})
    write_params(folder, KNOBS | bucket_params(bucket))
    for stage in STAGES:
        code, printed = python.run(folder, *stage.command)
        assert code == stage.ends, printed
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those of `.cache`, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.relative_to(folder).parts
    }


def size_of(folder: Path, stage: Stage) -> int:
    """What the stage's outputs take there, in pages."""
    files = [file for out in stage.outs for file in [folder / out, *(folder / out).glob("*")]]
    return sum(pages(file.stat().st_size) for file in files if file.is_file())


def pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def copy_inputs(undisturbed: Path, disk: Disk, stage: Stage) -> Path:
    """The undisturbed folder on the disk, without what the stage writes."""
    folder = disk.folder / "workspace"
    shutil.copytree(undisturbed, folder)
    for out in stage.outs:
        if (folder / out).is_dir():
            shutil.rmtree(folder / out)
        else:
            (folder / out).unlink()
    return folder


def fail(python: Modules, undisturbed: Path, folder: Path, stage: Stage) -> dict[str, str]:
    """Run it, see that it ends as on a full disk; the parts of what it said."""
    code, printed = python.run(folder, *stage.command)
    return check_failure(code, printed, undisturbed, folder, stage)


def check_failure(
    code: int, printed: str, undisturbed: Path, folder: Path, stage: Stage
) -> dict[str, str]:
    assert code == stage.fails, printed
    name = "audit" if stage is AUDIT else " ".join([stage.name, *stage.command[1:]])
    *_, last = printed.splitlines()
    said = re.fullmatch(f"{name}: error: {NO_ROOM}", last)
    assert said, printed
    assert "Error" not in printed
    assert "Traceback" not in printed
    # What there is, is whole, and nothing lies beside it.
    assert contents(folder).items() <= contents(undisturbed).items()
    return {key: value for key, value in said.groupdict().items() if value is not None}


def succeed(python: Modules, undisturbed: Path, folder: Path, stage: Stage) -> str:
    """Run it to its end, see that it wrote what an undisturbed run does; what it printed."""
    code, printed = python.run(folder, *stage.command)
    assert code == stage.ends, printed
    assert contents(folder) == contents(undisturbed)
    assert list((folder / ".cache").iterdir()) == []
    return printed


@pytest.mark.parametrize(
    "stage", [INDEX_STAGE, SUBSET, SPLIT, PRETRAINED], ids=lambda stage: stage.name
)
def test_whatever_room_there_is_a_stage_ends_well_or_says_what_it_needs(
    python: Modules, undisturbed: Path, disk: Disk, stage: Stage
) -> None:
    folder = copy_inputs(undisturbed, disk, stage)
    needed = size_of(undisturbed, stage)
    # The first page is for the file that says who runs.
    for room in range(0, needed + PAGE, PAGE if needed < 3 * PAGE else 3 * PAGE):
        disk.leave(room)
        fail(python, undisturbed, folder, stage)
    disk.leave(PLENTY)
    succeed(python, undisturbed, folder, stage)


@pytest.mark.parametrize("stage", [EVALUATE, REPORT, AUDIT], ids=lambda stage: stage.name)
def test_a_stage_that_fails_half_way_goes_on_after_room_is_made(
    python: Modules, undisturbed: Path, disk: Disk, stage: Stage
) -> None:
    folder = copy_inputs(undisturbed, disk, stage)
    disk.leave(size_of(undisturbed, stage) * 3 // 4)
    said = fail(python, undisturbed, folder, stage)
    assert said["what"].startswith(("reports/", "models/", "audit/"))
    disk.leave(PLENTY)
    succeed(python, undisturbed, folder, stage)


def test_fetch_asks_for_the_room_it_needs_before_it_reads_anything(
    python: Modules, undisturbed: Path, disk: Disk, proxy: FaultProxy
) -> None:
    folder = copy_inputs(undisturbed, disk, FETCH)
    needed = sum(pq.read_table(folder / "data/subset.parquet")["size"].to_pylist())
    disk.leave(100 * PAGE)
    proxy.take_requests()
    said = fail(python, undisturbed, folder, FETCH)
    assert not proxy.take_requests()
    free = 100 * PAGE - LOCKS
    assert said == {
        "what": fetch.WHAT,
        "needed": readable(needed),
        "folder": said["folder"],
        "free": readable(free),
        "missing": readable(needed - free),
    }
    assert Path(said["folder"]).parent == folder / ".cache"


def test_fetch_reads_no_photograph_twice_that_had_its_place(
    python: Modules, undisturbed: Path, disk: Disk, proxy: FaultProxy
) -> None:
    folder = copy_inputs(undisturbed, disk, FETCH)
    # What the photographs take by themselves, without what is around them.
    photographs = pq.read_table(folder / "data/subset.parquet")["size"].to_pylist()
    disk.leave(pages(sum(photographs)) + LOCKS)
    proxy.take_requests()
    said = fail(python, undisturbed, folder, FETCH)
    assert Path(said["what"]).name in {"00004.parquet", "00005.parquet"}
    assert "left" in said
    assert proxy.take_requests().total() == 60
    (done,) = folder.glob(".cache/fetch-*/shards")
    missing = {f"0000{number}.parquet" for number in range(6)} - {p.name for p in done.iterdir()}
    assert 0 < len(missing) < 3

    disk.leave(PLENTY)
    succeed(python, undisturbed, folder, FETCH)
    bins = [pq.read_table(undisturbed / "data/raw" / name)["id"].to_pylist() for name in missing]
    assert proxy.take_requests() == {f"{bin_id}.jpg": 1 for some in bins for bin_id in some}


def test_resize_asks_for_the_room_it_needs_before_it_begins(
    python: Modules, undisturbed: Path, disk: Disk
) -> None:
    folder = copy_inputs(undisturbed, disk, RESIZE)
    # All photographs of the first shard are its sample.
    sample = pq.read_table(undisturbed / "data/resized/00000.parquet")["image"]
    needed = 60 * sum(map(len, sample.to_pylist())) // len(sample)
    disk.leave(5 * PAGE + LOCKS)
    said = fail(python, undisturbed, folder, RESIZE)
    assert not list(folder.glob(".cache/resize-*/shards"))
    assert said == {
        "what": "the resized photographs",
        "needed": readable(needed),
        "folder": said["folder"],
        "free": readable(5 * PAGE),
        "missing": readable(needed - 5 * PAGE),
    }


def test_resize_makes_no_shard_twice_that_had_its_place(
    python: Modules, undisturbed: Path, disk: Disk
) -> None:
    folder = copy_inputs(undisturbed, disk, RESIZE)
    disk.leave(size_of(undisturbed, RESIZE))
    said = fail(python, undisturbed, folder, RESIZE)
    assert "left" in said
    done = {path.name: path.stat().st_ino for path in folder.glob(".cache/resize-*/shards/*")}
    assert 0 < len(done) < 6
    disk.leave(PLENTY)
    succeed(python, undisturbed, folder, RESIZE)
    kept = {name: (folder / "data/resized" / name).stat().st_ino for name in done}
    assert kept == done


def test_a_training_whose_checkpoint_finds_no_room_goes_on_from_the_one_before(
    python: Modules, undisturbed: Path, disk: Disk
) -> None:
    folder = copy_inputs(undisturbed, disk, TRAIN)
    python.start(folder, *TRAIN.command)
    deadline = time.monotonic() + 60
    while not (checkpoints := list(folder.glob(".cache/train-*/checkpoint.safetensors"))):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    disk.leave(0)
    said = check_failure(*python.finish(), undisturbed, folder, TRAIN)
    assert Path(said["what"]).name == "checkpoint.safetensors"
    # The checkpoint itself has its room already.
    weights = (undisturbed / "models/vit/model.safetensors").stat().st_size
    photographs = size_of(undisturbed, RESIZE)
    disk.leave(LOCKS + photographs + 7 * weights - checkpoints[0].stat().st_size)
    printed = succeed(python, undisturbed, folder, TRAIN)
    assert "vit: going on after epoch" in printed


def test_training_asks_for_the_room_it_needs_before_its_first_step(
    python: Modules, undisturbed: Path, disk: Disk
) -> None:
    folder = copy_inputs(undisturbed, disk, TRAIN)
    shards = shard_paths(folder / "data/resized")
    packed = sum(path.stat().st_size for path in shards)
    disk.leave(packed // 2)
    said = fail(python, undisturbed, folder, TRAIN)
    assert said["what"] == "the photographs, one after another for all processes"
    assert said["needed"] == readable(packed)
    disk.leave(2 * packed)
    said = fail(python, undisturbed, folder, TRAIN)
    assert said["what"] == "vit and its checkpoints"


@pytest.fixture
def two_disks(
    undisturbed: Path, make_disk: Callable[[], Disk], request: pytest.FixtureRequest
) -> tuple[Disk, Path]:
    """A disk, and the folder there with the inputs of a stage, whose cache is on another disk."""
    disk, other = make_disk(), make_disk()
    folder = copy_inputs(undisturbed, disk, request.param)
    (folder / ".cache").rmdir()
    (folder / ".cache").symlink_to(other.folder)
    return disk, folder


@pytest.mark.parametrize("two_disks", [FETCH], ids=["fetch"], indirect=True)
def test_fetch_asks_for_room_on_the_disk_of_its_output_too(
    python: Modules, undisturbed: Path, two_disks: tuple[Disk, Path], proxy: FaultProxy
) -> None:
    disk, folder = two_disks
    disk.leave(100 * PAGE)
    proxy.take_requests()
    said = fail(python, undisturbed, folder, FETCH)
    assert (said["what"], said["folder"]) == (fetch.WHAT, str(folder / "data"))
    assert said["free"] == readable(100 * PAGE)
    assert not proxy.take_requests()
    disk.leave(PLENTY)
    succeed(python, undisturbed, folder, FETCH)


@pytest.mark.parametrize("two_disks", [FETCH], ids=["fetch"], indirect=True)
def test_what_was_fetched_onto_another_disk_is_not_fetched_again(
    python: Modules, undisturbed: Path, two_disks: tuple[Disk, Path], proxy: FaultProxy
) -> None:
    disk, folder = two_disks
    # Too little for the pages of the last shard.
    disk.leave(size_of(undisturbed, FETCH) - 2 * PAGE)
    proxy.take_requests()
    said = fail(python, undisturbed, folder, FETCH)
    assert said["what"] == "data/raw"
    assert proxy.take_requests().total() == 60
    disk.leave(PLENTY)
    succeed(python, undisturbed, folder, FETCH)
    assert not proxy.take_requests()


@pytest.mark.parametrize("two_disks", [RESIZE], ids=["resize"], indirect=True)
def test_what_was_resized_onto_another_disk_is_not_resized_again(
    python: Modules, undisturbed: Path, two_disks: tuple[Disk, Path]
) -> None:
    disk, folder = two_disks
    disk.leave(size_of(undisturbed, RESIZE) - 2 * PAGE)
    said = fail(python, undisturbed, folder, RESIZE)
    assert said["what"] == "data/resized"
    done = [path.stat().st_mtime_ns for path in sorted(folder.glob(".cache/resize-*/shards/*"))]
    assert len(done) == 6
    disk.leave(size_of(undisturbed, RESIZE))
    succeed(python, undisturbed, folder, RESIZE)


def test_dvc_whose_cache_finds_no_room_goes_on_without_fetching_again(
    project: Project, disk: Disk, tmp_path: Path
) -> None:
    clone = Clone(tmp_path / "clone", project.environment)
    cache = shutil.ignore_patterns("cache")
    shutil.copytree(project.folder, clone.folder, ignore=cache, symlinks=True)
    clone.run("dvc", "cache", "dir", "--local", str(disk.folder / "cache"))
    params = clone.folder / "params.yaml"
    params.write_text(re.sub("shard_bins: [0-9]+", "shard_bins: 20", params.read_text("utf-8")))
    disk.leave(20 * PAGE)
    with pytest.raises(AssertionError, match="No space left on device"):
        clone.run("dvc", "repro", "fetch")
    fetched = {path: path.stat().st_ino for path in clone.folder.glob(".cache/fetch-*/shards/*")}
    assert len(fetched) == 4

    disk.leave(PLENTY)
    clone.run("dvc", "repro", "fetch")
    assert {path: path.stat().st_ino for path in fetched} == fetched
    assert "up to date" in clone.run("dvc", "status", "fetch")


def write_index(folder: Path) -> None:
    """Parts of an index into one file."""
    rows = [
        {"id": f"{number:05d}", "etag": sha256(b"%d" % number).hexdigest()} for number in range(600)
    ]
    parts = folder.with_name("parts")
    if not parts.exists():
        for number in range(3):
            table = pa.Table.from_pylist(rows[number::3], INDEX)
            write_table(parts / f"{number}.parquet", table)
    index.concatenate(parts, folder / "index.parquet")


def write_figure(folder: Path) -> None:
    figure = Figure()
    figure.subplots().plot(range(100))
    plots.save_figure(figure, folder / "figure.png")


def write_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    network = tiny_network(5)
    optimizer = torch.optim.Adam(network.parameters())
    zeros = torch.zeros(3, dtype=torch.float64)
    state = TrainingState(network, optimizer, None, zeros, torch.zeros(500, 3))
    save_checkpoint(folder / "checkpoint.safetensors", state, (0.0, 0.0))


def write_transformers(folder: Path) -> None:
    knobs = model_knobs("vit", pretrained=False, config=TINY_VIT)
    save_classifier(random_classifier(knobs), knobs, folder)


def write_torchvision(folder: Path) -> None:
    save_classifier(tiny_classifier([1, 2, 3]), model_knobs("resnet34"), folder)


def write_pack(folder: Path) -> None:
    inputs = folder.with_name("inputs")
    if not inputs.exists():
        rows = bin_rows([1, 2, 3] * 10)
        write_resized(inputs / "resized", rows)
        write_split(inputs / "split.csv", {row["id"]: "train" for row in rows})
    pack_bins(inputs / "resized", inputs / "split.csv", ["train"], folder)


NUMBERS = list(range(4000))
WRITERS: Mapping[str, Callable[[Path], None]] = {
    "json": lambda folder: write_json(folder / "numbers.json", NUMBERS),
    "csv": lambda folder: write_csv(folder / "numbers.csv", pd.DataFrame({"number": NUMBERS})),
    "rejects": lambda folder: write_rejects(
        folder / "rejects.csv", [Reject(f"{number:05d}", "not found") for number in NUMBERS]
    ),
    "parquet": lambda folder: write_table(
        folder / "images.parquet", pa.table({"image": [bytes(100)] * 200})
    ),
    "index": write_index,
    "figure": write_figure,
    "checkpoint": write_checkpoint,
    "transformers": write_transformers,
    "torchvision": write_torchvision,
    "packed photographs": write_pack,
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_library_takes_a_full_disk_for_a_written_file(
    disk: Disk, tmp_path: Path, name: str
) -> None:
    write = WRITERS[name]
    whole, folder = tmp_path / "whole", disk.folder / "folder"
    for each in (whole, folder):
        each.mkdir()
    write(whole)
    if name in {"index", "packed photographs"}:
        # Once more, so that what it reads is on the disk before that is full.
        write(folder)
        shutil.rmtree(folder)
        folder.mkdir()
    needed = sum(pages(path.stat().st_size) for path in whole.iterdir())
    for room in range(0, needed, PAGE):
        disk.leave(room)
        with pytest.raises(DiskFullError, match=r"no room for .*; make room"):
            write(folder)
        if name not in {"transformers", "torchvision", "packed photographs"}:
            assert not list(folder.iterdir())
        shutil.rmtree(folder)
        folder.mkdir()
    disk.leave(needed)
    write(folder)
    assert contents(folder) == contents(whole)


def test_a_folder_on_a_full_disk_is_published_not_at_all(disk: Disk, tmp_path: Path) -> None:
    done, out = tmp_path / "done", disk.folder / "out"
    for folder, size in ((done, 3 * PAGE), (out, 10)):
        folder.mkdir()
        (folder / "one").write_bytes(bytes(size))
    (done / "two").write_bytes(bytes(3 * PAGE))
    for room in range(0, 6 * PAGE, PAGE):
        disk.leave(room)
        with pytest.raises(DiskFullError, match=r"out \(about 24\.6 kB\): the disk of"):
            publish_folder(done, out)
        assert contents(disk.folder) == {"out/one": bytes(10)}
    disk.leave(6 * PAGE)
    publish_folder(done, out)
    assert contents(out) == contents(done) == dict.fromkeys(["one", "two"], bytes(3 * PAGE))
