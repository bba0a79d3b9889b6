"""Models that mean harm, or are damaged: refused in one line, and nothing of them is run."""

import ast
import json
import pickle
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stages import evaluate, train
from stages.networks.classifier import build_classifier, load_classifier, save_classifier
from stages.networks.model_files import record_source
from stages.networks.release import Settings, digests_of, load_release, write_settings
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.params import load_params
from tests.made import (
    REPOSITORY,
    SIZE,
    TINY_VIT,
    bin_rows,
    model_knobs,
    one_torch_thread,
    random_classifier,
    write_params,
    write_resized,
    write_split,
)
from tools.audit.models import load_ensemble

LABELS = [1, 2, 3]
VIT = model_knobs("vit", config=TINY_VIT, pretrained=False)
MOBILENET = model_knobs("resnet34", name="mobilenet_v3_small", pretrained=False)
PRETRAINED = {
    "vit": model_knobs("vit", config={"model_type": "vit"}),
    "mobilenet": model_knobs("resnet34", name="mobilenet_v3_small"),
}
CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
# Python that leaves a trace where it is imported or unpickled.
TRAP = "import pathlib; pathlib.Path({!r}).touch()\n"
NO_JSON = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": "' + b" " * 16_000_000 + b'"}',
]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks a hub, or anybody."""

    def refuse(*_: object) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two evaluated models, and the pretrained weights of both."""
    root = tmp_path_factory.mktemp("made")
    for name, knobs in {"vit": VIT, "mobilenet": MOBILENET}.items():
        folder = root / "models" / name
        save_classifier(random_classifier(knobs, LABELS), knobs, folder)
        settings = Settings(temperature=1.5, fit="pad", quality=90, sha256=digests_of(folder))
        table = pd.DataFrame({"id": ["00001", "1"], "actual": [1, 3]})
        table[["p1", "p2", "p3"]] = [[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]
        write_settings(root / "reports" / name, settings, table)
        pretrained = root / "models/pretrained" / name
        pretrained.mkdir(parents=True)
        for file in (CONFIG, WEIGHTS):
            shutil.copy(folder / file, pretrained / file)
        record_source(pretrained, "a hub")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, the current directory."""
    copy = tmp_path / "root"
    shutil.copytree(made, copy)
    monkeypatch.chdir(copy)
    return copy


def load(name: str) -> object:
    return load_classifier(Path("models") / name)


def build(name: str) -> object:
    """On the pretrained weights, as they are, as if they had been downloaded so."""
    folder = Path("models/pretrained") / name
    record_source(folder, "a hub")
    return build_classifier(PRETRAINED[name], folder, LABELS, SIZE)


def error_of(call: Callable[..., object], *arguments: object) -> str:
    """The text of the UserError, checked to be one short line for a terminal."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 900
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def change_json(path: Path, change: Change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def setting(*keys: str, to: Any) -> Change:
    """A change of the value at these keys."""

    def change(values: dict[str, Any]) -> None:
        *blocks, last = keys
        for key in blocks:
            values = values[key]
        values[last] = to

    return change


every_use = pytest.mark.parametrize(
    ("use", "folder"), [(load, "models"), (build, "models/pretrained")], ids=["load", "build"]
)
every_model = pytest.mark.parametrize("name", ["vit", "mobilenet"])


@every_use
@every_model
def test_models_as_they_were_made_are_taken(
    root: Path, use: Callable[[str], object], folder: str, name: str
) -> None:
    assert (root / folder / name).is_dir()

    use(name)
    load_release(Path("models") / name)


@every_use
@pytest.mark.parametrize("model_type", ["vit", "evil"])
def test_code_that_a_config_names_is_not_run(
    root: Path,
    use: Callable[[str], object],
    folder: str,
    model_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, trace = root / folder / "vit", root / "trace"
    classes = "class Config: pass\nclass Network: pass\n"
    (place / "trap.py").write_text(TRAP.format(str(trace)) + classes)
    names = {"AutoConfig": "trap.Config", "AutoModelForImageClassification": "trap.Network"}
    change_json(place / CONFIG, setting("auto_map", to=names))
    change_json(place / CONFIG, setting("model_type", to=model_type))

    if model_type == "vit":
        use("vit")
    else:
        assert "evil" in error_of(use, "vit")

    assert not trace.exists()
    # While it is code that transformers can find and run.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(root / "cache")])
    change_json(place / CONFIG, setting("model_type", to="evil"))
    with suppress(Exception):
        transformers.AutoConfig.from_pretrained(place, trust_remote_code=True)
    assert trace.exists()


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@every_use
@every_model
@pytest.mark.parametrize("file", ["pytorch_model.bin", WEIGHTS])
def test_pickles_are_not_opened(
    root: Path, use: Callable[[str], object], folder: str, name: str, file: str
) -> None:
    place, trace = root / folder / name, root / "trace"
    (place / WEIGHTS).unlink()
    torch.save({"x": Trap(trace)}, place / file)
    change_json(place / CONFIG, setting("transformers_weights", to="pytorch_model.bin"))

    if file == WEIGHTS:
        assert f"{folder}/{name}/{WEIGHTS} is damaged (no safetensors: " in error_of(use, name)
    else:
        with pytest.raises(FileNotFoundError, match=f"{name}/{WEIGHTS}"):
            use(name)

    assert not trace.exists()
    pickle.loads(pickle.dumps(Trap(trace)))  # noqa: S301
    assert trace.exists()


def flip(path: Path, place: int = -1) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@every_model
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_pretrained_weights_that_were_tampered_with_are_refused_by_their_hash(
    root: Path, name: str, file: str
) -> None:
    folder = Path("models/pretrained") / name
    flip(root / folder / file)

    text = error_of(build_classifier, PRETRAINED[name], folder, LABELS, SIZE)

    assert text == (
        f"{folder}/{file} is not the file that was downloaded: its SHA-256 is not the one in"
        f" {folder}/source.json: remove it, and `dvc checkout`, `dvc pull` or `dvc repro` brings it"
        " back"
    )


@every_model
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, PREPROCESSOR])
def test_a_trained_model_that_was_tampered_with_is_refused_by_its_hash(
    root: Path, name: str, file: str
) -> None:
    flip(root / "models" / name / file)

    text = error_of(load_ensemble, [Path("models") / name])

    assert f"models/{name}/{file} is not the file that was evaluated: its SHA-256 is not" in text
    assert f"reports/{name}/inference.json: remove it, and `dvc checkout`, `dvc pull` or" in text


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, PREPROCESSOR])
def test_a_trained_model_without_a_file_is_a_missing_input(root: Path, file: str) -> None:
    (root / "models/vit" / file).unlink()

    with pytest.raises(FileNotFoundError, match=f"models/vit/{file}"):
        load_release(Path("models/vit"))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"pretrained": False}, "models/pretrained/vit has no weights, only a random start"),
        ({}, "source.json is damaged (it lacks the SHA-256 of"),
        ({"sha256": ["a"]}, "source.json is damaged (it lacks the SHA-256 of"),
        ({"sha256": {CONFIG: "0" * 64}}, "source.json is damaged (it lacks the SHA-256 of"),
        ({"sha256": {CONFIG: "0" * 64, WEIGHTS: 7}}, "source.json is damaged (it lacks the SHA"),
        ({"sha256": {CONFIG: "0" * 64, "../x": "0" * 64}}, "source.json is damaged (it lacks the"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("root")
def test_weights_without_a_hash_are_refused(source: dict[str, Any], text: str) -> None:
    folder = Path("models/pretrained/vit")
    (folder / "source.json").write_text(json.dumps(source))

    assert text in error_of(build_classifier, PRETRAINED["vit"], folder, LABELS, SIZE)


@pytest.mark.parametrize("data", NO_JSON, ids=range(len(NO_JSON)))
@pytest.mark.usefixtures("root")
def test_what_is_no_json_is_named(data: bytes) -> None:
    folder, reports = Path("models/vit"), Path("reports/vit")
    pretrained = Path("models/pretrained/vit")

    uses: list[tuple[Path, Callable[..., object], object]] = [
        (folder / CONFIG, load, "vit"),
        (folder / PREPROCESSOR, load, "vit"),
        (reports / "inference.json", load_release, folder),
        (pretrained / CONFIG, build, "vit"),
    ]
    for path, call, argument in uses:
        whole = path.read_bytes()
        path.write_bytes(data)
        assert f"{path} is damaged (" in error_of(call, argument)
        path.write_bytes(whole)
    (pretrained / "source.json").write_bytes(data)
    text = error_of(build_classifier, PRETRAINED["vit"], pretrained, LABELS, SIZE)
    assert f"{pretrained}/source.json is damaged (" in text


@pytest.mark.parametrize(
    "labels",
    [
        None,
        [],
        {},
        {"0": "1", "2": "2"},
        {"1": "1", "2": "2"},
        {"0": "one", "1": "2"},
        {"0": "1", "1": "-2"},
        {"0": "1", "1": None},
        {"0": "1", "1": ["2"]},
        {"0": "1", "1": "1"},
        {"0": "9" * 11},
        {"0": "\u0663"},
        {"0": "1\u001b[2J"},
    ],
    ids=str,
)
@every_model
@pytest.mark.usefixtures("root")
def test_labels_that_are_no_quantities_are_refused(name: str, labels: Any) -> None:
    path = Path("models") / name / CONFIG
    change_json(path, setting("id2label", to=labels))

    text = error_of(load, name)

    assert f"{path} is damaged (its id2label does not name a quantity for each output)" in text


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("vit", setting("hidden_size", to=10**9), "its config has a hidden_size of 1000000000"),
        ("vit", setting("hidden_size", to=-(10**9)), "its config has a hidden_size of -1000000000"),
        ("vit", setting("hidden_size", to=10**6), "its config asks for a network of 4,0"),
        ("vit", setting("intermediate_size", to=10**6), "asks for a network of 33,"),
        ("vit", setting("num_hidden_layers", to=10**6), "asks for more than 5,000 layers"),
        ("vit", setting("num_hidden_layers", to=2), "is missing or of another shape on one side"),
        ("vit", setting("hidden_size", to="16"), "hidden_size"),
        ("vit", setting("hidden_size", to=[16]), "hidden_size"),
        ("vit", setting("hidden_size", to=None), "hidden_size"),
        ("vit", setting("num_attention_heads", to=0), ""),
        ("vit", setting("hidden_act", to="os.system"), "os.system"),
        ("vit", setting("image_size", to=64), "vit.embeddings.position_embeddings is missing or"),
        ("vit", setting("model_type", to="no-such"), "no-such"),
        ("vit", setting("model_type", to="\u001b[2Jbert\n"), "[2Jbert"),
        ("vit", setting("model_type", to=["vit"]), ""),
        ("vit", setting("model_type", to="timm_wrapper"), "timm_wrapper's config names files"),
        ("vit", lambda values: values.pop("model_type"), "model_type"),
        ("vit", setting("library", to="torchvision"), "name"),
        ("mobilenet", setting("library", to="x"), "model_type"),
        ("mobilenet", setting("name", to="resnet18"), "Missing key(s) in state_dict"),
        ("mobilenet", setting("name", to="fcn_resnet50"), "no classifier 'fcn_resnet50'"),
        ("mobilenet", setting("name", to="../evil\u001b"), r"no classifier '../evil\x1b'"),
        ("mobilenet", setting("name", to=["resnet34"]), "no classifier ['resnet34']"),
        ("mobilenet", setting("config", to={"weights": "DEFAULT"}), "no weights to set"),
        ("mobilenet", setting("config", to={"num_classes": 10**6}), "no num_classes to set"),
        ("mobilenet", setting("config", to={"width_mult": 10**9}), "a width_mult of 1000000000"),
        ("mobilenet", setting("config", to={"width_mult": 1e4}), "asks for a network of "),
        ("mobilenet", setting("config", to=[]), ""),
        ("mobilenet", lambda values: values.pop("config"), "config"),
    ],
    ids=range(29),
)
@pytest.mark.usefixtures("root")
def test_a_config_that_makes_no_network_of_the_weights_is_refused(
    name: str, change: Change, reason: str
) -> None:
    change_json(Path("models") / name / CONFIG, change)

    text = error_of(load, name)

    start = (
        f"models/{name}/{WEIGHTS} is damaged (it, {CONFIG} and {PREPROCESSOR} do not go together: "
    )
    assert text.startswith(start)
    assert reason in text


