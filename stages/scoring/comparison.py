"""Compare two models on the same test bins: is one better, or just lucky?"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd

from stages.networks.calibration import Floats
from stages.scoring.bootstrap import intervals, mcnemar
from stages.scoring.metrics import closed_weights, mean_of_known
from stages.scoring.scored import Scored


def compare_models(predictions: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row per pair of models.

    `accuracy` and `rmse` (in items, without records of an open label) are the first model's value
    minus the second's, each with the 95% interval of a bootstrap of sibling groups. `p_value` is
    that of McNemar's test. `predictions` has the rows of predictions.csv by model.
    """
    return pd.DataFrame(
        [
            {"first": first, "second": second}
            | compare_two(predictions[first], predictions[second])
            for first, second in combinations(predictions, 2)
        ]
    )


def compare_two(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, float]:
    both = first.merge(second, on=["id", "group", "actual"], validate="1:1")
    actual, labels = both["actual"].to_numpy(), Scored.from_table(first).labels
    errors = [(both[name] - both["actual"]).to_numpy() for name in ("predicted_x", "predicted_y")]

    def differences(weights: Floats) -> dict[str, float]:
        accuracy = [np.average(error == 0, weights=weights) for error in errors]
        known = closed_weights(actual, labels, weights)
        rmse = [mean_of_known(error**2, known) ** 0.5 for error in errors]
        return {"accuracy": accuracy[0] - accuracy[1], "rmse": rmse[0] - rmse[1]}

    compared: dict[str, float] = {}
    for row in intervals(differences, both["group"].tolist()).to_dict("records"):
        name = row["metric"]
        compared |= {name: row["value"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
    test = mcnemar(errors[0] == 0, errors[1] == 0)
    return compared | {
        "only_first_right": test.only_first,
        "only_second_right": test.only_second,
        "p_value": test.p_value,
    }
