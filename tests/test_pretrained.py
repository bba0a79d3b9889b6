"""The pretrained stage, against hubs on loopback."""

import hashlib
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
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
from tests.builders import TINY_VIT, write_params

REPO = "someone/tiny-vit"
REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = ["config.json", "model.safetensors"]
OF_REPO = f"/{REPO}/resolve/{REVISION}"
SIGNATURE = "signature-that-opens-the-file-to-anybody"
ELSEWHERE = f"/elsewhere?X-Signature={SIGNATURE}"
TOKEN = "hf_token_of_mine"  # noqa: S105 - made up


class Hub(ThreadingHTTPServer):
    """Serve `files` by path, as the Hugging Face hub does, but only half of those in `cut`.

    Requests for files in `signed` are redirected to a URL with a signature. Requests for those in
    `refused` are answered with that status, and with the client's credentials in the text.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.signed: set[str] = set()
        self.refused: dict[str, int] = {}

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
            known = self.path.startswith(OF_REPO)
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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    # The client would ask a hub that does not answer again for half a minute.
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return tmp_path


@pytest.fixture
def vit_hub(
    project: Path, hub: Hub, vit_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Hub:
    """The commit of the ViT in params.yaml."""
    hub.files = {f"{OF_REPO}/{name}": data for name, data in vit_files.items()}
    use_endpoint(monkeypatch, hub.url)
    write_params(project, {"train.vit.name": REPO, "train.vit.revision": REVISION})
    return hub


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Set the value that the library read from HF_ENDPOINT when it was imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def resnet_state() -> dict[str, Tensor]:
    return {"conv1.weight": torch.rand(4, 3, 7, 7), "fc.bias": torch.zeros(1000)}


@pytest.fixture
def resnet_path(
    project: Path, hub: Hub, resnet_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The URL of the weights of params.yaml's ResNet34, with a file name like PyTorch's."""
    buffer = io.BytesIO()
    torch.save(resnet_state, buffer)
    path = f"/resnet34-{sha256(buffer.getvalue())[:8]}.pth"
    hub.files = {path: buffer.getvalue()}
    weights = torchvision.models.ResNet34_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights.value, "url", hub.url + path)
    write_params(project, {})
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def contents(model: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("models/pretrained", model).iterdir()}


def error_line(monkeypatch: pytest.MonkeyPatch, model: str) -> str:
    """The line that the failing command prints; checks that it writes no output."""
    monkeypatch.setattr("sys.argv", ["pretrained", model])
    with pytest.raises(SystemExit) as stopped:
        run_stage("pretrained", pretrained.main, model="")
    # sys.exit prints a text to stderr and exits with 1.
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code
    assert not Path("models/pretrained", model).exists()
    return stopped.value.code


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_the_hubs_files_are_kept_byte_for_byte(
    library: str, vit_hub: Hub, vit_files: dict[str, bytes]
) -> None:
    name = REPO
    if library == "timm":
        pytest.importorskip("timm", reason="timm isn't installed")
        name = "timm/test_vit.r160_in1k"
        known = {"library": "timm", "name": name.partition("/")[2], "revision": REVISION}
        write_params(Path(), {f"train.vit.{key}": value for key, value in known.items()})
        of_timm = f"/{name}/resolve/{REVISION}"
        vit_hub.files = {f"{of_timm}/{file}": data for file, data in vit_files.items()}
    for _ in range(2):
        assert pretrained.main("vit") == f"weights from {vit_hub.url}/{name}/tree/{REVISION}"

        found = contents("vit")
        assert json.loads(found.pop("source.json")) == {
            "pretrained": True,
            "source": f"{vit_hub.url}/{name}/tree/{REVISION}",
            "sha256": {name: sha256(data) for name, data in vit_files.items()},
        }
        assert found == vit_files
        assert list(Path(".cache").iterdir()) == []


def test_torchvisions_weights_are_kept_as_safetensors(
    hub: Hub, resnet_path: str, resnet_state: dict[str, Tensor]
) -> None:
    pretrained.main("resnet34")

    folder = Path("models/pretrained/resnet34")
    kept = load_file(folder / "model.safetensors")
    assert kept.keys() == resnet_state.keys()
    assert all(torch.equal(kept[name], weight) for name, weight in resnet_state.items())
    found = contents("resnet34")
    assert json.loads(found["config.json"]) == {
        "library": "torchvision",
        "name": "resnet34",
        "num_classes": 1000,
        "config": {},
    }
    assert json.loads(found.pop("source.json")) == {
        "pretrained": True,
        "source": hub.url + resnet_path,
        "sha256": {name: sha256(found[name]) for name in FILES},
    }
    assert sorted(found) == FILES


