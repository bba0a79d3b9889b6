"""A class for a count and all above it, from params.yaml to the tables and the audit."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from stages.networks.classifier import load_classifier, save_classifier
from stages.reporting.content import majority_metrics
from stages.runtime.counts import AndMore, open_label, parse_label
from stages.runtime.errors import UserError
from stages.runtime.params import Evaluate, Subset
from stages.scoring.claims import sibling_differences
from stages.scoring.comparison import compare_models
from stages.scoring.evaluation import Evaluation, evaluate_scores
from stages.scoring.metrics import counting_metrics, probability_metrics
from stages.scoring.scored import Scored
from stages.subset import sample, with_groups
from tests.builders import TINY_VIT, model_params, random_classifier
from tests.conftest import index_of
from tools.audit.expected import Expected
from tools.audit.table import audit_table, describe_labels

LABELS = [0, 1, 2, AndMore(3)]


def test_an_open_label_is_a_number_that_is_written_with_a_plus() -> None:
    assert [parse_label(str(label)) for label in LABELS] == [0, 1, 2, 3]
    assert [str(label) for label in LABELS] == ["0", "1", "2", "3+"]
    assert f"p{LABELS[-1]}" == "p3+"
    assert open_label(LABELS) == 3
    assert open_label([0, 1, 3]) is None


def test_bins_with_more_items_belong_to_the_open_class() -> None:
    index = index_of({f"{number:05d}": (number, []) for number in range(1, 10)} | {"10": (0, [])})
    params = Subset(quantities=[0, 1, 4, AndMore(6)], bins=7, order="random", seed=0, ids=None)

    subset = sample(with_groups(index, params.quantities), params)

    found = dict(zip(subset["id"].to_pylist(), subset["quantity"].to_pylist(), strict=True))
    assert found == {"00001": 1, "00004": 4, "10": 0, **{f"0000{n}": 6 for n in (6, 7, 8, 9)}}


def test_the_real_bins_all_have_a_class(abid_index: pa.Table) -> None:
    params = Subset(
        quantities=[*range(6), AndMore(6)], bins=9_900, order="random", seed=0, ids=None
    )

    subset = sample(with_groups(abid_index, params.quantities), params)

    assert set(subset["quantity"].to_pylist()) == {0, 1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_a_saved_model_knows_its_open_class(library: str, tmp_path: Path) -> None:
    if library == "torchvision":
        params = model_params("resnet34", name="squeezenet1_1", pretrained=False)
    else:
        params = model_params("vit", config=TINY_VIT, pretrained=False)
    save_classifier(random_classifier(params, LABELS), params, tmp_path, "squeeze")

    assert [str(label) for label in load_classifier(tmp_path).labels] == ["0", "1", "2", "3+"]
    names = json.loads((tmp_path / "config.json").read_text())["id2label"]
    assert list(names.values()) == ["0", "1", "2", "3+"]


def test_errors_in_items_leave_out_records_of_the_open_class() -> None:
    actual, predicted = np.array([0, 1, 3, 3]), np.array([0, 3, 0, 3])

    metrics = counting_metrics(actual, predicted, LABELS)

    # A prediction of 3 or more is 2 items off if the record says 1.
    assert metrics["rmse"] == pytest.approx(2**0.5)
    assert (metrics["mae"], metrics["within_one"]) == (1, 0.5)
    assert metrics["accuracy"] == 0.5
    certain = np.eye(4)[predicted]
    of_mean = probability_metrics(actual, certain, LABELS)
    assert of_mean["rmse_of_mean"] == pytest.approx(2**0.5)
    assert of_mean["rps"] == pytest.approx(1)
    assert probability_metrics(actual, certain, [0, 1, 2, 3])["rps"] == pytest.approx(5 / 4)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_set_without_a_known_count_is_refused(name: str) -> None:
    sets = {"validation": scored([0, 1, 3]), "test": scored([0, 2, 3])} | {name: scored([3, 3])}

    with pytest.raises(UserError, match=f"all bins of {name} have 3\\+ items, so errors in items"):
        evaluated(**sets)


def test_a_few_bins_of_the_open_class_among_the_test_bins_are_evaluated() -> None:
    # Some samples of the bootstrap have none of the other bins.
    metrics = evaluated(scored([0, 1, 3]), scored([3, 3, 1])).metrics

    assert (metrics["rmse"], metrics["within_one"]) == (0, 1)


def test_models_are_compared_by_the_same_rmse_as_each_has() -> None:
    scores = {name: scored([0, 1, 3, 3], seed) for name, seed in (("one", 0), ("two", 3))}

    (row,) = compare_models({name: one.table() for name, one in scores.items()}).to_dict("records")

    one, two = (of_model.metrics()["rmse"] for of_model in scores.values())
    assert row["rmse"] == pytest.approx(one - two) != 0


def test_the_majority_is_measured_as_models_are() -> None:
    metrics = majority_metrics(scored([1, 2, 3, 3]).table(), 1)

    assert (metrics["rmse"], metrics["mae"], metrics["within_one"]) == (0.5**0.5, 0.5, 1)


def scored(actual: Sequence[int], seed: int = 0) -> Scored:
    """Random scores of bins without siblings."""
    ids = [f"{number:05d}" for number in range(len(actual))]
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(4), len(actual))
    return Scored(ids, ids, np.array(actual), probabilities, LABELS)


def evaluated(validation: Scored, test: Scored) -> Evaluation:
    params = Evaluate(batch_size=1, false_alarm=0.25, errors="picks", threshold="per_count")
    none = sibling_differences([], [], np.array([], np.int64))
    return evaluate_scores(validation, test, 1.0, params, none, {"siblings": set()}, 1)


def test_scores_are_read_back_with_their_open_class() -> None:
    scored = Scored(["1"], ["1"], np.array([3]), np.array([[0.1, 0.2, 0.3, 0.4]]), LABELS)

    table = scored.table()

    assert table.columns.tolist()[-4:] == ["p0", "p1", "p2", "p3+"]
    assert open_label(Scored.from_table(table).labels) == 3


def test_a_record_of_12_on_an_empty_bin_is_an_alarm() -> None:
    counts = {"00001": 12, "00002": 12, "00003": 0, "00004": 2}
    scored = pd.DataFrame({"id": list(counts), "p0": [0.97, 0.01, 0.97, 0.01], "p1": 0.01})
    scored = scored.assign(p2=0.01, problem="")
    scored["p3+"] = [0.01, 0.97, 0.01, 0.97]

    table = audit_table(scored, Expected("", counts), LABELS, np.full(4, 0.05)).set_index("id")

    assert table["alarm"].to_dict() == {
        "00001": "yes",
        "00002": "no",
        "00003": "no",
        "00004": "yes",
    }
    assert table["expected"].to_dict() == counts
    assert describe_labels(LABELS) == "0 to 3+"
