"""Copies of the working tree in which tests run DVC, with an S3 server for data and remote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tools.s3 import CLIENT_ENVIRONMENT
from tools.synthetic import synthetic_bins

ROOT = Path(__file__).parent.parent
SYNTHETIC_BINS = 160
SETTINGS = [
    "bucket.url=s3://bins",
    "index.max_rejects=0.05",
    "subset.bins=70",
    "fetch.shard_bins=30",
    "resize.size=32",
    "resize.max_rejects=0.05",
    "split.train=36",
    "split.validation=12",
    "split.test=20",
    # The network of torchvision's that trains fastest on a CPU.
    "train.resnet34.name=squeezenet1_1",
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


def copy_working_tree(source: Path, target: Path) -> None:
    """Copy the files that git would commit, as they are now: no DVC outputs, no local settings."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=source, stdout=subprocess.PIPE, text=True, check=True)
    for name in listed.stdout.split("\0"):
        # dvc.lock records a run whose outputs the copy does not have.
        if (source / name).is_file() and name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def fill_buckets(folder: Path) -> None:
    """Write an empty bucket, and one with a truncated photograph and a garbled record."""
    for name in ("storage", "bins/bin-images", "bins/metadata"):
        (folder / name).mkdir(parents=True)
    for synthetic in synthetic_bins(SYNTHETIC_BINS, seed=3):
        photograph, record = synthetic.photograph, synthetic.record
        if synthetic.id == "00040":
            record = b"not a record"
        if synthetic.id == "00007":
            photograph = photograph[:2000]
        (folder / f"bins/bin-images/{synthetic.id}.jpg").write_bytes(photograph)
        (folder / f"bins/metadata/{synthetic.id}.json").write_bytes(record)


def fresh_environment(home: Path) -> dict[str, str]:
    """The environment of a fresh machine: no user configuration, no credentials."""
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "DVC_SITE_CACHE_DIR": str(home / "dvc"),
        # Such small networks gain nothing from more threads, which would wait actively.
        "OMP_NUM_THREADS": "1",
        **CLIENT_ENVIRONMENT,
    }


class Clone:
    """A git clone with the programs and the environment for running DVC in it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def run(self, *command: str) -> str:
        """Run a command and return its output. A failure shows the output."""
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

    @staticmethod
    def stages_run(text: str) -> list[str]:
        """The stages that ran, according to the output of `dvc repro` or `dvc exp run`."""
        lines = text.splitlines()
        return [line.split("'")[1] for line in lines if line.startswith("Running stage")]

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

    def copy(self, folder: Path) -> "Clone":
        """A copy that a test may change. Files that DVC has linked are linked, not copied."""

        def copy_file(source: str, target: str) -> None:
            copy = os.link if Path(source).stat().st_nlink > 1 else shutil.copy2
            copy(source, target)

        shutil.copytree(self.folder, folder, copy_function=copy_file)
        return Clone(folder, self.environment)

    def clone(self, folder: Path, source: Path | None = None) -> "Clone":
        """A colleague's clone of this one or of `source`: the same remote, but an empty cache."""
        self.run("git", "clone", "--quiet", str(source or self.folder), str(folder))
        shutil.copy(self.folder / ".dvc/config.local", folder / ".dvc/config.local")
        clone = Clone(folder, self.environment)
        clone.identify()
        return clone

    def identify(self) -> None:
        self.run("git", "config", "user.name", "Test")
        self.run("git", "config", "user.email", "test@localhost")


class Project(Clone):
    """A clone of the working tree, with the DVC remote in a bucket of the server."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        copy_working_tree(ROOT, folder)
        home = folder.with_name(f"{folder.name}-home")
        home.mkdir()
        super().__init__(folder, fresh_environment(home))
        self.run("git", "init", "--quiet", "--initial-branch=main")
        self.identify()
        self.run("git", "add", ".")
        self.run("git", "commit", "--quiet", "--message", "Everything")
        for key, value in {
            "url": "s3://storage",
            "endpointurl": endpoint,
            "access_key_id": "test",
            "secret_access_key": "test",
        }.items():
            self.run("dvc", "remote", "modify", "--local", "storage", key, value)
