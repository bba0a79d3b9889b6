"""The pretrained stage, against hubs on loopback."""

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file
from torch import Tensor

from stages import pretrained
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from tests.made import REPOSITORY, TINY_VIT, write_params

REPO = "someone/tiny-vit"
REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = ["config.json", "model.safetensors"]
SIGNATURE = "signature-that-opens-the-file-to-everybody"
ELSEWHERE = f"/elsewhere?X-Signature={SIGNATURE}"


class Hub(ThreadingHTTPServer):
    """Serves `files` by path, as the Hugging Face hub does; of those in `cut` only a half.

    Those in `signed` are elsewhere, under a URL with a signature. Those in `refused` it does not
    give, with such a status, and repeats the credentials.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.signed: set[str] = set()
        self.refused: dict[str, int] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        data = self._head()
        self.wfile.write(data[: len(data) // 2] if self.path in self.server.cut else data)

    def _head(self) -> bytes:
        self.server.asked.append(f"{self.command} {self.path}")
        data = self.server.files.get(self.path)
        if self.path in self.server.signed:
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}{ELSEWHERE}")
        elif self.command == "GET" and self.path in self.server.refused:
            self.send_response(self.server.refused[self.path])
            self.send_header("X-Error-Message", f"not for {self.headers['Authorization']}")
        else:
            self.send_response(200 if data is not None else 404)
        self.send_header("X-Repo-Commit", REVISION)
        if data is None:
            known = self.path.startswith(f"/{REPO}/resolve/{REVISION}/")
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RevisionNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        return data or b""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def vit_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**TINY_VIT)).save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def resnet_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state: dict[str, Tensor] = torchvision.models.resnet34().state_dict()
    return state


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where the hubs' own caches are too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture
def vit_project(
    project: Path, hub: Hub, vit_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A project whose ViT is the hub's."""
    hub.files = {f"/{REPO}/resolve/{REVISION}/{name}": data for name, data in vit_files.items()}
    use_endpoint(monkeypatch, hub.url)
    # A hub that does not answer is asked again for half a minute.
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    write_params(project, {"train.vit.name": REPO, "train.vit.revision": REVISION})
    return project


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT sets, which the library has read when it was imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def serve_resnet(hub: Hub, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> str:
    """Serve the weights under a name with the start of their SHA-256, as PyTorch does."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = f"/resnet34-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    hub.files = {path: data}
    weights = torchvision.models.ResNet34_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights.value, "url", hub.url + path)
    return path


def run_command(folder: Path, hub_url: str, model: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-m", "stages.pretrained", model],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def error_line(monkeypatch: pytest.MonkeyPatch, model: str) -> str:
    """What the command prints when it fails, checked to be one line."""
    monkeypatch.setattr("sys.argv", ["pretrained", model])
    with pytest.raises(SystemExit) as stopped:
        run_stage("pretrained", pretrained.main, model="")
    # A text as exit code goes to stderr, and the process ends with 1.
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code
    return stopped.value.code


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_command_keeps_the_hubs_files_byte_for_byte(
    project: Path, hub: Hub, vit_files: dict[str, bytes]
) -> None:
    write_params(project, {"train.vit.name": REPO, "train.vit.revision": REVISION})
    hub.files = {f"/{REPO}/resolve/{REVISION}/{name}": data for name, data in vit_files.items()}

    done = run_command(project, hub.url, "vit")

    assert done.returncode == 0, done.stderr
    folder = project / "models/pretrained/vit"
    assert {name: (folder / name).read_bytes() for name in FILES} == vit_files
    assert json.loads((folder / "source.json").read_text()) == {
        "pretrained": True,
        "source": f"{hub.url}/{REPO}/tree/{REVISION}",
        "sha256": {name: sha256(data) for name, data in vit_files.items()},
    }


def test_the_command_fails_with_one_line_and_exit_1(project: Path, hub: Hub) -> None:
    write_params(project, {"train.vit.name": REPO, "train.vit.revision": REVISION})

    done = run_command(project, hub.url, "vit")

    assert done.returncode == 1
    assert done.stderr.count("error: config.json of") == 1
    assert "Traceback" not in done.stderr
    assert not (project / "models/pretrained/vit").exists()


@pytest.mark.usefixtures("vit_project")
def test_nothing_but_the_named_files_is_kept() -> None:
    pretrained.main("vit")

    files = {path.name for path in Path("models/pretrained/vit").rglob("*")}
    assert files == {*FILES, "source.json"}


@pytest.mark.usefixtures("vit_project")
def test_a_second_download_gives_the_same_bytes() -> None:
    def outputs() -> dict[Path, bytes]:
        pretrained.main("vit")
        folder = Path("models/pretrained/vit")
        return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    assert outputs() == outputs()


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.usefixtures("vit_project")
def test_a_file_that_the_hub_lacks_is_named(
    missing: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub.files[f"/{REPO}/resolve/{REVISION}/{missing}"]

    line = error_line(monkeypatch, "vit")

    assert f"error: {missing} of {REPO} at {REVISION} cannot be had" in line
    assert not Path("models/pretrained/vit").exists()


def test_a_revision_that_the_hub_lacks_is_named(
    vit_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(vit_project, {"train.vit.name": REPO, "train.vit.revision": "v9"})

    line = error_line(monkeypatch, "vit")

    assert f"{REPO} at v9 cannot be had" in line
    assert not Path("models/pretrained/vit").exists()


def test_a_name_that_the_hub_does_not_allow_is_one_line(
    vit_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(vit_project, {"train.vit.name": "some--one/vit"})

    assert "some--one/vit" in error_line(monkeypatch, "vit")


@pytest.mark.usefixtures("vit_project")
def test_a_hub_that_cannot_be_reached_is_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, closed_url())

    line = error_line(monkeypatch, "vit")

    assert f"config.json of {REPO} at {REVISION} cannot be had" in line
    assert hub.asked == []
    assert not Path("models/pretrained/vit").exists()


def closed_url() -> str:
    """Of a port that was free a moment ago, where nobody listens."""
    with Hub() as server:
        return server.url


@pytest.mark.usefixtures("vit_project")
def test_a_download_that_breaks_off_is_one_line_and_the_next_run_gets_it(
    hub: Hub, vit_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut = {f"/{REPO}/resolve/{REVISION}/model.safetensors"}

    line = error_line(monkeypatch, "vit")

    assert f"model.safetensors of {REPO} at {REVISION} cannot be had" in line
    assert not Path("models/pretrained/vit").exists()
    hub.cut = set()
    pretrained.main("vit")
    weights = Path("models/pretrained/vit/model.safetensors").read_bytes()
    assert weights == vit_files["model.safetensors"]


@pytest.mark.usefixtures("vit_project")
@pytest.mark.parametrize("cut", [False, True], ids=["refused", "cut"])
def test_the_signature_of_a_file_is_not_printed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, *, cut: bool
) -> None:
    hub.signed = {f"/{REPO}/resolve/{REVISION}/model.safetensors"}
    hub.files[ELSEWHERE] = b"whole"
    if cut:
        hub.cut = {ELSEWHERE}
    else:
        hub.refused = {ELSEWHERE: 410}
    logged: list[str] = []
    log = logging.Handler()
    monkeypatch.setattr(log, "emit", lambda record: logged.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [log])

    line = error_line(monkeypatch, "vit")

    assert f"GET {ELSEWHERE}" in hub.asked
    assert f"model.safetensors of {REPO} at {REVISION} cannot be had: " in line
    assert cut or f"{hub.url}/elsewhere'" in line
    assert SIGNATURE not in line + " ".join(logged)


@pytest.mark.usefixtures("vit_project")
def test_a_token_that_a_server_repeats_is_not_printed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_mine")
    hub.refused = {f"/{REPO}/resolve/{REVISION}/config.json": 403}

    line = error_line(monkeypatch, "vit")

    assert "config.json of someone/tiny-vit" in line
    assert "403 Forbidden: not for Bearer ***" in line
    assert "hf_token_of_mine" not in line


def test_torchvisions_weights_are_kept_as_safetensors(
    project: Path, hub: Hub, resnet_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(project, {})
    path = serve_resnet(hub, resnet_state, monkeypatch)

    pretrained.main("resnet34")

    folder = Path("models/pretrained/resnet34")
    kept = load_file(folder / "model.safetensors")
    assert kept.keys() == resnet_state.keys()
    for name, weight in resnet_state.items():
        assert kept[name].dtype == weight.dtype
        assert torch.equal(kept[name], weight), name
    assert sorted(file.name for file in folder.iterdir()) == [*FILES, "source.json"]
    assert json.loads((folder / "config.json").read_text()) == {
        "library": "torchvision",
        "name": "resnet34",
        "num_classes": 1000,
        "config": {},
    }
    assert json.loads((folder / "source.json").read_text()) == {
        "pretrained": True,
        "source": hub.url + path,
        "sha256": {name: sha256((folder / name).read_bytes()) for name in FILES},
    }


def test_torchvision_weights_with_another_hash_are_refused(
    project: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(project, {})
    path = serve_resnet(hub, {"fc.bias": torch.zeros(1000)}, monkeypatch)
    hub.files[path] = hub.files[path][:-1] + b"!"

    line = error_line(monkeypatch, "resnet34")

    assert f"{hub.url}{path} cannot be had: invalid hash value" in line
    assert not Path("models/pretrained/resnet34").exists()


def test_a_copy_that_torch_kept_and_that_was_changed_is_refused(
    project: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(project, {})
    path = serve_resnet(hub, {"fc.bias": torch.zeros(1000)}, monkeypatch)
    pretrained.main("resnet34")
    kept = project / "torch/hub/checkpoints" / path.lstrip("/")
    torch.save({"fc.bias": torch.ones(1000)}, kept)

    line = error_line(monkeypatch, "resnet34")

    assert f"error: {kept} is not the file of {hub.url}{path}: remove it, and run again" in line
    kept.unlink()
    pretrained.main("resnet34")


def test_torchvision_weights_that_are_not_there_are_one_line(
    project: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(project, {})
    path = serve_resnet(hub, {}, monkeypatch)
    hub.files = {}

    assert f"{hub.url}{path} cannot be had: HTTP Error 404" in error_line(monkeypatch, "resnet34")
    assert not Path("models/pretrained/resnet34").exists()


@pytest.mark.parametrize(("name", "revision"), [("resnet34", "V9"), ("resnet34000", "DEFAULT")])
def test_weights_that_torchvision_does_not_know_are_a_user_error(
    project: Path, name: str, revision: str
) -> None:
    write_params(project, {"train.resnet34.name": name, "train.resnet34.revision": revision})

    with pytest.raises(UserError, match=f"no weights {revision} of {name}:"):
        pretrained.main("resnet34")
    assert not Path("models/pretrained/resnet34").exists()


@pytest.mark.parametrize("model", ["resnet34", "vit"])
def test_a_random_start_is_only_marked(project: Path, model: str) -> None:
    write_params(project, {f"train.{model}.pretrained": False})

    pretrained.main(model)

    (marker,) = Path("models/pretrained", model).iterdir()
    assert marker.name == "source.json"
    assert json.loads(marker.read_text()) == {"pretrained": False}


def test_a_model_that_params_lack_is_a_user_error(project: Path) -> None:
    write_params(project, {})

    with pytest.raises(UserError, match=r"no train\.alexnet; it has resnet34, vit"):
        pretrained.main("alexnet")


def test_what_a_run_leaves_behind_is_only_its_output(project: Path) -> None:
    write_params(project, {"train.vit.pretrained": False})

    pretrained.main("vit")

    assert list((project / ".cache").iterdir()) == []
