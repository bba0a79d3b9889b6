"""The model card: its front matter for the hub, and the numbers in its text."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard

from stages.runtime.params import Params
from stages.scoring.card import LISTED, model_card
from tests.conftest import changed_params

INTERVALS = pd.DataFrame(
    [
        ("accuracy", 0.53126, 0.52468, 0.53791),
        ("rmse", 0.98765, 0.97, 1.01),
        ("mae", 0.61234, 0.6, 0.62),
        ("auroc", 0.84321, 0.83, 0.85),
    ],
    columns=["metric", "value", "low", "high"],
)
RATES = ["false_alarms", "found", "found_off_by_one", "found_off_by_more"]
ALARMS = pd.DataFrame(
    [("chosen", 0.0512, 0.4321, 0.3141, 0.5926), ("1%", 0.01, 0.0, 0.0, 0.0)],
    columns=["alarms", *RATES],
)
BY_COUNT = pd.DataFrame({"quantity": [1, 2], "threshold": [0.07654, 0.07654]})
PRECISION = pd.DataFrame(
    [(0.001, 0.008, 0.007, 0.009), (0.01, 0.078, 0.07, 0.09), (0.05, 0.308, 0.29, 0.33)],
    columns=["wrong_records", "precision", "low", "high"],
)
PRECISION["bins_per_find"] = 1 / PRECISION["precision"]
OVERLAP = pd.DataFrame(
    [
        ("siblings", "with", 1234, 0.612, 0.6, 0.624),
        ("siblings", "without", 20_766, 0.521, 0.51, 0.532),
        ("products", "without", 4321, 0.502, 0.49, 0.514),
        ("products", "difference", 22_000, 0.111, 0.1, 0.12),
    ],
    columns=["shared", "half", "test_bins", "accuracy", "low", "high"],
)
CALIBRATION = pd.DataFrame(
    [("before", 1.0, 1.2, 0.1), ("after", 1.23456, 1.1, 0.01)],
    columns=["calibrated", "temperature", "nll", "calibration_error"],
)
TABLES = {
    "intervals": INTERVALS,
    "alarms": ALARMS,
    "alarms_by_count": BY_COUNT,
    "precision": PRECISION,
    "overlap": OVERLAP,
    "calibration": CALIBRATION,
}
SETS = pd.DataFrame({"set": np.repeat(["train", "validation", "test"], [188_100, 9900, 22_000])})
REVISION = changed_params({})["train"]["vit"]["revision"]


def card_of(
    model: str = "vit",
    changes: Mapping[str, Any] | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
    *,
    sets: pd.DataFrame = SETS,
    for_pipeline: bool = True,
) -> str:
    params = Params.model_validate(changed_params(changes or {}))
    tables = TABLES | dict(tables or {})
    return model_card(model, params, 3, sets, tables, for_pipeline=for_pipeline)


def test_the_card_says_how_many_counts_people_have_corrected() -> None:
    recorded = np.where(SETS.index < 1234, 2, 1)
    sets = SETS.assign(id=SETS.index.astype(str), quantity=1, recorded=recorded)
    assert "people have corrected 1,234 of these counts." in plain(card_of(sets=sets))
    assert "corrected" not in card_of()


def plain(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("model", "library"), [("vit", "transformers"), ("resnet34", "torchvision")]
)
def test_the_hub_reads_the_front_matter(model: str, library: str) -> None:
    text = card_of(model=model)

    head: Any = ModelCard(text).data
    assert (head.model_name, head.library_name) == (model, library)
    assert head.license == "cc-by-nc-sa-3.0"
    assert head.pipeline_tag == "image-classification"
    results = {result.metric_type: result for result in head.eval_results}
    assert list(results) == LISTED
    for metric, value in zip(LISTED, (0.5313, 0.9877, 0.6123, 0.8432), strict=True):
        assert results[metric].metric_value == value
        assert results[metric].dataset_split == "test"
    assert f"\n---\n\n# {model}: how many items are in a warehouse bin?\n" in text
    assert text.endswith("tape.\n")
    for part in ("{{", "}}", "{%", "%}", "None", "nan", "Undefined"):
        assert part not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"subset.seed": 11, "split.seed": 12},
            "(bins sampled with seed 11, sets sampled with seed 12)",
        ),
        ({"subset.order": "listing"}, "(the first bins of the listing, sets sampled with seed 0)"),
        ({"subset.ids": "mine.csv"}, "(bins of mine.csv, sets sampled with seed 0)"),
        (
            {"split.by": "file", "split.file": "its.csv"},
            "(bins sampled with seed 0, sets of its.csv)",
        ),
        (
            {"split.by": "file", "split.file": "its.csv"},
            "The sets are those of a list, which need not keep siblings together",
        ),
        (
            {"subset.quantities": [2, 4, 6], "resize.size": 96},
            "to tell 2, 4, 6 items apart in a 96x96",
        ),
        ({"subset.quantities": [2, 4, 6]}, "for counts other than 2, 4, 6"),
        ({"split.by": "group"}, "so no test bin was seen in training"),
        (
            {"split.by": "image"},
            "siblings of test bins (one bin before or after a pick) are in",
        ),
        ({"resize.fit": "pad"}, "resized to the square (pad)"),
        ({}, f"From pretrained weights (revision {REVISION}), 5 epochs, batch 64"),
        ({"train.vit.pretrained": False}, "From a random start, 5 epochs"),
        (
            {"train.vit.epochs": 7, "train.vit.seed": 13},
            "7 epochs, batch 64, adamw at a learning rate of 2e-05, cross-entropy, seed 13",
        ),
        (
            {"train.vit.ordinal_share": 0.3},
            "2e-05, 70% cross-entropy and 30% squared earth mover's distance, seed 0",
        ),
        ({}, "The weights after epoch 3, the last one, are kept."),
        (
            {"train.vit.ema_decay": 0.999},
            "The weights after epoch 3, the last one, are kept, as a moving average.",
        ),
        (
            {"train.vit.keep": "best"},
            "The weights after epoch 3, the best by accuracy on validation, are kept.",
        ),
        ({"evaluate.false_alarm": 0.025}, "as validation chose for 2.5% false alarms"),
    ],
    ids=str,
)
def test_the_text_says_what_was_run(changes: dict[str, Any], said: str) -> None:
    assert said in plain(card_of(changes=changes))


def test_the_text_says_what_was_found_and_what_it_is_good_for() -> None:
    text = plain(card_of())

    for said in (
        "188,100 bins to train, 9,900 to calibrate and choose thresholds, 22,000 to test",
        "temperature of 1.235, fitted on validation",
        "The intervals of `found`, `false_alarms` and precision take the threshold as given.",
        "Wrong records are those of the same bin before or after a pick, as if that was not",
        "Records whose count has a probability below 0.0765 are alarms",
        "5.1% of right records are alarms, and 43.2% of wrong ones",
        "(31.4% of those off by one, 59.3% of those off by more)",
        "the 1,234 test bins with siblings in train or validation: 61.2% (60.0 to 62.4)",
        "the 20,766 test bins without siblings in train or validation: 52.1% (51.0 to 53.2)",
        "the 4,321 test bins without products in train or validation: 50.2% (49.0 to 51.4)",
        "`python -m tools.audit PHOTOGRAPHS --model models/vit`",
        "to change inventory without a person looking",
    ):
        assert said in text


def test_the_threshold_of_an_open_class_has_its_name() -> None:
    changes = {"subset.quantities": [1, "2+"]}

    text = plain(
        card_of(changes=changes, tables={"alarms_by_count": BY_COUNT.assign(threshold=[0.1, 0.2])})
    )

    assert "a probability below 0.1 (of 1), 0.2 (of 2+) are alarms" in text


def test_thresholds_of_each_count_are_named() -> None:
    by_count = BY_COUNT.assign(threshold=[0.07654, 0.1])

    text = plain(card_of(tables={"alarms_by_count": by_count}))

    assert "a probability below 0.0765 (of 1), 0.1 (of 2) are alarms" in text


@pytest.mark.parametrize("has", [True, False])
def test_a_model_that_transformers_pipeline_can_load_says_so(has: bool) -> None:
    said = '`transformers.pipeline("image-classification", "models/vit")` counts the items'
    assert (said in plain(card_of(for_pipeline=has))) is has


def test_a_model_that_finds_nothing_and_has_no_siblings_has_a_card() -> None:
    nothing = ALARMS.assign(**dict.fromkeys(RATES, 0.0))
    precision = PRECISION.assign(precision=0.0, low=0.0, high=0.0, bins_per_find=np.inf)

    text = card_of(tables={"alarms": nothing, "precision": precision, "overlap": OVERLAP[1:]})

    assert "| 0.1% | 0.00% | 0.00% to 0.00% | - |" in text
    assert "test bins with siblings" not in text


def test_each_metric_and_each_precision_has_a_row() -> None:
    rows = [line for line in card_of().splitlines() if line.startswith("| ")]

    for name, value, low, high in INTERVALS.itertuples(index=False):
        assert f"| {name} | {value:.4f} | {low:.4f} to {high:.4f} |" in rows
    assert "| 0.1% | 0.80% | 0.70% to 0.90% | 125 |" in rows
    assert "| 5% | 30.80% | 29.00% to 33.00% | 3 |" in rows
    assert len(rows) == 2 * 2 + len(INTERVALS) + 3
