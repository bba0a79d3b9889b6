"""The report's figures, drawn with matplotlib: same data, same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

TRAIN, TEST, RIGHT, WRONG = "#8fa3b8", "#d1495b", "#1b7f5c", "#b3261e"
DOTS_PER_INCH = 130


def quantities_figure(quantities: pd.DataFrame) -> Figure:
    """Bars of the bins per quantity; `quantities`: index quantity, columns train and test."""
    figure, (axes,) = _figure(1, width=6.4, height=3.2)
    bottom = np.zeros(len(quantities))
    for name, color in (("train", TRAIN), ("test", TEST)):
        axes.bar(
            quantities.index.astype(str), quantities[name], bottom=bottom, color=color, label=name
        )
        bottom += quantities[name].to_numpy()
    axes.set(xlabel="items in the record", ylabel="bins", title="Bins per quantity")
    axes.legend(frameon=False)
    return figure


def curves_figure(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Loss and accuracy by epoch, a column per model; `curves`: rows of curves.csv."""
    figure, axes = _figure(2 * len(curves), width=4.4 * len(curves), height=5.6, rows=2)
    losses, accuracies = axes[: len(curves)], axes[len(curves) :]
    for (model, curve), loss, accuracy in zip(curves.items(), losses, accuracies, strict=True):
        for name, color in (("train", TRAIN), ("test", TEST)):
            for panel, value in ((loss, "loss"), (accuracy, "accuracy")):
                values = curve[f"{name}_{value}"]
                panel.plot(curve["epoch"], values, "o-", color=color, markersize=4, label=name)
        loss.set(title=model, ylabel="cross-entropy")
        accuracy.set(xlabel="epoch", ylabel="accuracy")
        accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for panel in (loss, accuracy):
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(alpha=0.25)
    low = min(panel.get_ylim()[0] for panel in accuracies)
    high = max(panel.get_ylim()[1] for panel in accuracies)
    for panel in accuracies:
        panel.set_ylim(low, high)
    losses[0].legend(frameon=False)
    return figure


def confusions_figure(confusions: Mapping[str, NDArray[np.int64]], labels: Sequence[int]) -> Figure:
    """A panel per model: the share of each row's bins, with their number."""
    figure, axes = _figure(len(confusions), width=4.4 * len(confusions), height=4.4)
    for (model, confusion), panel in zip(confusions.items(), axes, strict=True):
        shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(*confusion.shape):
            color = "white" if shares[row, column] > 0.5 else "black"
            text = f"{shares[row, column]:.0%}\n{confusion[row, column]}"
            panel.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
        panel.set_xticks(range(len(labels)), map(str, labels))
        panel.set_yticks(range(len(labels)), map(str, labels))
        panel.set(title=model, xlabel="predicted items", ylabel="items in the record")
        panel.spines[:].set_visible(False)
    return figure


def sheet_figure(bins: pd.DataFrame, photographs: Mapping[str, NDArray[np.uint8]]) -> Figure:
    """A sheet of photographs; `bins`: id, actual, and a column per model with its prediction."""
    models = list(bins.columns[2:])
    columns = 6
    rows = -(-len(bins) // columns)
    height = 1.7 + 0.2 * (1 + len(models))
    figure, axes = _figure(rows * columns, width=10.2, height=height * rows, rows=rows)
    for panel in axes:
        panel.axis("off")
    for panel, (_, row) in zip(axes, bins.iterrows(), strict=False):
        panel.imshow(photographs[row["id"]])
        panel.set_title(f"{row['id']}: {row['actual']} items", fontsize=9, pad=5 + 11 * len(models))
        for line, model in enumerate(models):
            right = row[model] == row["actual"]
            panel.text(
                0.5,
                1.02 + 0.1 * (len(models) - 1 - line),
                f"{model} {row[model]} {'✓' if right else '✗'}",
                transform=panel.transAxes,
                ha="center",
                fontsize=8,
                color=RIGHT if right else WRONG,
            )
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib, which would change the bytes.
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


def _figure(panels: int, width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.06))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, panels // rows, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)
