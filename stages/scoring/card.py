"""The model card, in the form of the Hugging Face hub, written from the run's own numbers."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.runtime.params import Params

TEMPLATE = Path(__file__).with_name("card.md")
# What the hub lists as results; the text of the card has every metric.
LISTED = ["accuracy", "rmse", "mae", "auroc"]


def model_card(
    model: str, params: Params, epoch: int, sets: pd.DataFrame, tables: Mapping[str, pd.DataFrame]
) -> str:
    """Markdown with YAML front matter.

    `epoch` is the one whose weights the model has; `tables` are those of evaluate_scores, by name.
    """
    intervals = tables["intervals"].set_index("metric").to_dict("index")
    precision = tables["precision"]
    model_params = params.model(model)
    front_matter = ModelCardData(
        model_name=model,
        library_name=model_params.library,
        license="cc-by-nc-sa-3.0",
        pipeline_tag="image-classification",
        tags=["counting", "warehouse", "amazon-bin-image-dataset"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="amazon-bin-image-dataset",
                dataset_name="Amazon Bin Image Dataset",
                dataset_split="test",
                metric_type=metric,
                metric_value=round(intervals[metric]["value"], 4),
            )
            for metric in LISTED
        ],
    )
    card: ModelCard = ModelCard.from_template(
        front_matter,
        template_str=TEMPLATE.read_text("utf-8"),
        model=model,
        model_params=model_params,
        params=params,
        epoch=epoch,
        chosen=chosen_by(params),
        sets=sets["set"].value_counts().to_dict(),
        intervals=intervals,
        alarms=tables["alarms"].to_dict("records")[0],
        precision=precision[precision["alarms"] == "chosen"].to_dict("records"),
        siblings=tables["siblings"].to_dict("records"),
        temperature=tables["calibration"]["temperature"].iloc[-1],
    )
    return str(card).rstrip("\n") + "\n"


def chosen_by(params: Params) -> str:
    """What chose the bins and their sets: seeds, or lists of lists/."""
    bins, sets = params.subset, params.split
    of_bins = f"bins sampled with seed {bins.seed}" if bins.ids is None else f"bins of {bins.ids}"
    of_sets = f"sets sampled with seed {sets.seed}" if sets.file is None else f"sets of {sets.file}"
    return f"{of_bins}, {of_sets}"
