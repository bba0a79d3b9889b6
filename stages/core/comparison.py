"""Two models on the same test bins: is one better, or lucky?"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd

from stages.core.bootstrap import intervals, mcnemar
from stages.core.calibration import Floats

COLUMNS = ["first", "second", "metric", "difference", "low", "high"]
PAIRED = [*COLUMNS, "only_first_right", "only_second_right", "p_value"]


def compare_models(
    predictions: Mapping[str, pd.DataFrame], groups: "pd.Series[str]"
) -> pd.DataFrame:
    """A row per pair of models and metric; PAIRED are its columns.

    `difference` is the first's accuracy (or RMSE, in items) less the second's, with the 95%
    interval of a bootstrap of sibling groups; p_value is McNemar's, on which of the two is right.
    `predictions`: rows of predictions.csv, by model; `groups`: each bin's sibling group, by id.
    """
    pairs = [
        compare_two(first, second, predictions, groups)
        for first, second in combinations(predictions, 2)
    ]
    return pd.concat(pairs) if pairs else pd.DataFrame(columns=PAIRED)


def compare_two(
    first: str, second: str, predictions: Mapping[str, pd.DataFrame], groups: "pd.Series[str]"
) -> pd.DataFrame:
    both = predictions[first].merge(predictions[second], on=["id", "actual"], validate="1:1")
    errors = [(both[name] - both["actual"]).to_numpy() for name in ("predicted_x", "predicted_y")]

    def differences(weights: Floats) -> dict[str, float]:
        accuracy = [np.average(error == 0, weights=weights) for error in errors]
        rmse = [np.sqrt(np.average(error**2, weights=weights)) for error in errors]
        return {"accuracy": accuracy[0] - accuracy[1], "rmse": rmse[0] - rmse[1]}

    table = intervals(differences, groups[both["id"]].tolist())
    table = table.rename(columns={"value": "difference"}).assign(first=first, second=second)
    test = mcnemar(errors[0] == 0, errors[1] == 0)
    return table[COLUMNS].assign(
        only_first_right=test.only_first, only_second_right=test.only_second, p_value=test.p_value
    )
