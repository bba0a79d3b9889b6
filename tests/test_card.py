"""The model card: what the hub reads of it, and that its text has the numbers of the tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from ruamel.yaml import YAML

from stages.runtime.params import Params
from stages.scoring.card import LISTED, model_card
from stages.scoring.verification import precision_table
from tests.conftest import changed_params

INTERVALS = pd.DataFrame(
    [
        ("accuracy", 0.53126, 0.52468, 0.53791),
        ("rmse", 0.98765, 0.97, 1.01),
        ("mae", 0.61234, 0.6, 0.62),
        ("auroc", 0.84321, 0.83, 0.85),
        ("nll", 1.12345, 1.1, 1.15),
    ],
    columns=["metric", "value", "low", "high"],
)
RATES = ["false_alarms", "found", "found_off_by_one", "found_off_by_more"]
ALARMS = pd.DataFrame(
    [("chosen", 0.07654, 0.0512, 0.4321, 0.3141, 0.5926), ("1%", 0.01, 0.01, 0.0, 0.0, 0.0)],
    columns=["alarms", "threshold", *RATES],
)
SIBLINGS = pd.DataFrame(
    [("with", 1234, 0.612, 0.6, 0.624), ("without", 20_766, 0.521, 0.51, 0.532)],
    columns=["siblings_in_train", "test_bins", "accuracy", "low", "high"],
)
CALIBRATION = pd.DataFrame(
    [("before", 1.0, 1.2, 0.1), ("after", 1.23456, 1.1, 0.01)],
    columns=["calibrated", "temperature", "nll", "ece"],
)
TABLES = {
    "intervals": INTERVALS,
    "alarms": ALARMS,
    "precision": precision_table(ALARMS, 22_000),
    "siblings": SIBLINGS,
    "calibration": CALIBRATION,
}
SETS = pd.DataFrame({"set": np.repeat(["train", "validation", "test"], [188_100, 9900, 22_000])})


def card_of(
    model: str = "vit", changes: Mapping[str, Any] | None = None, **tables: pd.DataFrame
) -> str:
    params = Params.model_validate(changed_params(changes or {}))
    return model_card(model, params, SETS, TABLES | tables)


def plain(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def has(text: str, *parts: str) -> bool:
    """Whether it has all of them, wherever its lines break."""
    return all(part in plain(text) for part in parts)


@pytest.mark.parametrize(
    ("model", "library"), [("vit", "transformers"), ("resnet34", "torchvision")]
)
def test_the_hub_reads_the_head(model: str, library: str) -> None:
    head: Any = ModelCard(card_of(model)).data

    assert head.library_name == library
    assert head.license == "cc-by-nc-sa-3.0"
    assert head.pipeline_tag == "image-classification"
    assert head.model_name == model
    results = {result.metric_type: result for result in head.eval_results}
    assert list(results) == LISTED
    for metric, value in zip(LISTED, (0.5313, 0.9877, 0.6123, 0.8432), strict=True):
        assert results[metric].metric_value == value
        assert results[metric].dataset_split == "test"


def test_the_head_is_yaml_between_lines_and_the_text_follows() -> None:
    text = card_of()

    empty, head, body = text.split("---\n", maxsplit=2)
    assert empty == ""
    values = YAML(typ="safe", pure=True).load(head)
    assert values["model-index"][0]["name"] == "vit"
    assert body.lstrip().startswith("# vit: how many items are in a warehouse bin?")
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_nothing_of_the_template_is_left() -> None:
    text = card_of()

    for part in ("{{", "}}", "{%", "%}", "None", "nan", "Undefined"):
        assert part not in text


def test_each_metric_has_its_value_and_interval() -> None:
    rows = [line for line in card_of().splitlines() if line.startswith("| ")]

    for name, value, low, high in INTERVALS.itertuples(index=False):
        assert f"| {name} | {value:.4f} | {low:.4f} to {high:.4f} |" in rows
    # A table is one block of lines.
    block = card_of().partition("| metric |")[2].partition("\n\n")[0]
    assert block.count("\n") == 1 + len(INTERVALS)


def test_the_alarms_are_those_of_the_threshold_that_validation_chose() -> None:
    text = card_of(changes={"evaluate.false_alarm": 0.025})

    assert has(text, "below 0.0765, chosen on validation for 2.5% false alarms")
    assert has(text, "5.1% of right records are alarms and 43.2% of wrong ones")
    assert has(text, "31.4% of those off by one, 59.3% of those off by more")


def test_the_precision_is_that_of_the_chosen_threshold() -> None:
    found, false = 0.4321, 0.0512

    block = card_of().partition("| wrong records |")[2].partition("\n\n")[0]
    assert block.count("\n") == 4
    for share in (0.001, 0.01, 0.05):
        precision = share * found / (share * found + (1 - share) * false)
        expected = f"| {100 * share:g}% | {100 * precision:.2f}% | {1 / precision:.0f} |"
        assert expected in block.splitlines()


def test_a_model_that_finds_nothing_has_a_card() -> None:
    nothing = ALARMS.assign(**dict.fromkeys(RATES, 0.0))

    text = card_of(alarms=nothing, precision=precision_table(nothing, 22_000))

    assert "| 0.1% | 0.00% | - |" in text
    assert "inf" not in text.partition("| wrong records |")[2].partition("\n\n")[0]


def test_the_accuracy_with_and_without_siblings_is_told_apart() -> None:
    text = card_of()

    without = "the 20,766 test bins without siblings in train or validation: 52.1%"
    assert has(text, "the 1,234 test bins with siblings", ": 61.2% (60.0 to 62.4)", without)
    only = card_of(siblings=SIBLINGS[1:])
    assert "test bins with siblings" not in only
    assert has(only, f"{without} (51.0 to 53.2)")


def test_the_data_and_the_protocol_are_those_of_the_params() -> None:
    text = card_of(
        changes={
            "resize.fit": "pad",
            "resize.size": 96,
            "subset.quantities": [2, 4, 6],
            "subset.seed": 11,
            "split.seed": 12,
            "train.vit.epochs": 7,
            "train.vit.seed": 13,
            "train.vit.loss": "ordinal",
        }
    )

    assert has(text, "188,100 bins to train, 9,900 to calibrate", "22,000 to test")
    assert has(text, "tells 2, 4, 6 items apart in a 96x96 photograph", "other than 2, 4, 6")
    assert has(text, "(seeds 11 and 12)", "(pad)")
    assert has(text, "7 epochs, batch 64, adamw at a learning rate of 2e-05, ordinal, seed 13")
    # The one after calibration.
    assert has(text, "temperature of 1.235")
    assert has(text, "google/vit-base-patch16-224-in21k of transformers", "--model models/vit")


def test_where_the_weights_start_is_said() -> None:
    revision = changed_params({})["train"]["vit"]["revision"]

    pretrained, random = card_of(), card_of(changes={"train.vit.pretrained": False})

    assert has(pretrained, f"From pretrained weights (revision {revision}), 5 epochs")
    assert has(random, "From a random start, 5 epochs")
    assert revision not in random


@pytest.mark.parametrize(("by", "other"), [("group", "image"), ("image", "group")])
def test_a_split_that_leaks_is_said_to_do_so(by: str, other: str) -> None:
    says = {
        "group": "so no test bin was seen in training",
        "image": "siblings of test bins (one bin before or after a pick) are in train",
    }

    text = card_of(changes={"split.by": by})

    assert has(text, says[by])
    assert not has(text, says[other])


def test_the_card_says_what_the_model_is_not_for() -> None:
    text = card_of()

    assert has(text, "It must not be used", "to change inventory without a person looking")
    assert has(text, "to judge workers", "commercially", "CC BY-NC-SA 3.0 US")
