"""The report's figures, drawn with matplotlib: same data, same bytes.

Each is narrow enough to read on a phone.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from stages.scoring.verification import PREVALENCES, precision

SETS = {"train": "#5b7690", "validation": "#d9a13b", "test": "#c8385a"}
REFERENCE = "#6b7683"
MODELS = ["#1f6fb4", "#c2571a", "#3f7f3f", "#7a4fa3"]
WIDTH = 4.8
# With more quantities, the cells of a confusion are too small for the numbers of bins.
MOST_COUNTED = 8
DOTS_PER_INCH = 130


def quantities_figure(quantities: pd.DataFrame) -> Figure:
    """Bars of the bins per quantity; `quantities`: index quantity, columns of SETS."""
    figure, (axes,) = _figure(height=3.2)
    bottom = np.zeros(len(quantities))
    for name, color in SETS.items():
        axes.bar(
            quantities.index.astype(str), quantities[name], bottom=bottom, color=color, label=name
        )
        bottom += quantities[name].to_numpy()
    axes.set(xlabel="items in the record", ylabel="bins", title="Bins per quantity")
    _legend(figure, axes)
    return figure


def curves_figure(model: str, curves: pd.DataFrame, majority_accuracy: float) -> Figure:
    """Loss and accuracy by epoch; `curves`: rows of curves.csv."""
    figure, (loss, accuracy) = _figure(height=5.6, rows=2)
    for name in ("train", "validation"):
        for panel, value in ((loss, "loss"), (accuracy, "accuracy")):
            values = curves[f"{name}_{value}"]
            # With a marker, since a line through one epoch shows nothing.
            panel.plot(curves["epoch"], values, "o-", color=SETS[name], markersize=4, label=name)
    accuracy.axhline(majority_accuracy, color=REFERENCE, linestyle="--", label="majority class")
    loss.set(title=f"Training of {model}", ylabel="cross-entropy")
    accuracy.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for panel in (loss, accuracy):
        panel.set_xlim(0.5, len(curves) + 0.5)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.25)
    _legend(figure, accuracy, columns=2)
    return figure


def confusion_figure(model: str, confusion: NDArray[np.int64], labels: Sequence[int]) -> Figure:
    """The share of each row's bins, and their number where the cells have room for both."""
    figure, (panel,) = _figure(height=WIDTH)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # In points, so that the text fits into a cell.
    size = min(10.0, 72 / len(labels))
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*confusion.shape):
        color = "white" if shares[row, column] > 0.65 else "black"
        text = f"{shares[row, column]:.0%}"
        if len(labels) <= MOST_COUNTED:
            text += f"\n{confusion[row, column]:,}"
        panel.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    panel.set_xticks(range(len(labels)), map(str, labels))
    panel.set_yticks(range(len(labels)), map(str, labels))
    panel.set(title=f"Confusion of {model}", xlabel="predicted items", ylabel="items in the record")
    panel.spines[:].set_visible(False)
    return figure


def recall_figure(per_quantity: Mapping[str, pd.DataFrame]) -> Figure:
    """A group of bars for each quantity; `per_quantity`: rows of per_quantity.csv by model."""
    figure, (axes,) = _figure(height=3.4)
    width = 0.8 / len(per_quantity)
    for number, (model, table) in enumerate(per_quantity.items()):
        places = np.arange(len(table)) + (number - (len(per_quantity) - 1) / 2) * width
        color = MODELS[number % len(MODELS)]
        axes.bar(places, table["recall"], width, color=color, label=model)
        axes.set_xticks(range(len(table)), table["quantity"].astype(str))
    axes.set(
        xlabel="items in the record", ylabel="recall", ylim=(0, 1), title="Recall per quantity"
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", alpha=0.25)
    _legend(figure, axes)
    return figure


def reliability_figure(
    before: Mapping[str, pd.DataFrame], after: Mapping[str, pd.DataFrame]
) -> Figure:
    """Accuracy by confidence, each point sized by its bins, and a thin line before calibration.

    `before` and `after`: rows of reliability_uncalibrated.csv and reliability.csv, by model.
    """
    figure, (axes,) = _figure(height=WIDTH + 0.3)
    axes.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", label="ideal")
    for (model, table), color in zip(after.items(), cycle(MODELS), strict=False):
        confidence, accuracy = table["confidence"], table["accuracy"]
        axes.plot(confidence, accuracy, "o-", color=color, linewidth=1, markersize=3, label=model)
        sizes = 300 * table["test_bins"] / table["test_bins"].sum()
        axes.scatter(confidence, accuracy, sizes, color=color, clip_on=False)
        confidence, accuracy = before[model]["confidence"], before[model]["accuracy"]
        label = f"{model} before"
        axes.plot(confidence, accuracy, "x:", color=color, linewidth=1, markersize=4, label=label)
    axes.set(xlabel="confidence in the prediction", ylabel="share that is right")
    axes.set_title("Reliability")
    _make_unit_square(axes)
    _legend(figure, axes)
    return figure


def roc_figure(roc: Mapping[str, pd.DataFrame]) -> Figure:
    """Wrong records found by false alarms; `roc`: rows of roc.csv, by model."""
    figure, (axes,) = _figure(height=WIDTH)
    axes.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", label="chance")
    for (model, table), color in zip(roc.items(), cycle(MODELS), strict=False):
        axes.plot(table["false_alarms"], table["found"], color=color, label=model)
    axes.set(xlabel="right records that are alarms", ylabel="wrong records found")
    axes.set_title("Verification: ROC")
    _make_unit_square(axes)
    _legend(figure, axes)
    return figure


def precision_figure(roc: Mapping[str, pd.DataFrame]) -> Figure:
    """Precision by wrong records found, where PREVALENCES of the records are wrong.

    `roc`: rows of roc.csv, by model. The axis of precision is logarithmic, since it spans decades.
    """
    figure, (axes,) = _figure(height=WIDTH)
    for (model, table), color in zip(roc.items(), cycle(MODELS), strict=False):
        found, false_alarms = table["found"].to_numpy(), table["false_alarms"].to_numpy()
        for prevalence, style in zip(PREVALENCES, (":", "--", "-"), strict=True):
            shares = precision(found, false_alarms, prevalence)
            label = f"{model}, {prevalence:.1%}"
            some = false_alarms > 0
            axes.plot(found[some], shares[some], color=color, linestyle=style, label=label)
    axes.set(xlabel="wrong records found", ylabel="alarms that are wrong records")
    axes.set(xlim=(0, 1), ylim=(5e-4, 1), yscale="log", title="Verification: precision and recall")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.grid(alpha=0.25)
    _legend(figure, axes, columns=2)
    return figure


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib, which would change the bytes.
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _make_unit_square(axes: Axes) -> None:
    """Shares along both axes."""
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.25)


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)
