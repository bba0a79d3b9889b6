"""Audits as an analyst runs them: their results, exit codes, resumption and memory."""

import errno
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import cross_entropy

from stages import resize
from stages.collecting.reading import Reader
from stages.collecting.records import parse_record
from stages.features.layout import layout_features
from stages.formats.shards import IMAGES, write_table
from stages.formats.tables import read_csv
from stages.imaging import jpeg
from stages.networks import inference
from stages.networks.classifier import Classifier
from stages.networks.model_files import digests
from stages.networks.release import FILES, SETTINGS, VALIDATION, load_release, save_release
from stages.runtime.params import Resize
from stages.scoring.ensemble import average, ensemble_temperature
from stages.scoring.scored import Scored
from stages.scoring.verification import threshold_for
from stages.scoring.witness import Witness, record_numbers
from stages.scoring.witness_files import load_witness, save_witness
from tests.browser import running_browser
from tests.builders import (
    SIZE,
    TINY_VIT,
    bin_rows,
    full_precision,
    make_bins,
    model_params,
    noise,
    one_torch_thread,
    random_classifier,
    square,
    write_resized,
    write_split,
)
from tests.conftest import REPOSITORY, S3, jpeg_file, objects_of, record_json
from tests.test_audit_deciding import press, reload, saved
from tools.audit import __main__ as audit
from tools.audit import run as audit_run
from tools.audit.decisions import COLUMNS as DECISION_COLUMNS
from tools.audit.items import count_reason
from tools.audit.models import Ensemble
from tools.audit.plausibility import ADVICE, EITHER, PHOTOGRAPHS, RECORDS
from tools.s3 import serving
from tools.synthetic import SyntheticBin

