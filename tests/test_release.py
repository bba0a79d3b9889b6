"""A trained model's folder, which has everything needed to use the model."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from stages.networks.calibration import fit_temperature, with_temperature
from stages.networks.release import load_release, save_release
from stages.runtime.errors import UserError
from stages.runtime.params import Resize
from tests.builders import TINY_VIT, logits, model_params, one_torch_thread, random_classifier

LABELS = [1, 3, 10]
KNOBS = model_params(
    "vit", config=TINY_VIT, pretrained=False, precision="float32", average_mirrored=True
)
RESIZE = Resize(size=48, fit="pad", quality=85, max_rejects=0.0)
VALIDATION = pd.DataFrame(
    {
        "id": ["00100", "100", "00007", "12345"],
        "group": ["00099", "100", "00007", "12345"],
        "actual": [1, 10, 3, 3],
    }
)
PROBABILITIES = np.array(
    [[0.75, 0.125, 0.125], [0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], np.float32
)
FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def save(folder: Path) -> Path:
    classifier = random_classifier(KNOBS, LABELS)
    save_release(folder, classifier, KNOBS, RESIZE, VALIDATION, PROBABILITIES, epoch=3)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the folder in another location, as `dvc get` makes it."""
    return Path(shutil.copytree(saved, tmp_path / "somewhere"))


def test_a_folder_alone_gives_calibrated_probabilities(folder: Path) -> None:
    release = load_release(folder)

    temperature = fit_temperature(PROBABILITIES, np.array([0, 2, 1, 1]))
    assert release.settings.folded_temperature == temperature
    settings, classifier = release.settings, release.classifier
    assert (settings.pixels, settings.fit, settings.quality) == (48, "pad", 85)
    assert (classifier.size, classifier.precision) == (32, "float32")
    assert classifier.average_mirrored
    uncalibrated = logits(random_classifier(KNOBS, LABELS))
    torch.testing.assert_close(logits(release.classifier), uncalibrated / temperature)
    expected = with_temperature(PROBABILITIES, temperature)
    table = release.validation
    assert list(table.columns) == ["id", "group", "actual", "predicted", "p1", "p3", "p10"]
    pd.testing.assert_frame_equal(table[VALIDATION.columns], VALIDATION)
    assert table["predicted"].tolist() == [1, 10, 1, 3]
    np.testing.assert_allclose(table[["p1", "p3", "p10"]], expected, rtol=1e-5)


def test_the_same_model_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = save(tmp_path / "again")

    files = {path.name: path.read_bytes() for path in again.iterdir()}
    assert files == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert files.keys() == {*FILES, "inference.json", "validation.csv"}


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_was_changed_is_named(file: str, folder: Path) -> None:
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(data)

    with pytest.raises(UserError) as error:
        load_release(folder)

    assert str(error.value) == (
        f"{folder / file} is damaged (its SHA-256 is not the one in {folder}/inference.json):"
        " remove it, and get it back with `dvc checkout`, `dvc pull` or `dvc repro`"
    )


@pytest.mark.parametrize("file", [*FILES, "inference.json", "validation.csv"])
def test_a_file_that_is_missing_is_named(file: str, folder: Path) -> None:
    (folder / file).unlink()

    with pytest.raises(FileNotFoundError, match=str(folder / file)):
        load_release(folder)


def without(path: Path, key: str) -> None:
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("inference.json", lambda path: path.write_text("{"), "not JSON"),
        ("inference.json", lambda path: without(path, "epoch"), "epoch: Field required"),
        ("validation.csv", lambda path: path.write_text("id,actual\n1,1\n"), "it has no column g"),
    ],
)
def test_what_is_damaged_beside_the_network_is_named(
    file: str, damage: Callable[[Path], object], reason: str, folder: Path
) -> None:
    damage(folder / file)

    with pytest.raises(UserError, match=rf"{folder / file} is damaged \({reason}.*`dvc pull`"):
        load_release(folder)