def test_a_number_of_classes_that_the_labels_contradict_counts_for_nothing(root: Path) -> None:
    for name in ("vit", "mobilenet"):
        change_json(root / "models" / name / CONFIG, setting("num_classes", to=10**9))
        change_json(root / "models" / name / CONFIG, setting("num_labels", to=10**9))
        assert load_classifier(Path("models") / name).labels == LABELS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (setting("size", to=32), "its size is no square"),
        (setting("size", to={"height": 32, "width": 64}), "its size is no square"),
        (setting("size", to={"height": 32}), "its size is no square"),
        (setting("size", to={}), "its size is no square"),
        (setting("size", to={"height": "32", "width": "32"}), "of 8 to 4096 pixels"),
        (setting("size", to={"height": 32.0, "width": 32.0}), "of 8 to 4096 pixels"),
        (setting("size", to={"height": True, "width": True}), "of 8 to 4096 pixels"),
        (setting("size", to={"height": 0, "width": 0}), "of 8 to 4096 pixels"),
        (setting("size", to={"height": 10**9, "width": 10**9}), "of 8 to 4096 pixels"),
        (setting("image_mean", to=[0.5, 0.5]), "its image_mean is not a number for each of"),
        (setting("image_mean", to=[0.5, 0.5, 0.5, "x"]), "its image_mean is not a number"),
        (setting("image_mean", to="0.5"), "its image_mean is not a number"),
        (setting("image_mean", to=[0.5, float("nan"), 0.5]), "its image_mean is not a number"),
        (setting("image_std", to=[0.5, float("inf"), 0.5]), "its image_std is not a number"),
        (setting("image_std", to=[0.5, 10**400, 0.5]), "its image_std is not a number"),
        (setting("image_std", to=[0.5, 0.0, 0.5]), "its image_std is not above 0"),
        (setting("image_std", to=[0.5, None, 0.5]), "its image_std is not a number"),
        (lambda values: values.clear(), "its size is no square"),
    ],
    ids=range(18),
)
@pytest.mark.usefixtures("root")
def test_a_preparation_that_is_none_is_refused(change: Change, reason: str) -> None:
    path = Path("models/vit") / PREPROCESSOR
    change_json(path, change)

    text = error_of(load, "vit")

    assert text.startswith(f"{path} is damaged (")
    assert reason in text


