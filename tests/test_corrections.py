"""A model learns from corrected counts: the stages split and train, as DVC runs them."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from stages import split, train
from stages.formats.shards import write_rejects, write_table
from stages.imaging.loader import load_bins
from stages.networks import inference
from stages.networks.release import load_release
from stages.scoring.bins import corrected_ids, read_bins
from tests.builders import (
    SIZE,
    TINY_VIT,
    bin_rows,
    one_torch_thread,
    write_params,
    write_resized,
    write_split,
)

KNOBS = {
    "resize.size": SIZE,
    "split.by": "file",
    "split.file": "mine.csv",
    "train.vit.pretrained": False,
    "train.vit.config": TINY_VIT,
    "train.vit.learning_rate": 2e-3,
    "train.vit.warmup_steps": 5,
    "train.vit.epochs": 5,
    "train.vit.batch_size": 16,
}
TRUE = [1, 2, 3, 4, 5] * 60
SETS = ["train"] * 200 + ["validation"] * 40 + ["test"] * 60


def write_spoiled_project() -> None:
    """Bins of which a fifth of those to learn from have a wrong record, and what people counted."""
    chance = random.Random(0)
    rows = bin_rows(TRUE)
    decisions = []
    for row in chance.sample(rows[:240], 48):
        true = row["quantity"]
        row["quantity"] = chance.choice([count for count in range(1, 6) if count != true])
        decisions.append((row["id"], row["quantity"], true, "wrong"))
    write_resized(Path("data/resized"), rows, shard_bins=100)
    subset = [{"id": row["id"], "quantity": row["quantity"], "group": row["id"]} for row in rows]
    write_table(Path("data/subset.parquet"), pa.Table.from_pylist(subset))
    write_rejects(Path("data/quarantine.csv"), [])
    write_split(
        Path("lists/mine.csv"), {row["id"]: name for row, name in zip(rows, SETS, strict=True)}
    )
    columns = ["id", "expected", "counted", "decision"]
    pd.DataFrame(decisions, columns=columns).to_csv("lists/decisions.csv", index=False)
    source = Path("models/pretrained/vit/source.json")
    source.parent.mkdir(parents=True)
    source.write_text('{"pretrained": false}\n', "utf-8")


def probability_of_true_counts(corrections: str | None) -> float:
    """Train on these corrections; the mean probability of the true counts of the test bins."""
    write_params(Path.cwd(), KNOBS | {"split.corrections": corrections})
    split.main()
    train.main("vit")
    release = load_release(Path("models/vit"))
    (test,) = load_bins(Path("data/resized"), Path("data/split.csv"), "test", size=SIZE)
    scores = inference.evaluate(release.classifier, test, 64).probabilities
    columns = test.quantities - 1
    assert columns.tolist() == [count - 1 for count in TRUE[240:]]
    return float(np.mean(scores[np.arange(len(test)), columns]))


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
def test_a_model_gets_better_with_the_corrections_of_its_spoiled_records() -> None:
    write_spoiled_project()
    with one_torch_thread():
        spoiled = probability_of_true_counts(None)
        corrected = probability_of_true_counts("decisions.csv")
    assert corrected > spoiled + 0.2


@pytest.mark.usefixtures("workspace")
def test_corrections_leave_each_bin_in_its_set() -> None:
    write_spoiled_project()
    sizes = {"split.train": 200, "split.validation": 40, "split.test": 60}
    by_seed = KNOBS | sizes | {"split.by": "group", "split.file": None}
    drawn = []
    for corrections in (None, "decisions.csv"):
        write_params(Path.cwd(), by_seed | {"split.corrections": corrections})
        split.main()
        drawn.append(pd.read_csv("data/split.csv", dtype=str)[["id", "set"]].values.tolist())
    assert drawn[0] == drawn[1]


@pytest.mark.usefixtures("workspace")
def test_evaluation_and_report_know_the_corrected_counts() -> None:
    write_spoiled_project()
    write_params(Path.cwd(), KNOBS | {"split.corrections": "decisions.csv"})
    split.main()
    bins = read_bins()
    assert bins["quantity"].tolist() == TRUE
    assert len(corrected_ids(bins)) == 48
