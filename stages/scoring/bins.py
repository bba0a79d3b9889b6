"""What is known about the bins before any model scores them: their sets, siblings and products."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stages.formats.items import ASINS, asins_by_bin
from stages.formats.shards import whole_parquet
from stages.formats.tables import read_csv
from stages.runtime import paths
from stages.scoring.claims import sibling_differences


def read_bins() -> pd.DataFrame:
    """The bins of all sets, with the columns id, quantity, set and group."""
    sets = read_csv(paths.SPLIT)
    if "quantity" in sets:
        # Counts were corrected.
        return sets
    with whole_parquet(paths.SUBSET):
        subset = pd.read_parquet(paths.SUBSET, columns=["id", "quantity"])
    return subset.merge(sets, on="id")


def corrected_ids(sets: pd.DataFrame) -> set[str]:
    """The bins in data/split.csv whose count people have corrected."""
    if "recorded" not in sets:
        return set()
    return {*sets.loc[sets["quantity"] != sets["recorded"], "id"]}


def read_products() -> pd.DataFrame:
    """A row per item in the records of the bucket: id (of its bin) and asin (of its product)."""
    with whole_parquet(paths.INDEX):
        index = pq.ParquetFile(paths.INDEX).read(["id", ASINS])
    products = asins_by_bin(index)
    return products.assign(id=index["id"].take(pa.array(products["bin"])))[["id", "asin"]]


def shared_with_training(bins: pd.DataFrame, products: pd.DataFrame) -> dict[str, set[str]]:
    """The test bins that share "siblings" or "products" with a bin of train or validation."""
    of_sets = products.dropna().merge(bins[["id", "set"]], on="id")
    return {"siblings": seen_test_bins(bins, "group"), "products": seen_test_bins(of_sets, "asin")}


def seen_test_bins(rows: pd.DataFrame, column: str) -> set[str]:
    """The test bins with a value in this column that train or validation has too."""
    tested = rows["set"] == "test"
    seen = rows[column].isin(rows.loc[~tested, column])
    return set(rows.loc[tested & seen, "id"])


def majority_quantity(bins: pd.DataFrame) -> int:
    """The most frequent quantity in train, the smallest one if several are equally frequent."""
    return int(bins.loc[bins["set"] == "train", "quantity"].mode().iloc[0])


def differences_in_train(bins: pd.DataFrame) -> pd.DataFrame:
    """The table of sibling_differences of the training bins."""
    train = bins[bins["set"] == "train"]
    ids, groups = train["id"].tolist(), train["group"].tolist()
    return sibling_differences(ids, groups, train["quantity"].to_numpy())