@pytest.mark.usefixtures("root")
def test_a_preparation_for_another_network_is_refused() -> None:
    sides = {"height": 2 * SIZE, "width": 2 * SIZE}
    change_json(Path("models/vit") / PREPROCESSOR, setting("size", to=sides))

    assert f"models/vit/{WEIGHTS} is damaged (it, {CONFIG} and " in error_of(load, "vit")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (setting("temperature", to="1.5"), "temperature: "),
        (setting("temperature", to=0), "temperature: "),
        (setting("temperature", to=float("nan")), "temperature: "),
        (setting("temperature", to=1e9), "temperature: "),
        (setting("fit", to="crop"), "fit: "),
        (setting("quality", to=0), "quality: "),
        (setting("quality", to=10**9), "quality: "),
        (setting("more", to=1), "more: "),
        (setting("sha256", to=[]), "sha256: "),
        (setting("sha256", WEIGHTS, to="0" * 63), f"sha256.{WEIGHTS}: "),
        (setting("sha256", WEIGHTS, to=7), f"sha256.{WEIGHTS}: "),
        (setting("sha256", "../x", to="0" * 64), "sha256: "),
        (lambda values: values["sha256"].pop(WEIGHTS), "sha256: "),
        (lambda values: values.pop("sha256"), "sha256: Field required"),
        (lambda values: values.clear(), "temperature: Field required"),
    ],
    ids=range(15),
)
@pytest.mark.usefixtures("root")
def test_settings_that_evaluation_does_not_write_are_refused(change: Change, reason: str) -> None:
    path = Path("reports/vit/inference.json")
    change_json(path, change)

    text = error_of(load_release, Path("models/vit"))

    assert f"{path} is damaged ({reason}" in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00",
        "id,actual,p1,p2\n1,1,0.5,0.5\n",
        "actual,p1,p2,p3\n1,0.5,0.5,0\n",
        "id,p1,p2,p3\n1,0.5,0.5,0\n",
        "id,actual,p1,p2,p3\n",
        "id,actual,p1,p2,p3\n1,4,0.5,0.5,0\n",
        "id,actual,p1,p2,p3\n1,1,0.5,0.5,0\n1,1,0.5,0.5,0\n",
        "id,actual,p1,p2,p3\n1,1,0.5,0.5,x\n",
        "id,actual,p1,p2,p3\n1,1,0.5,0.5,nan\n",
        "id,actual,p1,p2,p3\n1,1,0.5,0.5,-1\n",
        "id,actual,p1,p2,p3\n1,1,0.5,0.5,1e9\n",
        'id,actual,p1,p2,p3\n1,1,0.5,0.5,"\n',
        "id,actual,p1,p2,p3\n1,1,0.5,0.5,0,7,8,9\n",
    ],
    ids=range(14),
)
@pytest.mark.usefixtures("root")
def test_a_table_of_validation_that_evaluation_does_not_write_is_refused(text: str) -> None:
    path = Path("reports/vit/validation.csv")
    path.write_text(text)

    assert f"{path} is damaged (" in error_of(load_release, Path("models/vit"))


