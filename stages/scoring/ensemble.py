"""Several models as one: the average of their probabilities, calibrated anew."""

from collections.abc import Sequence

import numpy as np

from stages.networks.calibration import fit_temperature, probability_columns
from stages.runtime.errors import UserError
from stages.scoring.scored import Scored


def average(members: Sequence[Scored]) -> Scored:
    """The mean probabilities of several models for the same bins, which are sorted by id.

    Raises UserError if the bins or the labels differ.
    """
    ordered = [member.table().sort_values("id", ignore_index=True) for member in members]
    columns = probability_columns(members[0].labels)
    first, *others = (
        ({*table.columns}, table[["id", "actual"]].values.tolist()) for table in ordered
    )
    if any(other != first for other in others):
        raise UserError(
            "the models were scored on different bins or count differently: run `dvc repro`"
        )
    mean = np.mean([table[columns].to_numpy() for table in ordered], axis=0)
    return Scored.from_table(ordered[0].assign(**dict(zip(columns, mean.T, strict=True))))


def ensemble_temperature(validation: Sequence[Scored]) -> float:
    """The temperature of the average of calibrated models, from their scores of validation.

    An average of calibrated models is right more often than it says (Rahaman and Thiery,
    Uncertainty Quantification and Deep Ensembles, 2021, arXiv:2007.08792). A single model is
    calibrated already: its temperature is 1.
    """
    if len(validation) == 1:
        return 1.0
    mean = average(validation)
    return fit_temperature(mean.probabilities, mean.targets)
