"""The report's figures by name, each with a text for screen readers."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from stages.reporting import plots
from stages.reporting.page import embedded
from stages.scoring.results import ENSEMBLE

# Tables by the name of their file in reports/<model>, then by model.
Tables = Mapping[str, Mapping[str, pd.DataFrame]]


class Picture(NamedTuple):
    """A figure as PNG, and a text that says what it shows."""

    png: bytes
    text: str

    @property
    def url(self) -> str:
        return embedded("image/png", self.png)


def draw_figures(
    bins: pd.DataFrame,
    majority_accuracy: float,
    tables: Tables,
    published: pd.DataFrame,
    names: Mapping[int, str],
) -> dict[str, Picture]:
    """Plot each figure; the result is by the name of its file.

    `bins` has the quantity and set of each bin, `published` the rows of published_curves.csv, and
    `names` what each quantity is called.
    """
    quantities = pd.crosstab(bins["quantity"], bins["set"]).rename(index=names)
    figures = {"quantities": (plots.quantities_figure(quantities), quantities_text(quantities))}
    for model, curves in tables["curves"].items():
        known = published[published["model"] == model]
        figure = plots.curves_figure(model, curves, known, majority_accuracy)
        figures[f"curves_{model}"] = figure, curves_text(model, curves, known)
    for model, table in tables["confusion"].items():
        confusion = table.pivot_table("test_bins", "actual", "predicted", aggfunc="sum")
        confusion = confusion.rename(index=names, columns=names)
        figure = plots.confusion_figure(model, confusion.to_numpy(), confusion.index.tolist())
        figures[f"confusion_{model}"] = figure, confusion_text(model, confusion)
    text = "Recall per quantity; the tables below have the numbers."
    figures["recall"] = plots.recall_figure(tables["per_quantity"], list(names.values())), text
    figure = plots.reliability_figure(tables["reliability_uncalibrated"], tables["reliability"])
    figures["reliability"] = figure, reliability_text(tables["calibration"])
    figures["roc"] = plots.roc_figure(tables["roc"]), roc_text(tables["alarms"])
    text = "Precision by wrong records found; the tables below have some of its points."
    figures["precision"] = plots.precision_figure(tables["roc"][ENSEMBLE]), text
    return {name: Picture(plots.as_png(figure), text) for name, (figure, text) in figures.items()}


def quantities_text(quantities: pd.DataFrame) -> str:
    return "Bins per quantity: " + "; ".join(
        f"{quantity}: " + ", ".join(f"{row[name]:,} {name}" for name in plots.SETS)
        for quantity, row in quantities.iterrows()
    )


def curves_text(model: str, curves: pd.DataFrame, published: pd.DataFrame) -> str:
    last = curves.iloc[-1]
    text = (
        f"Loss and accuracy of {model} by epoch. After epoch {last['epoch']:.0f} it is right on"
        f" {last['train_accuracy']:.1%} of train and {last['validation_accuracy']:.1%} of"
        " validation."
    )
    if published.empty:
        return text
    last = published.iloc[-1]
    return (
        f"{text} The published run is right on {last['test_accuracy']:.1%} of its test bins after"
        f" epoch {last['epoch']:.0f}."
    )


def confusion_text(model: str, confusion: pd.DataFrame) -> str:
    """`confusion` has the number of test bins by quantity (index) and prediction (columns)."""
    shares = confusion.div(confusion.sum(axis=1).clip(lower=1), axis=0)
    return f"Predictions of {model} for each quantity: " + "; ".join(
        f"{quantity}: "
        + ", ".join(f"{share:.0%} as {predicted}" for predicted, share in row.items())
        for quantity, row in shares.iterrows()
    )


def reliability_text(calibration: Mapping[str, pd.DataFrame]) -> str:
    return "Accuracy by confidence: " + "; ".join(
        f"{model} differs by {table['calibration_error'].iloc[-1]:.1%},"
        f" {table['calibration_error'].iloc[0]:.1%} before calibration"
        for model, table in calibration.items()
    )


def roc_text(alarms: Mapping[str, pd.DataFrame]) -> str:
    return "Wrong records found by false alarms: " + "; ".join(
        f"{model} "
        + ", ".join(f"{row.found:.0%} at {row.false_alarms:.0%}" for row in table.itertuples())
        for model, table in alarms.items()
    )