def header(length: int, data: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + data


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "garbage": lambda _: np.random.default_rng(0).bytes(10_000),
    "cut": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "a header of 2^63 bytes": lambda data: header(2**63, data[8:]),
    "a header of 10^8 bytes": lambda data: header(10**8, data[8:]),
    "a header that is no JSON": lambda _: header(3, b"{]}"),
    "a header that is no object": lambda _: header(2, b"[]"),
    "a header that is no text": lambda _: header(4, b"\xff\xfe\xff\xfe"),
    "offsets beyond its end": lambda _: tensor_file("F32", [4], [0, 10**15]),
    "offsets the wrong way": lambda _: tensor_file("F32", [4], [16, 0]),
    "an overflow of its shape": lambda _: tensor_file("F32", [2**62, 2**62], [0, 16]),
    "another shape than its bytes": lambda _: tensor_file("F32", [5], [0, 16]),
    "a type that nobody knows": lambda _: tensor_file("X7", [4], [0, 16]),
    "a type of 4 bits": lambda _: tensor_file("F4", [32], [0, 16]),
}


def tensor_file(dtype: str, shape: list[int], offsets: list[int]) -> bytes:
    text = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return header(len(text), text + b"\0" * 16)


@every_use
@every_model
@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.usefixtures("root")
def test_a_file_of_weights_that_is_damaged_is_named(
    use: Callable[[str], object], folder: str, name: str, damage: str
) -> None:
    path = Path(folder, name, WEIGHTS)
    path.write_bytes(DAMAGED[damage](path.read_bytes()))

    text = error_of(use, name)

    assert text.startswith(f"{path} is damaged (")
    assert "remove it, and `dvc checkout`, `dvc pull` or `dvc repro` brings it back" in text


