"""Audits as an analyst runs them: what they find, how they end, killed, and in how much memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from stages import resize
from stages.formats.tables import read_csv
from stages.imaging import jpeg
from stages.imaging.loader import Bins
from stages.networks import inference
from stages.networks.calibration import with_temperature
from stages.networks.classifier import Classifier, save_classifier
from stages.networks.release import SETTINGS, VALIDATION, Settings, digests_of, write_settings
from stages.runtime.errors import UserError
from stages.runtime.machine import usable_cores
from stages.runtime.params import Resize
from stages.scoring.verification import threshold_for
from tests.conftest import REPOSITORY, S3, jpeg_file, objects_of
from tests.made import (
    SIZE,
    TINY_VIT,
    bin_rows,
    full_precision,
    make_bins,
    model_knobs,
    noise,
    one_torch_thread,
    random_classifier,
    square,
    write_resized,
)
from tools.audit import __main__ as audit
from tools.audit import run as audit_run
from tools.audit import scores as audit_scores
from tools.audit.models import Ensemble, Prepared, load_ensemble
from tools.audit.objects import Content
from tools.audit.photographs import ShardPhotographs, open_photographs
from tools.drawing import DrawnBin
from tools.s3 import serving

LABELS = [1, 2, 3, 4, 5]
COLUMNS = [f"p{label}" for label in LABELS]
QUANTITIES = LABELS * 8
KNOBS = model_knobs("vit", pretrained=False, config=TINY_VIT)
FORM = Resize(size=SIZE, fit="pad", quality=60, max_rejects=0.0)
TEMPERATURE = 1.3
# Runs audits as its input's lines ask, each in a process of its own, forked since torch takes
# seconds to import. Answers each with the exit code, how many parts were begun, and the peak memory
# in MB. One is killed when it begins its part number `kill`.
PROCESSES = """
import json, os, sys
from transformers import ViTForImageClassification
from tools.audit import __main__ as audit, scores as audit_scores

def run(folder, words, kill, sizes, writing):
    begun = []
    write_table = audit_scores.write_table
    def write_or_die(path, table):
        begun.append(os.write(writing, b"."))
        if len(begun) == kill:
            os.kill(os.getpid(), 9)
        write_table(path, table)
    os.chdir(folder)
    os.dup2(2, 1)
    sys.argv = ["audit", *words]
    audit_scores.BATCH, audit_scores.PART_BATCHES = sizes
    audit_scores.write_table = write_or_die
    try:
        audit.main()
    except SystemExit as end:
        os._exit(end.code)

for line in sys.stdin:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        run(*json.loads(line), writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        parts = len(file.read())
    _, status, usage = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), parts, usage.ru_maxrss / 1024]))
    sys.stdout.flush()
"""
Process = Callable[..., list[float]]
Run = Callable[..., int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two models that tell the colours of squares, so their counts."""
    root = tmp_path_factory.mktemp("models")
    bins = make_bins(root / "work", QUANTITIES)
    with one_torch_thread():
        for seed, name in enumerate(("one", "two")):
            classifier = trained(bins, seed)
            save_classifier(classifier, KNOBS, root / "models" / name)
            scores = inference.evaluate(classifier, bins, 64)
            table = pd.DataFrame({"id": bins.ids, "actual": bins.quantities})
            table[COLUMNS] = with_temperature(scores.probabilities, TEMPERATURE)
            # One that the model does not know what to make of, whose score is the lowest.
            table.loc[39, COLUMNS] = 0.2
            settings = Settings(
                temperature=TEMPERATURE,
                fit=FORM.fit,
                quality=FORM.quality,
                sha256=digests_of(root / "models" / name),
            )
            write_settings(root / "reports" / name, settings, table)
    return root


