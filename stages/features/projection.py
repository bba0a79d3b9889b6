"""The features of many photographs, and their first principal components."""

from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from stages.imaging.loader import Bins, load_batches
from stages.networks.inference import progress_bar

Features = NDArray[np.float32]
#: From uint8 images [batch, 3, size, size] to float32 features [batch, features].
MakeFeatures = Callable[[Tensor], Tensor]

# The images of a batch. This is no setting, because rounding depends on it.
BATCH = 256
# At most this many bins of train fit the projection, so that memory is bounded.
PROJECTION_BINS = 10_000


def fit_projection(
    train: Bins, components: int, make_features: MakeFeatures, stage: str
) -> Pipeline:
    """Fit the standardization of features and at most so many of their principal components."""
    rows = np.linspace(0, len(train) - 1, min(len(train), PROJECTION_BINS)).astype(np.int64)
    features = np.concatenate([*feature_batches(train, rows, make_features, stage)])
    first = PCA(min(components, *features.shape), svd_solver="covariance_eigh")
    return make_pipeline(StandardScaler(), first).fit(features)


def project(projection: Pipeline, bins: Bins, make_features: MakeFeatures, stage: str) -> Features:
    """The principal components of all bins, [bins, components]."""
    batches = feature_batches(bins, np.arange(len(bins)), make_features, stage)
    return np.concatenate([projection.transform(batch) for batch in batches])


def linear_map(projection: Pipeline) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The matrix [features, components] and the offset [components] that do the same as project."""
    scaler, first = (step for _, step in projection.steps)
    matrix = first.components_.T.astype(np.float64) / scaler.scale_[:, None]
    return matrix, -scaler.mean_ @ matrix - first.mean_ @ first.components_.T.astype(np.float64)


def feature_batches(
    bins: Bins, rows: NDArray[np.int64], make_features: MakeFeatures, stage: str
) -> Iterator[Features]:
    """The features of the bins at these rows, one batch after another.

    The progress bar has the name of the stage.
    """
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    with (
        closing(load_batches(bins, batches)) as loaded,
        progress_bar(len(rows), stage) as progress,
    ):
        for batch in loaded:
            yield make_features(batch.images).numpy()
            progress.update(len(batch.rows))