def change_weights(path: Path, change: Change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@every_model
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda values: values.update({n: v.to(torch.int8) for n, v in values.items()}), "int8"),
        (lambda values: values.update({n: v + 0j for n, v in values.items()}), "complex64"),
        (
            lambda values: values.update(
                {n: v[..., :1].clone() for n, v in values.items() if v.ndim}
            ),
            "",
        ),
        (lambda values: values.popitem(), ""),
        (lambda values: values.clear(), ""),
        (setting("evil", to=torch.zeros(3)), "evil"),
    ],
    ids=["integers", "complex", "another shape", "one less", "none", "one more"],
)
@pytest.mark.usefixtures("root")
def test_weights_of_another_network_are_refused(name: str, change: Change, reason: str) -> None:
    path = Path("models", name, WEIGHTS)
    change_weights(path, change)

    text = error_of(load, name)

    assert text.startswith(
        f"{path} is damaged (it, {CONFIG} and {PREPROCESSOR} do not go together: "
    )
    assert reason in text


@every_model
@pytest.mark.usefixtures("root")
def test_pretrained_weights_that_are_integers_are_refused(name: str) -> None:
    path = Path("models/pretrained", name, WEIGHTS)
    change_weights(path, lambda all_: all_.update({n: v.to(torch.int8) for n, v in all_.items()}))

    assert "is torch.int8, not torch.float32" in error_of(build, name)


