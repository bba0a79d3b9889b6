"""Run the train stage in a SageMaker job, with the code and data that cloud/sagemaker.py sent.

This file uses only Python's standard library, because the image lacks most of the project's
packages. SageMaker restores the checkpoints before it starts this, and saves them during the job.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# SageMaker's folder for inputs and outputs.
ML = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
INPUT = ML / "input/data"
REPOSITORY = ML / "repository"
SITE = ML / "site"
# The image has builds of these for its GPU.
OF_IMAGE = {"torch", "torchvision"}
# The packages that training imports, except those of the image.
PACKAGES = {
    "filelock",
    "huggingface-hub",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "pydantic",
    "ruamel-yaml",
    "safetensors",
    "scipy",
    "simplejpeg",
    "timm",
    "tqdm",
    "transformers",
}


def main(model: str) -> None:
    shutil.copytree(INPUT / "code", REPOSITORY)
    (ML / "checkpoints").mkdir(exist_ok=True)
    (REPOSITORY / "models").mkdir()
    for path, target in {
        "data": INPUT / "data/data",
        "models/pretrained": INPUT / "data/models/pretrained",
        # The stage keeps its checkpoints in .cache.
        ".cache": ML / "checkpoints",
    }.items():
        (REPOSITORY / path).symlink_to(target)
    install_missing((REPOSITORY / "requirements.txt").read_text("utf-8"))
    code, last_line = train(model)
    if code:
        # SageMaker shows this as the job's FailureReason.
        (ML / "output").mkdir(exist_ok=True)
        (ML / "output/failure").write_text(last_line, "utf-8")
        sys.exit(code)
    # SageMaker packs this folder as model.tar.gz.
    shutil.copytree(REPOSITORY / "models" / model, ML / "model", dirs_exist_ok=True)
    shutil.copy(REPOSITORY / "reports" / model / "curves.csv", ML / "model")


def install_missing(lock: str) -> None:
    """Install those of needed_packages that the image lacks into SITE."""
    missing = [text for name, version, text in needed_packages(lock) if installed(name) != version]
    if not missing:
        return
    requirements = ML / "requirements.txt"
    requirements.write_text("\n".join(missing), "utf-8")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(SITE)]
    subprocess.run([*command, "-r", str(requirements)], check=True)


def needed_packages(lock: str) -> list[tuple[str, str, str]]:
    """Name, version and text in requirements.txt of PACKAGES and of what these need."""
    blocks = re.findall(r"^[^\s#].*\n(?:\s.*\n?)*", lock, re.MULTILINE)
    needed, before = set(PACKAGES), set[str]()
    while needed != before:
        before = set(needed)
        # Each block says which packages need it: "# via transformers".
        needed |= {name_of(text) for text in blocks if before & set(words_of_via(text))} - OF_IMAGE
    chosen = [text for text in blocks if name_of(text) in needed]
    return [(name_of(text), re.findall(r"==([^\s;]+)", text)[0], text) for text in chosen]


def name_of(block: str) -> str:
    return re.split(r"[=\[]", block)[0]


def words_of_via(block: str) -> list[str]:
    return re.findall(r"[\w.-]+", block.partition("# via")[2])


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def train(model: str) -> tuple[int, str]:
    """The stage's exit code, and the last line that it printed."""
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.train", model],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # SageMaker sends SIGTERM to stop a job, and two minutes before it takes a spot instance away.
    signal.signal(signal.SIGTERM, lambda number, _frame: process.send_signal(number))
    line = ""
    for line in process.stdout or ():
        print(line, end="", flush=True)
    return process.wait(), line


if __name__ == "__main__":
    main(sys.argv[1])
