"""The model card in the format of the Hugging Face hub, with the numbers of the run."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.runtime.params import Params
from stages.scoring.bins import corrected_ids

TEMPLATE = Path(__file__).with_name("card.md")
# The hub lists these metrics as results; the text of the card has all of them.
LISTED = ["accuracy", "rmse", "mae", "auroc"]


def model_card(
    model: str,
    params: Params,
    epoch: int,
    sets: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    *,
    for_pipeline: bool,
) -> str:
    """Markdown with YAML front matter.

    `epoch` is the one whose weights the model has; `tables` are those of evaluate_scores, by name;
    `for_pipeline` says whether transformers.pipeline can load the model.
    """
    intervals = tables["intervals"].set_index("metric").to_dict("index")
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
        for_pipeline=for_pipeline,
        chosen=chosen_by(params),
        sets=sets["set"].value_counts().to_dict(),
        corrected=len(corrected_ids(sets)),
        intervals=intervals,
        alarms=tables["alarms"].to_dict("records")[0],
        thresholds=thresholds_in_words(tables["alarms_by_count"], params.subset.quantities),
        precision=tables["precision"].to_dict("records"),
        overlap=tables["overlap"].to_dict("records"),
        temperature=tables["calibration"]["temperature"].iloc[-1],
    )
    return str(card).rstrip("\n") + "\n"


def thresholds_in_words(by_count: pd.DataFrame, labels: list[int]) -> str:
    """Like "0.05", or if each count has its own, "0.05 (of 1), 0.07 (of 2+)"."""
    if by_count["threshold"].nunique() == 1:
        return f"{by_count['threshold'].iloc[0]:.3g}"
    names = {int(label): str(label) for label in labels}
    pairs = zip(by_count["threshold"], by_count["quantity"], strict=True)
    return ", ".join(f"{threshold:.3g} (of {names[quantity]})" for threshold, quantity in pairs)


def chosen_by(params: Params) -> str:
    """How the bins and their sets were chosen: by seed, by the listing, or by files of lists/."""
    bins, sets = params.subset, params.split
    if bins.ids is not None:
        of_bins = f"bins of {bins.ids}"
    elif bins.order == "listing":
        of_bins = "the first bins of the listing"
    else:
        of_bins = f"bins sampled with seed {bins.seed}"
    of_sets = f"sets sampled with seed {sets.seed}" if sets.file is None else f"sets of {sets.file}"
    return f"{of_bins}, {of_sets}"
