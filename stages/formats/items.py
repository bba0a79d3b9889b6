"""The items in the records of data/index.parquet."""

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

#: The column to read for asins_by_bin.
ASINS = "items.list.element.asin"
#: The columns to read for the numbers of a record: copies, sides and weights, but no names.
MEASURED = [
    f"items.list.element.{name}" for name in ("quantity", "height", "length", "width", "weight")
]


def asins_by_bin(index: pa.Table) -> pd.DataFrame:
    """A row per item: `bin`, the position of its bin in the index, and `asin`."""
    items = index["items"].combine_chunks()
    return pd.DataFrame(
        {
            "bin": pc.list_parent_indices(items),
            "asin": pc.struct_field(pc.list_flatten(items), "asin"),
        }
    )