LABELS = [1, 2, 3, 4, 5]
COLUMNS = [f"p{label}" for label in LABELS]
QUANTITIES = LABELS * 8
KNOBS = model_params("vit", pretrained=False, config=TINY_VIT)
FORM = Resize(size=SIZE, fit="pad", quality=60, max_rejects=0.0)
WITH_COUNTS = ["photographs", "--expected", "counts.csv"]
# Puts the threshold at the second lowest score of a correct validation record.
SURE = ["--false-alarm", "0.03"]
# Runs an audit with parts of a given size, and dies just before writing the `kill`th part.
SCRIPT = """
import atexit, os, sys
from pathlib import Path
from tools.audit import __main__ as audit, scores

kill, scores.BATCH, scores.PART = map(int, sys.argv[1:4])
del sys.argv[1:4]
write_table, begun = scores.write_table, []

def write_or_die(path, table):
    begun.append(print("part", flush=True))
    if len(begun) == kill:
        os.kill(os.getpid(), 9)
    write_table(path, table)

scores.write_table = write_or_die
atexit.register(lambda: print(Path("/proc/self/status").read_text()))
audit.main()
"""
Run = Callable[..., int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models that recognize the colors of squares, and so their counts."""
    folder = tmp_path_factory.mktemp("models")
    rows = bin_rows(QUANTITIES)
    ids, actual = [row["id"] for row in rows], np.array(QUANTITIES)
    validation = pd.DataFrame({"id": ids, "group": ids, "actual": actual})
    pixels = torch.from_numpy(np.stack([jpeg.decode(row["image"]) for row in rows]))
    with one_torch_thread():
        for seed, name in enumerate(("one", "two")):
            classifier = random_classifier(KNOBS, LABELS, seed)
            images = inference.normalizer(classifier)(pixels.permute(0, 3, 1, 2) / 255)
            probabilities = fit(classifier, images, torch.from_numpy(actual - 1))
            # The model gets one bin wrong, and has no idea about another.
            probabilities[38] = np.roll(probabilities[38], 1)
            probabilities[39] = 0.2
            save_release(folder / name, classifier, KNOBS, FORM, validation, probabilities, epoch=1)
    return folder


def fit(classifier: Classifier, images: torch.Tensor, targets: torch.Tensor) -> Any:
    """Train on the images. Returns their probabilities."""
    optimizer = torch.optim.Adam(classifier.network.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(classifier.logits(images), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    classifier.network.eval()
    with torch.inference_mode():
        return classifier.logits(images).softmax(1).numpy()


@pytest.fixture
def folder(models: Path, workspace: Path) -> Iterator[Path]:
    """The current directory, which is empty except for one model."""
    shutil.copytree(models / "one", "models/one")
    with one_torch_thread():
        yield workspace


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the tool in `folder`, and returns its exit code."""
    del folder

    def run_it(*words: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["audit", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            audit.main()
        return caught.value.code

    return run_it


def write_photographs(photographs: Mapping[str, bytes]) -> None:
    Path("photographs").mkdir(exist_ok=True)
    for bin_id, data in photographs.items():
        Path("photographs", f"{bin_id}.jpg").write_bytes(data)


def write_counts(counts: Mapping[str, object]) -> None:
    lines = [f"{bin_id},{count}" for bin_id, count in counts.items()]
    Path("counts.csv").write_text("\n".join(["id,expected", *lines, ""]))


def audited() -> Any:
    return read_csv(Path("audit/audit.csv"))


def test_wrong_records_come_first_and_are_alarms(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bin_rows(QUANTITIES)
    write_photographs({row["id"]: row["image"] for row in rows})
    counts = {row["id"]: row["quantity"] for row in rows}
    wrong = {"00007": 4, "00031": 5, "00002": 3}
    write_counts(counts | wrong)

    assert run(*WITH_COUNTS, *SURE) == 1

    table = audited()
    assert list(table) == ["id", "expected", "seen", "suspicion", "alarm", *COLUMNS, "reason"]
    assert table["alarm"].tolist() == ["yes"] * 3 + ["no"] * 37
    assert table["suspicion"].is_monotonic_decreasing
    first = table[:3].set_index("id")
    assert first["expected"].to_dict() == wrong
    assert first["seen"].to_dict() == {bin_id: counts[bin_id] for bin_id in wrong}
    assert first.loc["00007", "suspicion"] == pytest.approx(1 - first.loc["00007", "p4"], abs=1e-5)
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "audit: comparing 40 photographs from photographs with 40 counts from counts.csv, using"
        " models/one on cpu",
        "audit: 40 photographs, 3 alarms (7.5%), 0 not judged; audit/index.html",
    ]


@pytest.mark.parametrize(
    ("false_alarm", "code", "alarms"),
    # 38 of the 40 bins have the same scores as in validation, except for rounding.
    [(0.03, 0, {0}), (0.25, 1, {8, 9})],
)
def test_the_chosen_share_of_correct_records_becomes_alarms(
    run: Run, models: Path, false_alarm: float, code: int, alarms: set[int]
) -> None:
    write_resized(Path("shards"), bin_rows(QUANTITIES))

    assert run("shards", "--false-alarm", false_alarm) == code

    assert (audited()["alarm"] == "yes").sum() in alarms
    threshold = threshold_for(right_scores(models / "one"), false_alarm)
    assert f"probability below {100 * threshold:.3g}%" in Path("audit/index.html").read_text()


def right_scores(folder: Path) -> Any:
    return Scored.from_table(read_csv(folder / VALIDATION)).right_scores


def test_models_are_averaged_and_agree_with_evaluation(run: Run, models: Path) -> None:
    rows = bin_rows(QUANTITIES * 3, noise)
    write_resized(Path("shards"), rows, shard_bins=50)
    bins = make_bins(Path("work"), QUANTITIES * 3, noise)
    shutil.copytree(models / "two", "models/two")

    with full_precision():
        run("shards", "--false-alarm", 0.4)
        releases = [load_release(models / name) for name in ("one", "two")]
        members = [
            Scored(
                bins.ids,
                bins.ids,
                bins.quantities,
                inference.evaluate(release.classifier, bins, 7).probabilities.astype(float),
                LABELS,
            )
            for release in releases
        ]

    validation = [Scored.from_table(release.validation) for release in releases]
    temperature = ensemble_temperature(validation)
    assert temperature != pytest.approx(1, abs=0.01)
    expected = average(members).with_temperature(temperature)
    found = audited().set_index("id").loc[expected.ids, COLUMNS].to_numpy()
    assert np.abs(found - expected.probabilities).max() < 1e-5
    assert np.abs(members[0].probabilities - members[1].probabilities).max() > 0.01
    of_ensemble = average(validation).with_temperature(temperature).right_scores
    page = Path("audit/index.html").read_text()
    assert f"probability below {100 * threshold_for(of_ensemble, 0.4):.3g}%" in page
    assert "Models (averaged): one, two." in page


def test_photographs_are_resized_as_the_pipeline_does(run: Run) -> None:
    rows: list[dict[str, Any]] = [
        {"id": f"{width:05d}", "quantity": 2, "image": jpeg_file(width, 90)}
        for width in range(60, 120, 3)
    ]
    write_photographs({row["id"]: row["image"] for row in rows})
    write_counts({row["id"]: row["quantity"] for row in rows})
    run(*WITH_COUNTS)
    of_originals = audited()
    resized = [resize.resize_bin(FORM, row) for row in rows]
    write_resized(Path("shards"), [row for row in resized if isinstance(row, dict)])

    run("shards")

    assert audited().equals(of_originals)


def test_bins_that_cannot_be_judged_come_last_with_a_reason(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = {f"0000{number}": square(number, 1) for number in (1, 2, 3, 4)}
    photographs |= {"00005": b"no picture", "00006": b"", "00007": square(2, 1)[:600]}
    write_photographs(photographs | {"a b": b""})
    write_counts({"00009": 3, "00001": 1, "00002": 9, "00003": "", "00005": 5, "00007": 2})

    assert run(*WITH_COUNTS, *SURE) == 0

    table = audited().set_index("id")
    assert table.index.tolist() == ["00001", *(f"0000{n}" for n in (2, 3, 4, 5, 6, 7, 9))]
    assert set(table["alarm"][1:]) == set(table["suspicion"][1:]) == {""}
    reasons = table["reason"].to_dict()
    assert reasons.pop("00007").startswith("unreadable photograph: undecodable: ")
    assert reasons == {
        "00001": "",
        "00002": "the models count only 1 to 5 items",
        "00003": "no expected count",
        "00004": "no expected count",
        "00005": "unreadable photograph: not an image",
        "00006": "unreadable photograph: no bytes",
        "00009": "photograph missing",
    }
    assert table["seen"][["00002", "00005"]].tolist() == ["2", ""]
    out = capsys.readouterr().out
    assert "files left out, since their names are not ids: 1, like 'a b.jpg'" in out
    assert "7 photographs, 0 alarms (0.0%), 7 not judged" in out


def test_ids_that_are_equal_as_numbers_are_two_bins(run: Run) -> None:
    write_photographs({"100": square(2, 1), "00100": square(4, 1)})
    write_counts({"00100": 4, "100": 3})

    assert run(*WITH_COUNTS, *SURE) == 1

    columns = ["id", "expected", "seen", "alarm"]
    assert audited()[columns].to_numpy().tolist() == [["100", 3, 2, "yes"], ["00100", 4, 4, "no"]]


def test_wrong_records_and_unlike_photographs_are_told_apart_if_nearly_all_are_flagged(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bin_rows(LABELS * 24)
    write_resized(Path("wrong"), [row | {"quantity": 1 + row["quantity"] % 5} for row in rows])
    write_resized(Path("unlike"), bin_rows(LABELS * 24, noise))

    assert [run("wrong"), run("unlike")] == [1, 1]

    last = [line for line in capsys.readouterr().out.splitlines() if " alarms (" in line]
    assert last[0].endswith(f". {EITHER}{RECORDS}{ADVICE}")
    assert last[1].endswith(f". {EITHER}{PHOTOGRAPHS}{ADVICE}")
    assert f"{EITHER}{PHOTOGRAPHS}{ADVICE}" in html.unescape(Path("audit/index.html").read_text())


def test_real_photographs_are_unlike_the_squares_that_a_model_learned_from(
    run: Run, abid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted((abid / "originals-1k/bin-images").glob("*.jpg"))[:200]
    records = [
        parse_record((abid / f"originals-1k/metadata/{path.stem}.json").read_bytes())
        for path in paths
    ]
    write_photographs({path.stem: path.read_bytes() for path in paths})
    write_counts(
        {path.stem: record["quantity"] for path, record in zip(paths, records, strict=True)}
    )

    assert run(*WITH_COUNTS) == 1

    assert capsys.readouterr().out.endswith(f"{PHOTOGRAPHS}{ADVICE}\n")


def test_counts_saved_by_a_spreadsheet_are_used_and_their_format_is_reported(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photographs({"00001": square(2, 1), "00002": square(4, 1)})
    Path("counts.csv").write_bytes("ID\tExpected\r\n1\t3\r\n2\t4\r\n".encode("utf-16"))

    assert run(*WITH_COUNTS, *SURE) == 1

    columns = ["id", "expected", "seen", "alarm"]
    found = audited()[columns].to_numpy().tolist()
    assert found == [["00001", 3, 2, "yes"], ["00002", 4, 4, "no"]]
    assert capsys.readouterr().out.splitlines()[0] == (
        "audit: counts.csv: read as UTF-16, tab-separated; ids whose lost leading"
        " zeros were restored: 2"
    )


def test_a_bucket_and_a_folder_of_the_same_bins_are_audited_alike(
    run: Run, s3: S3, synthetic: list[SyntheticBin]
) -> None:
    objects = objects_of(synthetic) | {"metadata/00003.json": b"[", "bin-images/00004.jpg": b"?"}
    bucket = s3.make_bucket(objects)
    write_files(Path("bucket"), objects)

    codes = [run(bucket.url, "--endpoint", bucket.endpoint)]
    of_bucket = audited()
    codes += [run("bucket"), run("bucket/bin-images", "--expected", "bucket/metadata")]

    assert len(set(codes)) == 1
    assert audited().equals(of_bucket)
    expected = of_bucket.set_index("id")["expected"].to_dict()
    assert all(expected[one.id] == str(one.quantity) for one in synthetic if one.id != "00003")
    reasons = of_bucket.set_index("id")["reason"]
    assert reasons["00003"] == "unusable record: not JSON"
    assert reasons["00004"] == "unreadable photograph: not an image"


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_keys_open_a_private_bucket_and_appear_nowhere(
    run: Run,
    tmp_path: Path,
    synthetic: list[SyntheticBin],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_files(tmp_path / "buckets/private", objects_of(synthetic[:20]))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-mine")
    with serving(tmp_path / "buckets", "--auth-key", "key-of-mine,secret-of-mine") as endpoint:
        words = ["s3://private", "--endpoint", endpoint]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
        codes = [run(*words), run(*words, "--signed")]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-mine")
        signed = run(*words, "--signed")

    assert codes == [2, 2]
    assert signed in (0, 1)
    out, errors = capfd.readouterr()
    assert "does not allow anonymous reads; add --signed" in errors
    assert "refuses access: the credentials are not valid there. Check AWS_ACCESS_KEY_ID" in errors
    for text in (out, errors, *(path.read_text() for path in Path("audit").iterdir())):
        assert "-of-mine" not in text
        assert "another-secret" not in text


def run_alone(*words: object, kill: int = 0, sizes: tuple[int, int] = (64, 256)) -> list[int]:
    """Run an audit in another process: its exit code, the parts begun, and its peak in kB."""
    command = [sys.executable, "-c", SCRIPT, *map(str, [kill, *sizes, *words])]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    peak = re.search(r"VmHWM:\s*(\d+) kB", done.stdout)
    return [done.returncode, done.stdout.splitlines().count("part"), int(peak[1]) if peak else 0]


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_a_killed_audit_continues_and_ends_with_the_same_bytes() -> None:
    photographs = {f"{number:05d}": square(1 + number % 5, number) for number in range(40)}
    write_photographs(photographs | {"00017": b"no picture"})
    write_counts({bin_id: 1 + number % 4 for number, bin_id in enumerate(photographs)})

    # Ten parts of four photographs.
    killed = run_alone(*WITH_COUNTS, kill=3, sizes=(2, 4))
    resumed = run_alone(*WITH_COUNTS, sizes=(2, 4))
    undisturbed = run_alone(*WITH_COUNTS, "--out", "undisturbed", sizes=(2, 4))

    assert killed[:2] == [-signal.SIGKILL, 3]
    assert resumed[:2] == [1, 8]
    assert undisturbed[:2] == [1, 10]
    for name in ("audit.csv", "index.html", "audit.json"):
        assert Path("audit", name).read_bytes() == Path("undisturbed", name).read_bytes()
    assert not list(Path(".cache").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_five_times_the_photographs_need_no_more_memory() -> None:
    # Large files that are decoded quickly, since a JPEG may end with any bytes. In one shard.
    image = square(3, 0) + bytes(30_000)
    found = []
    for count in (1000, 5000):
        rows = [{"id": f"{n:05d}", "quantity": 1 + n % 5, "image": image} for n in range(count)]
        write_resized(Path(f"of-{count}"), rows, shard_bins=count)
        found.append(run_alone(f"of-{count}", "--top", 20))

    few, many = found
    assert [few[0], many[0]] == [1, 1]
    assert few[2] > 0
    assert many[2] - few[2] < 60_000


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_audit_continues_with_other_counts_but_not_with_other_photographs(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored: list[int] = []
    probabilities = Ensemble.probabilities

    def count_and_score(ensemble: Ensemble, images: Any) -> Any:
        scored.append(len(images))
        return probabilities(ensemble, images)

    monkeypatch.setattr(Ensemble, "probabilities", count_and_score)
    write_photographs({"00001": square(2, 1), "00002": square(3, 1)})
    for count, changed in ((3, False), (5, False), (5, True)):
        write_counts({"00001": count})
        if changed:
            write_photographs({"00001": square(4, 1)})
        with monkeypatch.context() as patch:
            patch.setattr(audit_run, "write_csv", interrupted)
            assert run(*WITH_COUNTS) == 130
    assert scored == [2, 2]
    assert "audit: interrupted; the next run continues from here\n" in capsys.readouterr().err

    assert run(*WITH_COUNTS) == 1
    assert scored == [2, 2]
    assert audited().loc[0, ["expected", "seen"]].astype(int).tolist() == [5, 4]


def write_project(train: int) -> list[dict[str, Any]]:
    """A bucket and the outputs of a pipeline that trained on `train` bins, 00041 and up.

    The bins before are those of the validation table of `models`.
    """
    rows = bin_rows([*QUANTITIES, *(2 for _ in range(train))])
    sets = {row["id"]: "validation" if row["id"] <= "00040" else "train" for row in rows}
    write_split(Path("data/split.csv"), sets)
    write_resized(Path("data/resized"), rows)
    for row in rows:
        photograph, record = f"bin-images/{row['id']}.jpg", f"metadata/{row['id']}.json"
        objects = {photograph: row["image"], record: record_json(row["quantity"])}
        write_files(Path("bucket"), objects)
    subset = [{"id": row["id"], "size": len(row["image"])} for row in rows]
    write_table(Path("data/subset.parquet"), pa.Table.from_pylist(subset))
    return rows


def test_bins_that_the_models_were_trained_on_are_left_out_unless_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_project(train=20)
    # A wrong record in the training set.
    rows[50]["quantity"] = 5
    write_resized(Path("data/resized"), rows)
    with monkeypatch.context() as patch:
        patch.setattr(audit_run, "write_csv", interrupted)
        assert run("data/resized", "--all") == 130

    assert run("data/resized", *SURE) == 0

    assert sorted(audited()["id"]) == [row["id"] for row in rows[:40]]
    out = capsys.readouterr().out.splitlines()
    assert out[-3] == (
        "audit: bins left out, since the models were trained on them (data/split.csv): 20; --all"
        " audits them too"
    )
    assert out[-1] == (
        "audit: 40 photographs, 0 alarms (0.0%), 0 not judged, 20 left out (trained on);"
        " audit/index.html"
    )
    page = Path("audit/index.html").read_text()
    assert "20 more bins are left out, because the models were trained on them" in page
    assert "of these bins are in the training set" not in page

    assert run("data/resized", *SURE, "--all") == 1

    assert audited()["id"][0] == "00051"
    assert len(audited()) == 60
    assert "left out" not in capsys.readouterr().out
    page = Path("audit/index.html").read_text()
    assert "20 of these bins are in the training set" in page
    assert "left out" not in page


@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        ("data/resized/", 20),
        ("../{name}/data/resized", 20),
        ("link", 20),
        ("bucket", 20),
        ("bucket/bin-images --expected bucket/metadata", 20),
        # Other photographs that have the ids of this project's bins by chance.
        ("others --expected bucket/metadata", 0),
        ("others.parquet", 0),
    ],
)
def test_only_photographs_of_this_project_are_left_out(
    run: Run, arguments: str, left_out: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_project(train=20)
    Path("link").symlink_to("data/resized")
    write_files(Path("others"), {f"{row['id']}.jpg": row["image"] + b"." for row in rows})
    write_table(Path("others.parquet"), pa.Table.from_pylist(rows, IMAGES))

    run(*arguments.format(name=Path.cwd().name).split())

    page, out = Path("audit/index.html").read_text(), capsys.readouterr().out
    assert (f", {left_out} left out (trained on);" in out) == (left_out > 0)
    assert ("20 of these bins are in the training set" in page) == (left_out == 0)


@pytest.mark.parametrize("set_of_one", ["test", "train"])
def test_a_split_that_the_models_were_not_trained_with_leaves_nothing_out(
    run: Run, set_of_one: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(train=20)
    split = Path("data/split.csv")
    split.write_text(split.read_text().replace("00001,validation", f"00001,{set_of_one}"))

    run("data/resized")

    assert len(audited()) == 60
    assert "left out" not in capsys.readouterr().out
    assert "training set" not in Path("audit/index.html").read_text()


def test_an_audit_of_the_training_set_alone_names_the_option_that_allows_it(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(train=10)
    path = "data/resized/00008.parquet"

    assert run(path) == 2

    assert capsys.readouterr().err == (
        f"audit: error: the models were trained on all 5 photographs in {path} (data/split.csv),"
        " and have learned even their wrong records: audit others, or add --all\n"
    )
    assert run(path, "--all") in (0, 1)
    assert len(audited()) == 5


def test_the_page_shows_the_first_alarms_with_their_photographs(run: Run) -> None:
    write_resized(Path("shards"), bin_rows([1] * 30, lambda _, seed: square(2, seed)))

    assert run("shards", "--top", 7, *SURE) == 1

    page = Path("audit/index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 7
    assert all(f"Photograph of bin {bin_id}" in page for bin_id in audited()["id"][:7])
    assert "Showing 7 of 30; audit.csv lists them all." in page


def write_night() -> dict[str, int]:
    """Photographs and records of 40 bins, of which three are wrong. Returns the true counts."""
    rows = bin_rows(QUANTITIES)
    write_photographs({row["id"]: row["image"] for row in rows})
    counts = {row["id"]: row["quantity"] for row in rows}
    write_counts(counts | {"00007": 4, "00031": 5, "00002": 3})
    return counts


def listed_bins() -> list[dict[str, Any]]:
    """What the page knows about the bins on its list."""
    text = Path("audit/index.html").read_text("utf-8")
    found = re.search(r'<script type="application/json" id="page">(.*?)</script>', text)
    assert found
    data = json.loads(found[1])
    return [one | {"audit": data["audit"]} for one in data["bins"]]


def write_decisions(counted: Mapping[str, int | None], day: int = 1) -> Path:
    """A file as the page of the last audit saves it; None is a count that nobody could tell."""
    rows = []
    for one in listed_bins():
        if one["id"] not in counted:
            continue
        count = counted[one["id"]]
        right = count == one["expected"]
        decision = "unclear" if count is None else "right" if right else "wrong"
        time = f"2026-01-{day:02d}T08:00:00.000Z"
        rows.append(one | {"counted": count, "decision": decision, "decided_at": time})
    path = Path(f"decisions-{day}.csv")
    pd.DataFrame(rows)[[*DECISION_COLUMNS]].to_csv(path, index=False)
    return path


def test_a_decided_bin_is_not_asked_again_until_its_photograph_or_record_changes(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    true = write_night()
    assert run(*WITH_COUNTS, *SURE) == 1
    assert [one["id"] for one in listed_bins()] == audited()["id"][:3].tolist()
    decided = write_decisions(true | {"00031": None})
    capsys.readouterr()

    again = [*WITH_COUNTS, *SURE, "--decisions", decided]
    assert run(*again) == 0

    out = capsys.readouterr().out.splitlines()
    assert out[0] == "audit: of the last list, 2 of 2 checked alarms were right"
    assert out[2] == "audit: decisions that still hold: 3 of 3"
    assert out[-1] == (
        "audit: 40 photographs, 3 alarms (7.5%), 3 of them decided before, 0 not judged;"
        " audit/index.html"
    )
    page = Path("audit/index.html").read_text("utf-8")
    assert "None that was not decided before." in page
    assert page.count("<td>record is wrong</td><td>2026-01-01</td>") == 2
    assert page.count("<td>cannot tell</td><td>2026-01-01</td>") == 1

    # A new photograph of one bin, and another record of another one.
    Path("photographs/00007.jpg").write_bytes(square(true["00007"], 999))
    write_counts(true | {"00007": 4, "00031": 5, "00002": 4})
    assert run(*again) == 1
    assert {one["id"] for one in listed_bins()} == {"00007", "00002"}

    later = write_decisions({"00007": true["00007"]}, day=2)
    assert run(*again, "--decisions", later) == 1
    assert {one["id"] for one in listed_bins()} == {"00002"}
    assert Path("audit/audit.json").read_text("utf-8").count('"decided_before": 2') == 1


def test_other_bins_are_drawn_into_the_list_and_say_how_many_records_are_wrong(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    true = write_night()
    assert run(*WITH_COUNTS, *SURE, "--sample", 10) == 1
    first = listed_bins()
    assert len(first) == 13
    assert {one["part_bins"] for one in first} == {3, 37}
    with_seed = [one["id"] for one in first]
    assert run(*WITH_COUNTS, *SURE, "--sample", 10, "--seed", 1) == 1
    assert {one["id"] for one in listed_bins()} != set(with_seed)
    assert run(*WITH_COUNTS, *SURE, "--sample", 10) == 1
    assert listed_bins() == first
    decided = write_decisions(true)
    capsys.readouterr()

    assert run(*WITH_COUNTS, *SURE, "--decisions", decided) == 0

    assert capsys.readouterr().out.splitlines()[0] == (
        "audit: of the last list, 3 of 3 checked alarms were right (100%, 95% interval 100% to"
        " 100%); about 3 records are wrong in all (3 to 12); the list finds 100% of them (25% to"
        " 100%); the best balance is at --false-alarm 0.03"
    )


def test_records_without_a_photograph_are_counted(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_night()
    for name in ("00001", "00002"):
        Path(f"photographs/{name}.jpg").unlink()

    run(*WITH_COUNTS, *SURE)

    line = "38 photographs, 2 alarms (5.3%), 2 not judged (2 have no photograph); audit/index.html"
    assert line in capsys.readouterr().out


def test_a_summary_for_machines_lies_beside_the_page(run: Run) -> None:
    write_night()
    run(*WITH_COUNTS, *SURE, "--sample", 5)

    found = json.loads(Path("audit/audit.json").read_text("utf-8"))

    assert found["bins"] == {
        "photographs": 40,
        "judged": 40,
        "not_judged": 0,
        "without_photograph": 0,
        "left_out": 0,
        "alarms": 3,
        "open_alarms": 3,
        "decided_before": 0,
        "listed": 8,
        "drawn": 5,
    }
    sha256 = json.loads(Path("models/one", SETTINGS).read_text())["sha256"]
    assert found["models"] == [{"folder": "models/one", "sha256": sha256}]
    assert (found["table"], found["page"]) == ("audit.csv", "index.html")
    assert found["decided"] is None
    assert (found["false_alarm"], found["expected"]) == (0.03, "counts.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,expected\n1,2\n", "decisions.csv: the first line is 'id,expected', but should name"),
        (None, "decisions.csv': check this path"),
    ],
)
def test_decisions_that_cannot_be_read_are_named_before_anything_is_scored(
    run: Run, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_night()
    if text is not None:
        Path("decisions.csv").write_text(text)
    assert run(*WITH_COUNTS, "--decisions", "decisions.csv") == 2
    assert message in capsys.readouterr().err
    assert not Path("audit/audit.csv").exists()


@pytest.mark.slow
def test_one_night_and_the_next_in_a_browser(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    true = write_night()
    assert run(*WITH_COUNTS, *SURE, "--sample", 4) == 1
    with running_browser() as browser:
        page = browser.open(Path("audit/index.html").absolute())
        press(page, "j")
        for one in listed_bins()[:-1]:
            right = true[one["id"]] == one["expected"]
            press(page, *("r" if right else [str(true[one["id"]]), "Enter"]))
        reload(page)
        decided = saved(page, Path.cwd())
    capsys.readouterr()

    code = run(*WITH_COUNTS, *SURE, "--sample", 4, "--decisions", decided)

    last = listed_bins()
    assert code == (1 if "flagged" in {one["part"] for one in last} else 0)
    assert " checked alarms were right (100%, 95% interval " in capsys.readouterr().out
    summary = json.loads(Path("audit/audit.json").read_text("utf-8"))
    assert summary["bins"]["decided_before"] == 6
    assert summary["decided"]["checked"] >= 2


@pytest.mark.parametrize(
    ("error", "last_line"),
    [
        (
            OSError(errno.EMFILE, "Too many open files", "1.jpg"),
            "audit: error: [Errno 24] Too many",
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            "audit: error: [Errno 5] Input/output error: ch",
        ),
        (OSError(errno.ENOSPC, "No space left", "audit/x"), "audit: error: no room for audit/x"),
        # A bug keeps its traceback.
        (ZeroDivisionError("by bug"), "ZeroDivisionError: by bug"),
    ],
)
def test_an_error_of_the_machine_ends_the_audit_and_is_not_blamed_on_a_photograph(
    run: Run,
    error: Exception,
    last_line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object) -> None:
        raise error

    write_photographs({"00001": square(1, 1)})
    write_counts({"00001": 1})
    monkeypatch.setattr(Reader, "read_all", broken)

    assert run(*WITH_COUNTS) == 2

    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(last_line)
    assert not Path("audit/audit.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photographs", "--false-alarm", "1"], "error: argument --false-alarm: "),
        (["photographs", "--false-alarm", "x"], "error: argument --false-alarm: "),
        (["photographs", "--top", "-1"], "error: argument --top: "),
        (["nowhere"], "audit: error: nowhere is not a folder, an s3:// URL or a Parquet file"),
        (["counts.csv"], "audit: error: counts.csv is not a folder, an s3:// URL or a Parquet"),
        (["empty"], "audit: error: empty has no photographs: there should be bin-images/<id>.jpg"),
        (["photographs"], "audit: error: photographs has photographs but no counts: add --exp"),
        ([*WITH_COUNTS[:2], "nothing.csv"], "'nothing.csv': check this path"),
        ([*WITH_COUNTS[:2], "empty"], "audit: error: there are no records <id>.json in empty"),
        ([*WITH_COUNTS[:2], "others.csv"], "no photograph has a count in others.csv: its ids are"
         " like B1, those of the photographs like 00001; write both in the same way"),
        ([*WITH_COUNTS, "--out", "counts.csv"], "'counts.csv': check this file"),
        (WITH_COUNTS, "no bin could be judged (mostly: unreadable photograph: no bytes): see"),
    ],
)  # fmt: skip
def test_a_problem_with_the_inputs_is_reported_in_one_line(
    run: Run, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photographs({"00001": b"", "00002": b"", "00003": square(1, 1)})
    Path("others.csv").write_text("id,expected\nB1,1\nB2,2\n")
    write_counts({"00001": 1, "00002": 2, "00003": 7})
    Path("empty").mkdir()

    assert run(*words) == 2

    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line


def test_the_summary_of_an_audit_that_judged_nothing_says_so(run: Run) -> None:
    write_photographs({"00001": b""})
    write_counts({"00001": 1})
    Path("audit").mkdir()
    Path("audit/audit.json").write_text("that of the last night")

    assert run(*WITH_COUNTS) == 2

    bins = json.loads(Path("audit/audit.json").read_text("utf-8"))["bins"]
    assert (bins["photographs"], bins["judged"]) == (1, 0)


@pytest.mark.parametrize(
    ("difference", "changes"),
    [
        ("counts", {"config.json": {'"5"': '"6"'}, VALIDATION: {"p5": "p6", ",5,": ",6,"}}),
        ("counts", {"config.json": {'"5"': '"5+"'}, VALIDATION: {"p5": "p5+"}}),
        ("resizing", {SETTINGS: {"pad": "squeeze"}}),
        ("validation bins", {VALIDATION: {"00004,4": "00004,3"}}),
        ("validation bins", {VALIDATION: {"00004,": "04,"}}),
    ],
)
def test_models_that_cannot_be_averaged_are_refused(
    run: Run,
    models: Path,
    difference: str,
    changes: dict[str, dict[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_resized(Path("shards"), bin_rows(LABELS))
    two = Path("models/two")
    shutil.copytree(models / "two", two)
    for name, replaced in changes.items():
        text = (two / name).read_text()
        for before, after in replaced.items():
            assert before in text
            text = text.replace(before, after)
        (two / name).write_text(text)
    settings = json.loads((two / SETTINGS).read_text()) | {"sha256": digests(two, FILES)}
    (two / SETTINGS).write_text(json.dumps(settings))

    assert run("shards") == 2

    message = f"models/one and models/two cannot be averaged: their {difference} differ"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "rm -r models",
            "there is no model in models/: get one with `dvc pull`, or add --model FOLDER",
        ),
        ("rm models/one/validation.csv", "models/one is not a trained model: models/one/valid"),
        ("echo x > models/one/model.safetensors", "models/one/model.safetensors"),
    ],
)
def test_a_missing_or_damaged_model_is_named(
    run: Run, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_resized(Path("shards"), bin_rows(LABELS))
    subprocess.run(["sh", "-c", command], check=True)

    assert run("shards") == 2

    assert message in capsys.readouterr().err


def test_help_does_not_import_large_libraries() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "tools.audit", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert "exit codes, for a nightly job" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "pandas", "pyarrow", "obstore"}


@pytest.fixture
def bucket(folder: Path) -> Path:
    """Photographs with records of small items, but of large ones for 00007 and no item for 00009.

    models/witness expects small items in every photograph.
    """
    rows = bin_rows(QUANTITIES)
    records = {row["id"]: record_of(row["quantity"], [1.0, 2.0]) for row in rows}
    records["00007"] = record_of(2, [20.0, 40.0])
    records["00009"] = record_of(4, [])
    for row in rows:
        for name, data in (("bin-images", row["image"]), ("metadata", records[row["id"]])):
            path = Path("bucket", name, row["id"] + (".jpg" if name == "bin-images" else ".json"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    write_witness([row["id"] for row in rows], SIZE)
    return folder


def record_of(quantity: int, sides: list[float]) -> bytes:
    """A record with one item of each of these sides, in inches."""
    contents = {
        f"B{number}": {
            **{name: {"unit": "IN", "value": side} for name in ("height", "length", "width")},
            "weight": {"unit": "pounds", "value": 0.5},
            "quantity": 1,
            "name": "Tea",
        }
        for number, side in enumerate(sides)
    }
    return json.dumps({"BIN_FCSKU_DATA": contents, "EXPECTED_QUANTITY": quantity}).encode()


def write_witness(ids: list[str], size: int) -> None:
    """A witness to whom all photographs look the same."""
    usual = record_numbers(parse_record(record_of(2, [1.0, 2.0]))["items"])
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    ones, identity = np.ones(len(usual)), np.eye(len(usual))
    witness = Witness(
        usual=usual,
        lowest=usual - 20,
        highest=usual + 20,
        means=np.tile(usual, (len(LABELS), 1)),
        scale=ones,
        slopes=np.zeros((layout_features(images).shape[1], len(usual))),
        offset=0 * ones,
        precision=4 * identity,
        prior_precision=identity,
    )
    right = witness.evidence(np.zeros((1, len(usual))), np.zeros((1, len(usual))))
    form = FORM.model_copy(update={"size": size})
    save_witness(Path("models/witness"), witness, LABELS, form, ids, np.repeat(right, len(ids)))


@pytest.mark.usefixtures("bucket")
def test_a_record_with_the_right_count_and_wrong_items_is_flagged_with_its_reason(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bucket", *SURE) == 1

    table = audited().set_index("id")
    assert table.index[0] == "00007"
    first = table.iloc[0]
    assert (first["expected"], first["seen"], first["alarm"]) == (2, 2, "yes")
    assert first["items"] < 0.01
    assert table.loc["00008", "items"] > 0.9
    assert first["suspicion"] == pytest.approx(1 - first["p2"] * first["items"], abs=1e-5)
    like = "the items of the record together look too large for what is in the bin"
    assert first["reason"] == like
    assert set(table.loc[table["alarm"] == "no", "reason"]) == {""}
    assert "items of records are judged too, by models/witness" in capsys.readouterr().out
    page = Path("audit/index.html").read_text()
    assert f"Flagged, since {like}." in page
    assert "times the one that it lists the right items, is below" in page
    summary = json.loads(Path("audit/audit.json").read_text())
    assert summary["witness"] == load_witness(Path("models/witness")).settings.sha256


@pytest.mark.usefixtures("bucket")
def test_a_wrong_count_is_said_even_if_the_items_were_judged(run: Run) -> None:
    Path("bucket/metadata/00003.json").write_bytes(record_of(1, [1.0, 2.0]))
    Path("bucket/metadata/00004.json").write_bytes(record_of(9, [1.0, 2.0]))
    Path("bucket/bin-images/00005.jpg").write_bytes(b"no picture")
    Path("bucket/metadata/00006.json").unlink()

    assert run("bucket", *SURE) == 1

    reasons = audited().set_index("id")["reason"]
    assert reasons["00004"] == "the models count only 1 to 5 items"
    assert reasons["00005"] == "unreadable photograph: not an image"
    assert reasons["00006"] == "no expected count"
    assert reasons["00003"] == "the photograph looks like 3 items, the record says 1"


@pytest.mark.usefixtures("bucket")
def test_a_witness_that_learned_nothing_judges_nothing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Path("models/witness/witness.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"weight": 0.0}))

    run("bucket", *SURE)

    assert "items" not in audited().columns
    assert "could not tell swapped records of validation" in capsys.readouterr().out


def test_the_reason_of_an_alarm_blames_no_items_that_fit() -> None:
    alarm = {"label": "3", "looks_like": "3", "expected": 3}

    assert count_reason(alarm).startswith("the photograph hardly looks more like the record's 3 ")
    assert count_reason(alarm | {"looks_like": "1"}) == (
        "the photograph looks like 1 item, the record says 3"
    )


@pytest.mark.usefixtures("bucket")
def test_a_sample_does_not_tell_which_bins_have_a_reason(run: Run) -> None:
    run("bucket", *SURE, "--sample", 5)

    assert "Flagged, since" not in Path("audit/index.html").read_text()


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("option", [["--expected", "counts.csv"], ["--counts-only"]])
def test_counts_alone_are_judged_as_if_there_were_no_witness(run: Run, option: list[str]) -> None:
    write_counts({row["id"]: row["quantity"] for row in bin_rows(QUANTITIES)})
    words = ["bucket", *option, *SURE]
    run(*words)
    with_it = Path("audit/audit.csv").read_bytes()
    shutil.rmtree("models/witness")

    run(*words)

    assert Path("audit/audit.csv").read_bytes() == with_it
    assert b"00007,2,2" in with_it


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("ids", "size", "said"),
    [
        ([f"{number:05d}" for number in range(1, 40)], SIZE, "validation bins"),
        ([f"{number:05d}" for number in range(1, 41)], 64, "image sizes"),
    ],
)
def test_a_witness_of_another_run_judges_nothing(
    run: Run, ids: list[str], size: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_witness(ids, size)

    run("bucket", *SURE)

    assert f"since their {said} differ: the items of records are not" in capsys.readouterr().out
    assert list(audited()) == ["id", "expected", "seen", "suspicion", "alarm", *COLUMNS, "reason"]


@pytest.mark.usefixtures("bucket")
def test_a_damaged_witness_is_an_error(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("models/witness/witness.safetensors").write_bytes(b"")

    assert run("bucket") == 2

    assert "models/witness/witness.safetensors is damaged" in capsys.readouterr().err