@pytest.mark.parametrize("model", ["resnet34", "vit"])
def test_a_random_start_is_only_marked(project: Path, model: str) -> None:
    write_params(project, {f"train.{model}.pretrained": False})

    pretrained.main(model)

    assert {name: json.loads(data) for name, data in contents(model).items()} == {
        "source.json": {"pretrained": False}
    }


@pytest.mark.parametrize(
    ("disturb", "settings", "text"),
    [
        (lambda hub: hub.files.pop(f"{OF_REPO}/config.json"), {}, f"config.json of {REPO} at "),
        (
            lambda hub: hub.files.pop(f"{OF_REPO}/model.safetensors"),
            {},
            f"model.safetensors of {REPO}",
        ),
        (
            lambda hub: hub.cut.add(f"{OF_REPO}/model.safetensors"),
            {},
            f"model.safetensors of {REPO}",
        ),
        (None, {}, f"config.json of {REPO} at {REVISION} could not be downloaded: "),
        (lambda _hub: None, {"revision": "v9"}, f"config.json of {REPO} at v9 could not be dow"),
        (lambda _hub: None, {"name": "some--one/vit"}, "some--one/vit"),
    ],
    ids=["no config", "no weights", "cut", "unreachable", "revision", "name"],
)
def test_what_the_hub_does_not_give_is_one_line_and_the_next_run_gets_it(
    disturb: Callable[[Hub], object] | None,
    settings: dict[str, str],
    text: str,
    vit_hub: Hub,
    vit_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"name": REPO, "revision": REVISION}
    write_params(Path(), {f"train.vit.{key}": value for key, value in (known | settings).items()})
    whole = dict(vit_hub.files)
    with monkeypatch.context() as patch:
        if disturb is not None:
            disturb(vit_hub)
        else:
            # A port that was free a moment ago, where nobody listens.
            with Hub() as other:
                use_endpoint(patch, other.url)

        assert text in error_line(monkeypatch, "vit")

    vit_hub.files, vit_hub.cut = whole, set()
    write_params(Path(), {f"train.vit.{key}": value for key, value in known.items()})
    pretrained.main("vit")
    assert contents("vit")["model.safetensors"] == vit_files["model.safetensors"]


@pytest.mark.parametrize("cut", [False, True], ids=["refused", "cut"])
def test_the_signature_of_a_file_is_not_printed(
    vit_hub: Hub, monkeypatch: pytest.MonkeyPatch, *, cut: bool
) -> None:
    vit_hub.signed = {f"{OF_REPO}/model.safetensors"}
    vit_hub.files[ELSEWHERE] = b"whole"
    if cut:
        vit_hub.cut = {ELSEWHERE}
    else:
        vit_hub.refused = {ELSEWHERE: 410}
    logged: list[str] = []
    log = logging.Handler()
    monkeypatch.setattr(log, "emit", lambda record: logged.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [log])

    line = error_line(monkeypatch, "vit")

    assert f"model.safetensors of {REPO} at {REVISION} could not be downloaded: " in line
    assert cut or f"{vit_hub.url}/elsewhere'" in line
    assert SIGNATURE not in line + " ".join(logged)


def test_a_token_that_a_server_repeats_is_not_printed(
    vit_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit_hub.refused = {f"{OF_REPO}/config.json": 403}

    line = error_line(monkeypatch, "vit")

    assert "403 Forbidden: not for Bearer ***" in line
    assert TOKEN not in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda data: data[:-1] + b"!", "invalid hash value"), (lambda _: None, "HTTP Error 404")],
    ids=["changed", "missing"],
)
def test_torchvision_weights_that_are_not_those_are_one_line(
    change: Callable[[bytes], bytes | None],
    reason: str,
    hub: Hub,
    resnet_path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = change(hub.files.pop(resnet_path))
    hub.files |= {} if data is None else {resnet_path: data}

    line = error_line(monkeypatch, "resnet34")

    assert f"error: {hub.url}{resnet_path} could not be downloaded: {reason}" in line


@pytest.mark.parametrize(
    ("model", "settings", "text"),
    [
        ("resnet34", {"revision": "V9"}, "torchvision has no weights V9 of resnet34: check"),
        ("resnet34", {"name": "resnet340"}, "no weights IMAGENET1K_V1 of resnet340: check"),
        ("alexnet", {}, "no train.alexnet; it has resnet34, vit"),
    ],
)
def test_a_wrong_name_is_one_line(
    model: str, settings: dict[str, str], text: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(project, {f"train.{model}.{key}": value for key, value in settings.items()})

    assert text in error_line(monkeypatch, model)


def test_a_full_disk_is_not_taken_for_a_fault_of_the_hub(
    vit_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    assert vit_hub.files
    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)

    assert "no room for model.safetensors: the disk of " in error_line(monkeypatch, "vit")
