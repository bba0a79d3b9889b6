"""Score the average of all models on the test bins, which is what the audit uses: reports/ensemble.

Its temperature and thresholds come from validation, like those of a single model.
"""

from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.params import load_params
from stages.scoring.ensemble import average, ensemble_temperature
from stages.scoring.results import ENSEMBLE, evaluated, publish_evaluation, read_tables
from stages.scoring.scored import Scored


def main() -> str:
    params = load_params()
    tables = [read_tables(paths.REPORTS / model) for model in evaluated(params.train)]
    validation = [Scored.from_table(of_model["validation"]) for of_model in tables]
    test = [Scored.from_table(of_model["predictions"]) for of_model in tables]
    temperature = ensemble_temperature(validation)
    evaluation = publish_evaluation(
        ENSEMBLE,
        average(validation).with_temperature(temperature),
        average(test).with_temperature(temperature),
        temperature,
        params.evaluate,
    )
    return evaluation.summary


if __name__ == "__main__":
    run_stage("ensemble", main)
