"""SkyPilot's tasks: SkyPilot accepts them, and their commands work as on its machines."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from dulwich.repo import Repo
from dulwich.server import BackendRepo, DictBackend
from dulwich.web import make_wsgi_chain
from ruamel.yaml import YAML

from tests.project import ROOT, Clone, Project, copy_working_tree
from tools.s3 import free_port

# DVC's own.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")

TASKS = ["sky.yaml", "sky-nodes.yaml"]
TOKEN = "a-secret-token"  # noqa: S105 - of the server below
#: The folder in which `make check-sky` installs SkyPilot, whose many dependencies are not in the
#: project's lock.
SKY = ROOT / ".venv-sky/bin/python"
needs_sky = pytest.mark.skipif(not SKY.exists(), reason="SkyPilot isn't installed: make check-sky")
CHECK = """
import json, sys, sky
from sky.data.storage_utils import get_excluded_files
from sky.utils import yaml_utils
config = yaml_utils.read_yaml(sys.argv[1])
given = {name: "x" for name, value in config["envs"].items() if value is None}
secrets = {name: "x" for name in config["secrets"]}
task = sky.Task.from_yaml_config(config, given.items(), secrets.items())
gpus = [accelerators for each in task.resources for accelerators in each.accelerators.items()]
print(json.dumps([task.num_nodes, gpus, get_excluded_files(sys.argv[2])]))
"""


def read_task(name: str) -> dict[str, Any]:
    task: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "cloud" / name)
    return task


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def git_server(repository: Path) -> Iterator[str]:
    """Serve a repository over HTTP to clients with the token; yields its URL."""
    repositories: dict[str, BackendRepo] = {"/": Repo(str(repository))}
    application = make_wsgi_chain(DictBackend(repositories))
    expected = base64.b64encode(f"git:{TOKEN}".encode()).decode()

    def authorized(
        environment: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if environment.get("HTTP_AUTHORIZATION") == f"Basic {expected}":
            answer: Iterable[bytes] = application(environment, start_response)
            return answer
        start_response("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="git"')])
        return [b""]

    with make_server("127.0.0.1", 0, authorized, handler_class=QuietHandler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


class Machine(Clone):
    """A working tree as SkyPilot copies it, without local DVC settings and git identity."""

    def __init__(self, project: Clone, folder: Path, endpoint: str, url: str) -> None:
        project.run("git", "clone", "--quiet", str(project.folder), str(folder))
        home = folder.with_name(f"{folder.name}-home")
        home.mkdir()
        given = {
            "HOME": str(home),
            "MODEL": "vit",
            "EXPERIMENT": "from-the-cloud",
            "REMOTE": "s3://storage",
            "REPOSITORY": url,
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "GIT_TOKEN": TOKEN,
        }
        super().__init__(folder, project.environment | given)
        # Of `make setup`.
        activate = folder / ".venv/bin/activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n', "utf-8")

    def start(self, script: str, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


# This does not need SkyPilot, but it takes two minutes.
@pytest.mark.slow
@needs_sky
def test_two_machines_train_a_model_and_share_the_experiment(
    project: Project, endpoint: str, tmp_path: Path
) -> None:
    project.run("dvc", "push")
    project.run("git", "clone", "--quiet", "--bare", str(project.folder), str(tmp_path / "bare"))
    script = read_task("sky-nodes.yaml")["run"].replace("29500", str(free_port()))
    both = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    both["SKYPILOT_NODE_IPS"] = "127.0.0.1\n127.0.0.1"
    with git_server(tmp_path / "bare") as url:
        running = []
        for rank in range(2):
            machine = Machine(project, tmp_path / f"machine-{rank}", endpoint, url)
            # A change that is not committed, as when somebody tries a value.
            set_learning_rate(machine)
            running.append(machine.start(script, SKYPILOT_NODE_RANK=str(rank), **both))
        outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert "vit: 36 bins on 2 x " in outputs[0]
    ran = set(re.findall(r"^Running stage '(.+)':", outputs[0], re.MULTILINE))
    assert ran == {"evaluate@vit", "ensemble", "witness", "report"}
    assert TOKEN not in "".join(outputs)

    colleague = project.clone(tmp_path / "colleague", tmp_path / "bare")
    colleague.run("dvc", "exp", "pull", "origin", "from-the-cloud")
    colleague.run("dvc", "exp", "apply", "from-the-cloud")
    assert "0.0123" in (colleague.folder / "params.yaml").read_text("utf-8")
    trained = Path("models/vit/model.safetensors")
    expected = (tmp_path / "machine-0" / trained).read_bytes()
    assert (colleague.folder / trained).read_bytes() == expected
    assert (project.folder / trained).read_bytes() != expected


def set_learning_rate(machine: Machine) -> None:
    path = machine.folder / "params.yaml"
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load(path)
    params["train"]["vit"]["learning_rate"] = 0.0123
    yaml.dump(params, path)


def test_one_machine_does_what_the_first_of_two_does_except_their_training() -> None:
    one, two = (read_task(name)["run"].splitlines() for name in TASKS)

    assert [line for line in two if line in one] == one
    joint = [line for line in two if line not in one]
    assert joint[0].startswith("dvc pull ")
    assert joint[-1] == 'dvc commit --force "train@$MODEL"'


def test_both_set_up_a_machine_alike() -> None:
    one, two = map(read_task, TASKS)

    assert one["setup"] == two["setup"]
    assert one["secrets"] == two["secrets"]
    assert one["envs"].items() < two["envs"].items()


@pytest.mark.parametrize("name", TASKS)
def test_a_task_declares_everything_it_uses_and_holds_no_secret(name: str) -> None:
    task = read_task(name)

    used = set(re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"]))
    given = {*task["envs"], *task["secrets"]}
    # The AWS SDK reads the keys.
    assert used - given <= {"HOME"} | {name for name in used if name.startswith("SKYPILOT_")}
    assert given - used == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert set(task["secrets"].values()) == {None}


@pytest.mark.slow
@needs_sky
@pytest.mark.parametrize(("name", "nodes", "gpus"), [("sky.yaml", 1, 1), ("sky-nodes.yaml", 2, 4)])
def test_skypilot_accepts_a_task(name: str, nodes: int, gpus: int, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    copy_working_tree(ROOT, tree)
    subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
    (tree / ".dvc/config.local").touch()
    done = subprocess.run(
        [SKY, "-c", CHECK, ROOT / "cloud" / name, tree],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found_nodes, found_gpus, left_out = json.loads(done.stdout)
    assert found_nodes == nodes
    assert sorted(found_gpus) == [["A10G", gpus], ["L4", gpus]]
    # DVC's local settings, which may hold keys, would not be sent.
    assert left_out == [".dvc/config.local"]