@every_use
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.usefixtures("root")
def test_weights_that_are_not_finite_are_refused(
    use: Callable[[str], object], folder: str, number: float
) -> None:
    path = Path(folder, "vit", WEIGHTS)
    change_weights(path, lambda values: values["classifier.bias"].fill_(number))

    text = error_of(use, "vit")

    assert f"{path} is damaged (its 'classifier.bias' has numbers that are not finite)" in text


@pytest.mark.parametrize(
    ("library", "config", "key"),
    [
        ("transformers", {"auto_map": {"AutoConfig": "x--y.Z"}}, "auto_map"),
        ("transformers", {"_name_or_path": "../x"}, "_name_or_path"),
        ("transformers", {"dtype": "save"}, "dtype"),
        ("transformers", {"trust_remote_code": True}, "trust_remote_code"),
        ("transformers", {"quantization_config": {"quant_method": "x"}}, "quantization_config"),
        ("transformers", {"transformers_weights": "../x.bin"}, "transformers_weights"),
        ("transformers", {"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ("transformers", {"_attn_implementation": "someone/kernel"}, "_attn_implementation"),
        ("transformers", {"fusion_config": {}}, "fusion_config"),
        (
            "transformers",
            {"model_type": "clip", "vision_config": {"attn_implementation": "someone/kernel"}},
            "vision_config.attn_implementation",
        ),
        (
            "transformers",
            {"model_type": "clip", "vision_config": {"num_labels": 10**9}},
            "vision_config.num_labels",
        ),
        ("torchvision", {"weights": "DEFAULT"}, "weights"),
        ("torchvision", {"name": "fcn_resnet50"}, "name"),
        ("torchvision", {"num_classes": 10**9}, "num_classes"),
        ("torchvision", {"width_mult": 10**9}, "width_mult"),
    ],
    ids=str,
)
@pytest.mark.parametrize("pretrained", [False, True], ids=["random", "pretrained"])
@pytest.mark.usefixtures("root")
def test_a_key_of_params_that_reads_files_or_runs_code_is_named(
    library: str, config: dict[str, Any], key: str, *, pretrained: bool
) -> None:
    name = "vit" if library == "transformers" else "mobilenet"
    knobs = PRETRAINED[name].model_copy(
        update={"config": PRETRAINED[name].config | config, "pretrained": pretrained}
    )

    text = error_of(build_classifier, knobs, Path("models/pretrained") / name, LABELS, SIZE)

    assert text.startswith(f"{library} cannot build {knobs.name} with this model's name, config")
    assert key in text


@pytest.mark.parametrize("name", ["fcn_resnet50", "fasterrcnn_resnet50_fpn", "raft_small"])
def test_networks_whose_builders_download_weights_are_refused(name: str) -> None:
    knobs = model_knobs("resnet34", name=name, pretrained=False)

    assert f"it has no classifier '{name}'" in error_of(random_classifier, knobs)


def test_networks_of_another_library_are_refused() -> None:
    knobs = model_knobs("vit", config={"model_type": "timm_wrapper"}, pretrained=False)

    assert "timm_wrapper's config names files" in error_of(random_classifier, knobs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../x"),
        ("name", "/etc/passwd"),
        ("name", "a/../b"),
        ("name", "a/b/c"),
        ("name", "x](javascript:alert(1))"),
        ("name", "\u001b[2J"),
        ("revision", "../x"),
        ("revision", "a b"),
        ("library", "os"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_by_its_key(
    tmp_path: Path, key: str, value: str
) -> None:
    write_params(tmp_path, {f"train.vit.{key}": value})

    assert f"train.vit.{key}: " in error_of(load_params, tmp_path / "params.yaml")


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_stage_ends_with_one_line(
    root: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    write_params(root, {"train.vit.config": {"model_type": "vit"}})
    rows = bin_rows([1, 2, 3] * 3)
    write_resized(root / "data/resized", rows)
    names = ["train", "validation", "test"] * 3
    write_split(
        root / "data/split.csv", {row["id"]: name for row, name in zip(rows, names, strict=True)}
    )
    tampered = Path("models/pretrained/vit" if stage == "train" else "models/vit") / WEIGHTS
    tampered.write_bytes(tampered.read_bytes()[:-4])
    monkeypatch.setattr(sys, "argv", [stage, "vit"])

    with pytest.raises(SystemExit) as stopped:
        run_stage(stage, train.main if stage == "train" else evaluate.main, model="")

    assert str(stopped.value.code).startswith(f"{stage} vit: error: {tampered} is ")
    assert "\n" not in str(stopped.value.code)
    assert "Traceback" not in capsys.readouterr().err


@cache
def code() -> list[tuple[str, ast.Call]]:
    """All calls in the code of this project, with their places."""
    return [
        (f"{path.name}:{node.lineno}", node)
        for folder in ("stages", "tools")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """Those of what has that name."""
    return [
        (place, call)
        for place, call in code()
        if getattr(call.func, "attr", getattr(call.func, "id", "")) == name
    ]


def constant(call: ast.Call, keyword: str) -> Any:
    found = {word.arg: word.value for word in call.keywords}.get(keyword)
    return found.value if isinstance(found, ast.Constant) else None


def test_what_ruff_does_not_see_is_not_in_the_code_either() -> None:
    """Its rules S301 to S307, S102, S506 and S602 to S605 refuse pickle, eval and shells."""
    # Of torch, which unpickle without the one word, and of transformers, which run what they load.
    for name, keyword, value in [
        ("load_state_dict_from_url", "weights_only", True),
        ("get_state_dict", "weights_only", True),
        ("from_config", "trust_remote_code", False),
        ("from_pretrained", "trust_remote_code", False),
    ]:
        for place, call in calls(name):
            assert constant(call, keyword) is value, f"{place}: {name}"
    assert len(calls("get_state_dict")) == len(calls("from_config")) == 1
    for name in ("unsafe_load", "full_load", "read_pickle", "import_module", "__import__"):
        assert not calls(name), name
    for name in ("load", "Unpickler"):
        for place, call in calls(name):
            owner = getattr(call.func, "value", None)
            assert getattr(owner, "id", "") not in {"torch", "joblib", "cloudpickle", "np"}, place


def test_ruffs_rules_of_security_are_not_silenced() -> None:
    silenced = [
        f"{path.name}: {line.strip()}"
        for folder in ("stages", "tools")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for line in path.read_text("utf-8").splitlines()
        if "noqa: S" in line
    ]
    assert silenced == []