def trained(bins: Bins, seed: int) -> Classifier:
    classifier = random_classifier(KNOBS, LABELS, seed)
    pixels = np.stack([jpeg.decode(bins.images[row]) for row in range(len(bins))])
    images = inference.normalizer(classifier)(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    targets = torch.from_numpy(bins.quantities - 1)
    optimizer = torch.optim.Adam(classifier.network.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(classifier.logits(images), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return classifier


@pytest.fixture
def run(models: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the tool in an empty folder, by the model one where no other is given; its exit code."""
    del workspace

    def run_it(*words: object) -> Any:
        chosen = [] if "--model" in words else ["--model", models / "models/one"]
        monkeypatch.setattr(sys, "argv", ["audit", *map(str, [*words, *chosen])])
        with pytest.raises(SystemExit) as caught:
            audit.main()
        return caught.value.code

    return run_it


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator["subprocess.Popen[str]"]:
    """PROCESSES, which starts while other tests run."""
    command = [sys.executable, "-c", PROCESSES]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


@pytest.fixture
def run_in_process(server: "subprocess.Popen[str]", workspace: Path) -> Process:
    """Run the tool in a process of its own: its exit code, parts begun, and memory in MB."""

    def run_it(*words: object, kill: int = 0, sizes: tuple[int, int] = (64, 4)) -> list[float]:
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps([str(workspace), list(map(str, words)), kill, sizes]), file=server.stdin)
        server.stdin.flush()
        found: list[float] = json.loads(server.stdout.readline())
        return found

    return run_it


def write_photographs(photographs: Mapping[str, bytes], folder: Path = Path("photographs")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for bin_id, data in photographs.items():
        (folder / f"{bin_id}.jpg").write_bytes(data)


def write_counts(counts: Mapping[str, object]) -> None:
    lines = [f"{bin_id},{count}" for bin_id, count in counts.items()]
    Path("counts.csv").write_text("\n".join(["id,expected", *lines, ""]))


def audited() -> pd.DataFrame:
    return read_csv(Path("audit/audit.csv"))


def test_wrong_records_come_first_and_are_alarms(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bin_rows(QUANTITIES)
    write_photographs({row["id"]: row["image"] for row in rows})
    counts = {row["id"]: row["quantity"] for row in rows}
    write_counts(counts | {"00007": 4, "00031": 5, "00002": 3})

    code = run("photographs", "--expected", "counts.csv", "--false-alarm", "0")

    table = audited()
    assert code == 1
    assert list(table) == ["id", "expected", "seen", "suspicion", "alarm", *COLUMNS, "reason"]
    assert set(table["id"][:3]) == {"00007", "00031", "00002"}
    assert table["alarm"].tolist() == ["yes"] * 3 + ["no"] * 37
    wrong: Any = table[:3].set_index("id")
    assert wrong["seen"].to_dict() == {"00007": 2, "00031": 1, "00002": 2}
    assert wrong["expected"].to_dict() == {"00007": 4, "00031": 5, "00002": 3}
    assert wrong.loc["00007", "suspicion"] == pytest.approx(1 - wrong.loc["00007", "p4"], abs=1e-5)
    assert table["suspicion"].is_monotonic_decreasing
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("audit: 40 photographs of photographs, 40 counts of counts.csv, ")
    assert out[-1] == ("audit: 40 photographs, 3 alarms (7.5%), 0 not judged; audit/index.html")


def test_right_records_end_with_another_code(run: Run) -> None:
    rows = bin_rows(QUANTITIES)
    write_resized(Path("data/resized"), rows)

    assert run("data/resized", "--false-alarm", "0") == 0

    assert set(audited()["alarm"]) == {"no"}


def test_the_threshold_lets_that_share_of_right_records_be_alarms(run: Run, models: Path) -> None:
    write_resized(Path("data/resized"), bin_rows(QUANTITIES))

    # The validation bins themselves, but for the rounding of their probabilities.
    assert run("data/resized", "--false-alarm", "0.25") == 1

    assert (audited()["alarm"] == "yes").sum() in (9, 10)
    validation = read_csv(models / "reports/one" / VALIDATION)
    scores = validation[COLUMNS].to_numpy()[np.arange(40), validation["actual"] - 1]
    page = Path("audit/index.html").read_text()
    assert f"below {100 * threshold_for(scores, 0.25):.3g}% by its photograph" in page


def test_the_threshold_of_two_models_is_that_of_their_mean(models: Path) -> None:
    folders = [models / "models" / name for name in ("one", "two")]
    tables = [read_csv(models / "reports" / name / VALIDATION) for name in ("one", "two")]
    rights = [table[COLUMNS].to_numpy()[np.arange(40), table["actual"] - 1] for table in tables]

    found = load_ensemble(folders).threshold(0.4)

    assert found == pytest.approx(threshold_for(np.mean(rights, axis=0), 0.4))
    assert all(found != pytest.approx(threshold_for(right, 0.4)) for right in rights)


def test_resized_photographs_have_the_probabilities_that_evaluation_gives(
    run: Run, models: Path
) -> None:
    rows = bin_rows(QUANTITIES * 3, noise)
    write_resized(Path("data/resized"), rows, shard_bins=50)
    bins = make_bins(Path("work"), QUANTITIES * 3, noise)

    with full_precision():
        run("data/resized", "--model", models / "models/one", "--model", models / "models/two")
        expected = np.mean(
            [evaluated(models / "models" / name, bins) for name in ("one", "two")], 0
        )

    found = audited().set_index("id").loc[bins.ids, COLUMNS].to_numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(expected - evaluated(models / "models/one", bins)).max() > 0.01


def evaluated(model: Path, bins: Bins) -> Any:
    classifier = load_ensemble([model]).releases[0].classifier
    return with_temperature(inference.evaluate(classifier, bins, 7).probabilities, TEMPERATURE)


def test_photographs_are_resized_as_the_pipeline_does(run: Run) -> None:
    rows: list[dict[str, Any]] = [
        {"id": f"{width:05d}", "quantity": 2, "image": jpeg_file(width, 90)}
        for width in range(60, 120)
    ]
    write_photographs({row["id"]: row["image"] for row in rows})
    write_counts({row["id"]: row["quantity"] for row in rows})
    run("photographs", "--expected", "counts.csv")
    of_originals = audited()
    resized = [resize.resize_bin(FORM, row) for row in rows]
    write_resized(Path("data/resized"), [row for row in resized if isinstance(row, dict)])

    run("data/resized")

    pd.testing.assert_frame_equal(audited(), of_originals)


def test_without_a_model_all_that_were_evaluated_are_averaged(
    run: Run, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_resized(Path("data/resized"), bin_rows(QUANTITIES))
    shards = Path("data/resized").absolute()
    run(shards, "--model", models / "models/one", "--model", models / "models/two")
    of_both = audited()
    out = Path("all").absolute()
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "argv", ["audit", str(shards), "--out", str(out)])

    with pytest.raises(SystemExit):
        audit.main()

    pd.testing.assert_frame_equal(read_csv(out / "audit.csv"), of_both)


def test_what_cannot_be_judged_comes_last_with_its_reason(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = {f"0000{number}": square(number, 1) for number in (1, 2, 3, 4)}
    photographs |= {"00005": b"no picture", "00006": b"", "00007": square(2, 1)[:600]}
    write_photographs(photographs)
    write_counts({"00009": 3, "00001": 1, "00002": 9, "00003": "", "00005": 5, "00007": 2})

    assert run("photographs", "--expected", "counts.csv", "--false-alarm", "0") == 0

    table = audited().set_index("id")
    assert table.index.tolist() == ["00001", *(f"0000{n}" for n in (2, 3, 4, 5, 6, 7, 9))]
    assert set(table["alarm"][1:]) == {""}
    assert set(table["suspicion"][1:]) == {""}
    reasons = table["reason"].to_dict()
    assert reasons.pop("00007").startswith("unreadable photograph: undecodable: ")
    assert reasons == {
        "00001": "",
        "00002": "the model counts 1 to 5 only",
        "00003": "no expected count",
        "00004": "no expected count",
        "00005": "unreadable photograph: not an image",
        "00006": "unreadable photograph: no bytes",
        "00009": "photograph missing",
    }
    assert table.loc["00002", "seen"] == "2"
    assert table.loc["00005", "seen"] == ""
    assert "7 photographs, 0 alarms (0.0%), 7 not judged" in capsys.readouterr().out


def test_ids_that_are_equal_as_numbers_are_two_bins(run: Run) -> None:
    write_photographs({"100": square(2, 1), "00100": square(4, 1)})
    write_counts({"00100": 4, "100": 3})

    assert run("photographs", "--expected", "counts.csv", "--false-alarm", "0") == 1

    assert audited()[["id", "expected", "seen", "alarm"]].to_numpy().tolist() == [
        ["100", 3, 2, "yes"],
        ["00100", 4, 4, "no"],
    ]


def test_a_bucket_and_a_folder_of_the_same_bins_are_audited_alike(
    run: Run, s3: S3, drawn: list[DrawnBin]
) -> None:
    objects = objects_of(drawn) | {"metadata/00003.json": b"[", "bin-images/00004.jpg": b"?"}
    bucket = s3.make_bucket(objects)
    for key, data in objects.items():
        path = Path("bucket", key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    codes = [run(bucket.url, "--endpoint", bucket.endpoint)]
    of_bucket = audited()
    codes += [run("bucket"), run("bucket/bin-images", "--expected", "bucket/metadata")]

    assert len(set(codes)) == 1
    pd.testing.assert_frame_equal(audited(), of_bucket)
    expected = of_bucket.set_index("id")["expected"].to_dict()
    assert all(expected[one.id] == str(one.quantity) for one in drawn if one.id != "00003")
    reasons = of_bucket.set_index("id")["reason"]
    assert reasons["00003"] == "unusable record: not JSON"
    assert reasons["00004"] == "unreadable photograph: not an image"


def test_keys_open_a_private_bucket_and_are_nowhere_to_be_read(
    run: Run,
    tmp_path: Path,
    drawn: list[DrawnBin],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for key, data in objects_of(drawn[:20]).items():
        path = tmp_path / "buckets/private" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
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
    assert "refuses access: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in errors
    for text in (out, errors, *(path.read_text() for path in Path("audit").iterdir())):
        assert "-of-mine" not in text
        assert "another-secret" not in text


def test_a_killed_audit_goes_on_and_ends_with_the_same_bytes(
    run_in_process: Process, models: Path
) -> None:
    photographs = {f"{number:05d}": square(1 + number % 5, number) for number in range(40)}
    write_photographs(photographs | {"00017": b"no picture"})
    write_counts({bin_id: 1 + place % 4 for place, bin_id in enumerate(photographs)})
    words = ["photographs", "--expected", "counts.csv", "--model", models / "models/one"]

    # Ten parts of four photographs.
    killed = run_in_process(*words, kill=3, sizes=(2, 2))
    resumed = run_in_process(*words, sizes=(2, 2))
    undisturbed = run_in_process(*words, "--out", "undisturbed", sizes=(2, 2))

    assert killed[:2] == [-signal.SIGKILL, 3]
    assert resumed[:2] == [1, 8]
    assert undisturbed[:2] == [1, 10]
    for name in ("audit.csv", "index.html"):
        assert Path("audit", name).read_bytes() == Path("undisturbed", name).read_bytes()
    assert not list(Path(".cache").iterdir())


def test_five_times_the_photographs_take_no_more_memory(
    run_in_process: Process, models: Path
) -> None:
    # Large as files, which may have anything at their end, and small to decode. Of one shard.
    image = square(3, 0) + bytes(30_000)
    found = []
    for count in (1000, 5000):
        rows = [{"id": f"{n:05d}", "quantity": 1 + n % 5, "image": image} for n in range(count)]
        write_resized(Path(f"of-{count}"), rows, shard_bins=count)
        words = [f"of-{count}", "--model", models / "models/one", "--top", 20]
        found.append(run_in_process(*words))

    few, many = found
    assert [few[0], many[0]] == [1, 1]
    assert many[2] - few[2] < 60


@pytest.mark.usefixtures("workspace")
def test_few_batches_are_in_memory_at_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photographs({f"{number:05d}": square(1, number) for number in range(100)})
    photographs = open_photographs("photographs", None, "us-east-1", signed=False)
    ensemble = load_ensemble([models / "models/one"])
    monkeypatch.setattr(audit_scores, "BATCH", 2)
    images: list[weakref.ref[Any]] = []
    alive: list[int] = []
    prepare, score = Ensemble.prepare, audit_scores.score_batch

    def prepare_and_note(ensemble: Ensemble, contents: Sequence[Content]) -> Prepared:
        batch = prepare(ensemble, contents)
        images.append(weakref.ref(batch.images))
        return batch

    def score_and_note(ensemble: Ensemble, batch: Prepared) -> Any:
        alive.append(sum(image() is not None for image in images))
        return score(ensemble, batch)

    monkeypatch.setattr(Ensemble, "prepare", prepare_and_note)
    monkeypatch.setattr(audit_scores, "score_batch", score_and_note)
    audit_scores.score_photographs(photographs, ensemble, Path())

    assert len(alive) == 50
    assert max(alive) <= 2 * usable_cores() + 2


def test_only_the_photographs_on_the_page_are_read_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_resized(Path("data/resized"), bin_rows([1] * 30, lambda _, seed: square(2, seed)))
    picked: list[list[str]] = []
    pick = ShardPhotographs.pick

    def pick_and_note(photographs: ShardPhotographs, ids: Sequence[str]) -> Any:
        picked.append(list(ids))
        return pick(photographs, ids)

    monkeypatch.setattr(ShardPhotographs, "pick", pick_and_note)

    assert run("data/resized", "--top", "7") == 1

    assert picked == [audited()["id"][:7].tolist()]
    page = Path("audit/index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 7
    assert "The first 7 of 30; all are in audit.csv." in page


def test_another_run_with_other_counts_takes_the_same_scores(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photographs({f"{number:05d}": square(1 + number % 5, number) for number in range(9)})
    write_counts({"00001": 2})
    with monkeypatch.context() as patch:
        patch.setattr(audit_run, "write_csv", interrupted)
        assert run("photographs", "--expected", "counts.csv") == 130
    write_counts({"00001": 5})
    monkeypatch.setattr(Ensemble, "prepare", interrupted)

    assert run("photographs", "--expected", "counts.csv") == 1
    assert audited()["expected"][0] == "5"


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_photograph_that_changed_is_read_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photographs({"00001": square(2, 1)})
    write_counts({"00001": 3})
    with monkeypatch.context() as patch:
        patch.setattr(audit_run, "write_csv", interrupted)
        run("photographs", "--expected", "counts.csv")
    write_photographs({"00001": square(3, 1)})

    run("photographs", "--expected", "counts.csv")

    assert audited()["seen"].tolist() == [3]


def test_ctrl_c_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit_run, "audit", interrupted)

    assert run("photographs") == 130

    assert capsys.readouterr().err == "audit: interrupted; the next run goes on from here\n"


def test_a_bug_does_not_end_with_the_code_of_alarms(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(audit_run, "audit", broken)

    assert run("photographs") == 2

    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--false-alarm", "1"], ["--false-alarm", "x"], ["--top", "-1"]])
def test_a_wrong_option_is_refused_by_name(
    run: Run, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("photographs", *words) == 2
    assert f"error: argument {words[0]}: " in capsys.readouterr().err


def test_counts_of_other_bins_stop_an_audit_before_it_begins(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photographs({"00001": square(1, 1), "00002": square(2, 1)})
    write_counts({"1": 1, "2": 2})

    assert run("photographs", "--expected", "counts.csv") == 2

    assert capsys.readouterr().err == (
        "audit: error: counts.csv has none of the photographs' bins: its ids are like 1, theirs"
        " like 00001\n"
    )


def test_an_audit_that_judged_nothing_is_an_error_and_leaves_its_table(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photographs({"00001": b"", "00002": b"", "00003": square(1, 1)})
    write_counts({"00001": 1, "00002": 2, "00003": 7})

    assert run("photographs", "--expected", "counts.csv") == 2

    assert (
        "no bin could be judged (unreadable photograph: no bytes, mostly): see audit/audit.csv"
        in (capsys.readouterr().err)
    )
    assert len(audited()) == 3


def test_missing_files_are_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write_photographs({"00001": square(1, 1)})
    write_counts({"00001": 1})
    Path("a-file").touch()
    counts = ["--expected", "counts.csv"]

    codes = [
        run("nowhere", *counts),
        run("photographs"),
        run("photographs", "--expected", "nothing.csv"),
        run("photographs", *counts, "--model", "models/none"),
        run("photographs", *counts, "--out", "a-file"),
    ]

    assert codes == [2] * 5
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "audit: error: nowhere is no folder, no s3:// URL and no file of Parquet"
    assert "no counts come with the photographs in photographs: give --expected" in errors[1]
    assert "'nothing.csv': check this file" in errors[2]
    assert errors[3].startswith("audit: error: models/none is no model that was evaluated")
    assert "'a-file': check this file" in errors[4]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "counts",
            {
                "models/two/config.json": {'"5"': '"6"'},
                "reports/two/validation.csv": {"p5": "p6", ",5,": ",6,"},
            },
        ),
        ("resizing", {"reports/two/inference.json": {"pad": "squeeze"}}),
        ("validation bins", {"reports/two/validation.csv": {"00004,4": "00004,3"}}),
        ("validation bins", {"reports/two/validation.csv": {"00004,": "04,"}}),
    ],
)
def test_models_that_do_not_go_together_are_refused(
    models: Path, tmp_path: Path, name: str, changes: dict[str, dict[str, str]]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(models, root)
    for path, replaced in changes.items():
        text = (root / path).read_text()
        for before, after in replaced.items():
            assert before in text
            text = text.replace(before, after)
        (root / path).write_text(text)
    evaluate_again(root, "two")

    with pytest.raises(UserError, match=f"cannot be averaged: their {name} differ"):
        load_ensemble([root / "models/one", root / "models/two"])


def evaluate_again(root: Path, model: str) -> None:
    """As if the model, as it is now, were the one that was evaluated."""
    path = root / "reports" / model / SETTINGS
    settings = json.loads(path.read_text()) | {"sha256": digests_of(root / "models" / model)}
    path.write_text(json.dumps(settings))


def test_a_damaged_model_is_named(models: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(models, root)
    (root / "models/one/model.safetensors").write_bytes(b"damaged")

    with pytest.raises(
        UserError, match=r"models/one/model.safetensors is not the file that was ev"
    ):
        load_ensemble([root / "models/one"])
