"""The report's figures, plotted with matplotlib: the same data give the same bytes.

Each figure is narrow enough for a phone.
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
# The sets with curves in this run, and in the published runs.
LEARNED = ("train", "validation")
PUBLISHED = ("train", "test")
# The axis of losses reaches at least this high, so that most runs are plotted on the same scale.
USUAL_LOSS = 2.0
REFERENCE = "#6b7683"
MODELS = ["#1f6fb4", "#c2571a", "#3f7f3f", "#7a4fa3"]
WIDTH = 4.8
# With more quantities, the cells of a confusion matrix are too small for the numbers of bins.
MOST_COUNTED = 8
DOTS_PER_INCH = 130


def quantities_figure(quantities: pd.DataFrame) -> Figure:
    """Bars of the bins per quantity; `quantities` has a row per quantity and a column per set."""
    figure, (axes,) = _figure(height=3.2)
    bottom = np.zeros(len(quantities))
    for name, color in SETS.items():
        axes.bar(quantities.index, quantities[name], bottom=bottom, color=color, label=name)
        bottom += quantities[name].to_numpy()
    axes.set(xlabel="items in the record", ylabel="bins", title="Bins per quantity")
    _legend(figure, axes)
    return figure


def curves_figure(
    model: str, curves: pd.DataFrame, published: pd.DataFrame, majority_accuracy: float
) -> Figure:
    """Loss and accuracy by epoch, with dashed lines for the published run.

    `curves` has the rows of curves.csv, `published` the model's rows of published_curves.csv.
    """
    figure, panels = _figure(height=6.4, rows=2)
    for panel, value in zip(panels, ("loss", "accuracy"), strict=True):
        for name in LEARNED:
            _plot_curve(panel, curves, f"{name}_{value}", "o-", SETS[name], name)
        for name in PUBLISHED:
            label = f"published ({name})"
            _plot_curve(panel, published, f"{name}_{value}", ".--", SETS[name], label)
    loss, accuracy = panels
    accuracy.axhline(majority_accuracy, color=REFERENCE, linestyle=":", label="majority class")
    loss.set(title=f"Training of {model}", ylabel="cross-entropy (lower is better)")
    loss.set_ylim(0, max(USUAL_LOSS, loss.get_ylim()[1]))
    accuracy.set(xlabel="epoch", ylabel="accuracy (higher is better)", ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for panel in panels:
        panel.set_xlim(0.5, max([*curves["epoch"], *published["epoch"]]) + 0.5)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.25)
    _legend(figure, *panels, columns=2)
    return figure


def _plot_curve(
    panel: Axes, curves: pd.DataFrame, column: str, style: str, color: str, label: str
) -> None:
    """Plot a column by epoch, unless it is empty."""
    values = curves[column].dropna()
    if len(values):
        # With markers, because a line through one epoch is invisible.
        epochs = curves.loc[values.index, "epoch"]
        panel.plot(epochs, values, style, color=color, markersize=4, label=label)


def confusion_figure(model: str, confusion: NDArray[np.int64], labels: Sequence[str]) -> Figure:
    """The share of each row's bins, and their number if the cells have room for both."""
    figure, (panel,) = _figure(height=WIDTH)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # Points that fit into a cell.
    size = min(10.0, 72 / len(labels))
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*confusion.shape):
        color = "white" if shares[row, column] > 0.65 else "black"
        text = f"{shares[row, column]:.0%}"
        if len(labels) <= MOST_COUNTED:
            text += f"\n{confusion[row, column]:,}"
        panel.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    panel.set_xticks(range(len(labels)), labels)
    panel.set_yticks(range(len(labels)), labels)
    panel.set(title=f"Counts of {model} (the diagonal is right)")
    panel.set(xlabel="predicted items", ylabel="items in the record")
    panel.spines[:].set_visible(False)
    return figure


def recall_figure(per_quantity: Mapping[str, pd.DataFrame], labels: Sequence[str]) -> Figure:
    """A group of bars per quantity; `per_quantity` has the rows of per_quantity.csv by model."""
    figure, (axes,) = _figure(height=3.4)
    width = 0.8 / len(per_quantity)
    for number, (model, table) in enumerate(per_quantity.items()):
        positions = np.arange(len(table)) + (number - (len(per_quantity) - 1) / 2) * width
        color = MODELS[number % len(MODELS)]
        axes.bar(positions, table["recall"], width, color=color, label=model)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(
        xlabel="items in the record",
        ylabel="recall",
        ylim=(0, 1),
        title="Recall per quantity (higher is better)",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", alpha=0.25)
    _legend(figure, axes)
    return figure


def reliability_figure(
    before: Mapping[str, pd.DataFrame], after: Mapping[str, pd.DataFrame]
) -> Figure:
    """Accuracy by confidence, with points sized by their bins and dotted lines before calibration.

    `before` and `after` have the rows of reliability_uncalibrated.csv and reliability.csv by model.
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
    axes.set_title("Reliability (the diagonal is ideal)")
    _make_unit_square(axes)
    _legend(figure, axes)
    return figure


def roc_figure(roc: Mapping[str, pd.DataFrame]) -> Figure:
    """Wrong records found by false alarms; `roc` has the rows of roc.csv by model."""
    figure, (axes,) = _figure(height=WIDTH)
    axes.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", label="chance")
    for (model, table), color in zip(roc.items(), cycle(MODELS), strict=False):
        axes.plot(table["false_alarms"], table["found"], color=color, label=model)
    axes.set(xlabel="right records that are alarms", ylabel="wrong records found")
    axes.set_title("Verification: ROC (upper left is better)")
    _make_unit_square(axes)
    _legend(figure, axes)
    return figure


def precision_figure(roc: pd.DataFrame) -> Figure:
    """The ensemble's precision by wrong records found, for each of PREVALENCES.

    `roc` has the rows of its roc.csv. Precision spans decades, so its axis is logarithmic.
    """
    figure, (axes,) = _figure(height=WIDTH)
    found, false_alarms = roc["found"].to_numpy(), roc["false_alarms"].to_numpy()
    some = false_alarms > 0
    for prevalence, color in zip(PREVALENCES, MODELS, strict=False):
        shares = precision(found, false_alarms, prevalence)
        label = f"{prevalence:.1%} of records wrong"
        axes.plot(found[some], shares[some], color=color, label=label)
    axes.set(xlabel="wrong records found", ylabel="alarms that are wrong records")
    axes.set(
        xlim=(0, 1),
        ylim=(5e-4, 1),
        yscale="log",
        title="Precision of the ensemble (upper right is better)",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.grid(alpha=0.25)
    _legend(figure, axes, columns=2)
    return figure


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # matplotlib would write its version, which changes the bytes.
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _make_unit_square(axes: Axes) -> None:
    """Give both axes shares from 0 to 1."""
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.25)


def _legend(figure: Figure, *panels: Axes, columns: int = 3) -> None:
    """Add a legend below the panels, with each label once."""
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [*handles.values()], [*handles], loc="outside lower center", ncols=columns, frameon=False
    )


def _figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)
